"""Settings made before JAX starts: test programs compile in half the time without optimization."""

import os
from importlib.metadata import version

FLAGS = ['--xla_backend_optimization_level=0']
if version('jaxlib').startswith('0.10.'):  # later versions have no such flag
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))  # reaches the processes that tests start, too
