"""The logs of a run, and what their library must not load."""

import subprocess
import sys


def test_the_logs_load_neither_torch_nor_tensorflow(tmp_path):
    """Where these are installed, their import takes seconds."""
    for name in ('torch', 'tensorflow'):
        (tmp_path / f'{name}.py').write_text('')
    program = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import gpt2_jax.workdir.log; '
        "sys.exit(bool({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, '-c', program], check=True)
