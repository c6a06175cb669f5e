"""What the logs need, and what they must not load."""

import subprocess
import sys


def test_torch_is_not_loaded_and_can_be_later(tmp_path):
    """Where it is installed, its import takes longer than all others."""
    (tmp_path / 'torch.py').write_text('LOADED = True\n')
    code = "import sys, gpt2_jax.writers; assert 'torch' not in sys.modules; import torch; assert torch.LOADED"
    subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': str(tmp_path)})
