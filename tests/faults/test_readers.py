"""Damaged files of every kind that the package reads: a value or one short line, never more.

GPT2_JAX_FUZZ_INPUTS sets the number of inputs a reader, 200 by default; see fuzz.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

ROOT = Path(__file__).parents[2]


# In processes of their own: a reader that grows, or ends the process, must not end the tests.
@pytest.mark.parametrize('part', [0, pytest.param(1, marks=pytest.mark.long)])
def test_damaged_files(part):
    inputs = os.environ.get('GPT2_JAX_FUZZ_INPUTS', '200')
    readers = [f'--reader={name}' for name in list(fuzz.READERS)[part::2]]
    done = subprocess.run(
        [sys.executable, Path(fuzz.__file__), *readers, f'--inputs={inputs}'],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(' inputs, ') == len(readers)
