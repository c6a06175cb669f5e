"""docs/induction.md: a two-layer model grows an induction head, and needs it."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'induction.md'
# One head a layer and a steady learning rate: the head grows sooner.
SETTINGS = (
    'model.n_head=1',
    'model.initializer_range=0.15',
    'optim.end_learning_rate=3e-3',
    'train.steps=1000',
    'eval.every=1000',
    'eval.tokens=1024',
    'eval.sample_tokens=0',
)


@pytest.mark.long
def test_the_head_grows_and_the_model_needs_it(tmp_path, monkeypatch):
    """By the program of the page."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, ROOT / 'scripts/train.py', f'--config={ROOT}/configs/induction.py']
    # Compiled for speed, unlike the other tests: here the updates take longer than compilation.
    environment = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}
    changes = [f'--config.{setting}' for setting in SETTINGS]
    subprocess.run([*command, *changes], env=environment, stdout=subprocess.DEVNULL, check=True)
    program = re.search(r'```python\n(.*?)```', PAGE.read_text('utf-8'), re.DOTALL)[1]
    Path('program.py').write_text(program)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = runpy.run_path('program.py')
    assert found['name'] == 'h_1.attn.0'
    assert found['scores'].induction.max() > 0.3
    assert found['scores'].previous[0].max() > 0.2
    assert found['without'] >= 2 * found['plain'], out.getvalue()
