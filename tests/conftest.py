"""Settings made before JAX starts: test programs compile in half the time without optimization."""

import gc
import os
from importlib.metadata import version

import pytest

FLAGS = ['--xla_backend_optimization_level=0']
if version('jaxlib').startswith('0.10.'):  # later versions have no such flag
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))  # reaches the processes that tests start, too

# Tracing makes many objects that live long: looking for garbage less often saves 4 % of the time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True)
def machine_of_any_speed(monkeypatch):
    """No line that says how long something takes, which only a slow or busy machine prints."""
    monkeypatch.setattr('gpt2_jax.progress.LOG_SECONDS', 3600)
