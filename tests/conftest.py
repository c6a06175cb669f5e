"""Settings made before JAX starts: test programs compile in half the time without optimization."""

import os
from importlib.metadata import version

import pytest

FLAGS = ['--xla_backend_optimization_level=0']
if version('jaxlib').startswith('0.10.'):  # later versions have no such flag
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))  # reaches the processes that tests start, too


@pytest.fixture(autouse=True)
def machine_of_any_speed(monkeypatch):
    """No line that says how long something takes, which only a slow or busy machine prints."""
    monkeypatch.setattr('gpt2_jax.progress.LOG_SECONDS', 3600)
