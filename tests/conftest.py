"""Before JAX starts: programs that run for milliseconds need no optimization, and compile a third sooner without."""

import os

os.environ.setdefault(
    'XLA_FLAGS', '--xla_backend_optimization_level=0'
)  # reaches the processes that tests start, too
