"""The end of a process: at once after an error, with one line, whatever its threads do."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_runs
import pytest
import runs

from gpt2_jax.workdir.checksums import committed_steps

PROGRAM = """
import sys, threading, time
from gpt2_jax import cli
from gpt2_jax.errors import UserError

def main(arguments):
    threading.Thread(target=time.sleep, args=(100,)).start()
    print('printed')
    raise UserError('what was wrong')

cli.run(main)
"""


def test_an_error_does_not_wait_for_threads():
    """Orbax's wait 300 s for each other after a save that could not begin."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, 'printed\n')
    assert done.stderr == 'error: what was wrong\n'


def test_ctrl_c_during_the_imports_ends_the_process(tmp_path):
    (tmp_path / 'absl.py').write_text('import signal\nsignal.raise_signal(signal.SIGINT)\n')
    root = Path(__file__).parents[2]
    # A shell ignores Ctrl-C in its background jobs, and so would a process that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = subprocess.run(
            [sys.executable, root / 'scripts/train.py'],
            timeout=60,
            capture_output=True,
            text=True,
            env=os.environ | {'PYTHONPATH': f'{tmp_path}:{root}'},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, '', '')


def test_ctrl_c_after_the_imports_can_be_handled(monkeypatch):
    before, seen = signal.getsignal(signal.SIGINT), []

    def train(*args, **options):
        seen.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr('gpt2_jax.train.train', train)
    config = Path(__file__).parents[2] / 'configs/quickstart.py'
    assert runs.script('train', f'--config={config}')[0] == 0
    assert seen == [before]


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('arguments', [[], ['--help'], ['--version']])
def test_an_output_that_cannot_be_written_is_named(arguments, unbuffered):
    """As in `evaluate.py > scores.txt` on a full disk, at the first print or at the end."""
    program = 'from gpt2_jax import cli; cli.run(lambda arguments: print("figures"))'
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-c', program, *arguments],
            timeout=60,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONUNBUFFERED': unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.startswith('error: cannot write to standard output: No space left')
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('text', ['a\x1b]0;title\x07b', 'a:\n\n  b', 'a\x9bb', 'x' * 10**6])
def test_an_error_is_one_short_line_without_control_characters(text, capsys, monkeypatch):
    from gpt2_jax import cli
    from gpt2_jax.errors import UserError

    def main(arguments):
        raise UserError(text)

    monkeypatch.setattr('sys.argv', ['x'])
    monkeypatch.setattr(cli, 'end_process', lambda code: None)
    cli.run(main)
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    assert line.strip().isprintable()
    assert '  ' not in line  # where an indented line was joined
    assert len(line) < 2100


def test_a_terminal_that_is_closed(tmp_path):
    """As when ssh is lost: the run is saved."""
    text = runs.write_text(tmp_path / 'text.txt')
    settings = runs.SMALL | {'train.steps': 100_000, 'checkpoint.every': 100_000}
    settings |= {'eval.every': 100_000}
    ours, theirs = pty.openpty()
    process = kill_runs.start(
        tmp_path / 'run', text, runs.compile_cache(), settings, terminal=theirs
    )
    os.close(theirs)
    printed = b''
    while not re.search(rb'loss \d', printed):  # the loop runs
        printed += os.read(ours, 1000)
    time.sleep(0.2)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    (step,) = committed_steps(tmp_path / 'run/checkpoints')
    assert step > 1
