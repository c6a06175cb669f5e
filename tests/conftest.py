"""Settings made before JAX starts: test programs compile a third sooner without optimization."""

import os

os.environ.setdefault(
    'XLA_FLAGS', '--xla_backend_optimization_level=0'
)  # reaches the processes that tests start, too
