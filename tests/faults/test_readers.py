"""Damaged files of every kind that the data package reads: a value or one short line, never more.

GPT2_JAX_FUZZ_INPUTS sets the number of inputs a reader, 200 by default; see fuzz.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('reader', fuzz.READERS)
def test_damaged_files(reader):
    """In a process of its own: a reader that grows, or ends the process, must not end the tests."""
    inputs = os.environ.get('GPT2_JAX_FUZZ_INPUTS', '200')
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name('fuzz.py'),
            f'--reader={reader}',
            f'--inputs={inputs}',
        ],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
