"""Paths as people write them: `~`, URLs, other locales."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from gpt2_jax.errors import UsageError
from gpt2_jax.files import user_path
from gpt2_jax.workdir.folder import check_path

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('url', ['gs://b/r', 's3://b/r', 'hf://x', 'file:///tmp/x', 'https://x/y'])
@pytest.mark.parametrize(
    'script', ['train', 'sample', 'evaluate', 'convert', 'runs', 'steps', 'lens']
)
def test_urls_are_refused(url, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {
        'train': [f'--config={ROOT}/configs/quickstart.py', f'--workdir={url}'],
        'convert': [f'--ckpt_dir={url}', '--to_hf=out'],
        'runs': ['report', f'--workdir={url}', '--out=x.html'],
        'steps': ['find', f'--workdir={url}', '--text=x'],
        'lens': ['show', f'--ckpt_dir={url}', '--prompt=x'],
    }.get(script, [f'--ckpt_dir={url}'])
    code, _, err = runs.script(script, *arguments)
    assert code == 2
    assert err.startswith(f'error: {url} is an address: expected a path on this machine')
    assert err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert user_path('~/runs/x') == Path('/home/me/runs/x')
    assert user_path('runs/~x') == Path('runs/~x')


@pytest.mark.parametrize('path', ['/gs/x', '/s3/x', '/hf', 'a\\b', 'a/\udcff/b'])
def test_paths_that_the_checkpoint_library_misreads_are_refused(path):
    with pytest.raises(UsageError, match=r'could not be read back: .*; choose another folder'):
        check_path(Path(path))


def test_a_name_beyond_ascii_under_a_locale_without_utf_8():
    """Python would write the folder in another encoding than TensorStore."""
    program = (
        'import pathlib, sys; from gpt2_jax.workdir.folder import check_path\n'
        'try: check_path(pathlib.Path(sys.argv[1]))\n'
        'except Exception as error: print(ascii(str(error)))'
    )
    env = os.environ | {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    for name, refused in (('plain', False), ('ü', True)):
        done = subprocess.run(
            [sys.executable, '-c', program, name], env=env, capture_output=True, check=True
        )
        assert (b'locale of this terminal, is not UTF-8' in done.stdout) == refused, done
