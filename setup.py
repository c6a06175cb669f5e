"""Packaging of gpt2_jax. The suite has run on the lowest and the highest version of each range."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'gpt2_jax/__init__.py').read_text()).group(1)

# 0.10.2 is the last version for Python 3.11. Most fused kernels use Pallas' Triton backend, which
# is deprecated since JAX 0.11 and still there in 0.12.
JAX_VERSIONS = '>=0.10.2,<0.13'
PARQUET = ['pyarrow>=21,<27']
GRAIN = ['grain>=0.2.18,<0.3']

setup(
    name='gpt2_jax',
    version=VERSION,
    description='GPT-2 from scratch in JAX and Flax: to read, to train and to look into',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='MIT',
    packages=find_packages(include=['gpt2_jax', 'gpt2_jax.*']),
    package_data={'gpt2_jax.reports': ['page/*']},
    python_requires='>=3.11',
    install_requires=[
        f'jax{JAX_VERSIONS}',
        'flax>=0.12.8,<0.13',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.4,<0.13',
        'numpy>=2.4,<2.6',
        'tiktoken>=0.14,<0.15',
        'absl-py>=2.3,<3',
        'ml_collections>=1.1,<2',
        'rich>=14,<16',
        'safetensors>=0.5,<0.9',
        'tensorboard>=2.20,<3',
    ],
    extras_require={
        'cuda12': [f'jax[cuda12]{JAX_VERSIONS}'],
        'cuda13': [f'jax[cuda13]{JAX_VERSIONS}'],
        'parquet': PARQUET,
        'grain': GRAIN,
        'hub': ['huggingface_hub>=1,<3'],
        'parity': ['torch>=2.13,<2.14', 'transformers>=5.23,<6'],
        'test': [
            'pytest>=8,<10',
            'ruff>=0.14,<0.18',
            'pytest-xdist>=3.7,<4',
            'hypothesis>=6.140,<7',
            *PARQUET,
            *GRAIN,
        ],
    },
)
