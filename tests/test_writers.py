"""What the logs need, and what they must not load."""

import subprocess
import sys


def test_torch_is_not_loaded_and_can_be_later(tmp_path):
    """Where it is installed, its import takes longer than all others."""
    (tmp_path / 'torch.py').write_text('LOADED = True\n')
    for code in (
        "import sys, gpt2_jax.workdir.log; assert 'torch' not in sys.modules; import torch; assert torch.LOADED",
        "import sys, torch; torch.Tensor = 0; import gpt2_jax.workdir.log; assert sys.modules['torch'] is torch",
    ):
        subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': str(tmp_path)})
