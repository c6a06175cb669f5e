"""Files and folders appear whole or not at all; text is decoded in blocks of any size."""

import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax import files
from gpt2_jax.errors import UsageError, UserError


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), files.new_file(path) as file:
        file.write(b'half')
        file.flush()
        assert path.read_text() == 'old'
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ['a.json']
    assert path.read_text() == 'old'
    files.write_text(path, 'né\r\n')
    assert path.read_bytes() == 'né\r\n'.encode()
    assert os.listdir(tmp_path) == ['a.json']


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match='No space') as caught, files.new_file(tmp_path / 'a') as file:
        assert file.name != str(tmp_path / 'a')
        raise OSError(28, 'No space left on device')
    assert caught.value.filename == str(tmp_path / 'a')
    with pytest.raises(OSError, match='No such file') as caught:
        files.write_text(tmp_path / 'none/a', '')
    assert caught.value.filename == str(tmp_path / 'none/a')


def test_a_new_file_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / 'target').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'target')
    files.write_text(tmp_path / 'link', 'new')
    assert (tmp_path / 'target').read_text() == 'mine'
    assert (tmp_path / 'link').read_text() == 'new'


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / 'usual').write_text('')
    files.write_text(tmp_path / 'ours', '')
    assert (tmp_path / 'ours').stat().st_mode == (tmp_path / 'usual').stat().st_mode


NO_SPACE = OSError(28, 'No space left on device')


@pytest.mark.parametrize('error', [NO_SPACE, KeyboardInterrupt()])
def test_a_folder_appears_only_when_it_is_complete(tmp_path, error):
    path = tmp_path / 'deep/new'
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), files.new_folder(path) as folder:
        (folder / 'a').write_text('a')
        raise error
    assert os.listdir(tmp_path / 'deep') == []
    with files.new_folder(path) as folder:
        (folder / 'a').write_text('a')
        assert not path.exists()
    assert os.listdir(path) == ['a']
    for taken in (path, path / 'a'):
        with (
            pytest.raises(UserError, match='exists and is not an empty folder'),
            files.new_folder(taken),
        ):
            raise AssertionError('the block must not run')
    assert os.listdir(path) == ['a']


def test_the_file_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r'cannot write .*/new/a/b: No such file'),
        files.new_folder(tmp_path / 'new') as folder,
    ):
        (folder / 'a/b').write_text('b')


def test_what_a_killed_process_left_is_removed(tmp_path, capsys):
    program = (
        'import os, pathlib, signal, sys\nfrom gpt2_jax import files\n'
        'with files.new_folder(pathlib.Path(sys.argv[1])) as folder:\n'
        '    (folder / "a").write_text("a")\n'
        '    print(folder, flush=True)\n'
        '    sys.stdin.read() if sys.argv[2:] else os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    command = [sys.executable, '-c', program, tmp_path / 'out[1]']
    root = Path(files.__file__).parents[1]
    subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL)
    (leftover,) = tmp_path.iterdir()
    others = [tmp_path / '.out[1].1234.partial', tmp_path / '.out1.12345678.partial']
    for other in others:
        other.mkdir()
    with subprocess.Popen(
        [*command, 'wait'], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        in_use = Path(running.stdout.readline().strip())
        assert not leftover.exists()
        with files.new_folder(tmp_path / 'out[1]') as folder:
            assert in_use.exists()  # it belongs to a process that runs
            assert {in_use, folder, *others} == set(tmp_path.iterdir())
        running.stdin.close()
        running.wait()
    assert set(tmp_path.iterdir()) == {tmp_path / 'out[1]', *others}


def test_sha256(tmp_path):
    (tmp_path / 'a').write_bytes(b'abc' * 99999)
    assert files.sha256(tmp_path / 'a') == hashlib.sha256(b'abc' * 99999).hexdigest()


@pytest.mark.parametrize('name', ['/dev/zero', 'pipe', 'folder'])
def test_only_regular_files_have_a_sha256(tmp_path, name):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match='cannot be read'):
        files.sha256(tmp_path / name)


def test_a_name_that_exists_is_not_a_pattern(tmp_path, monkeypatch):
    for name in ('[v2]/a.bin', '[v2]/b.bin', 'v/c.bin', '2/d.bin', '[v2]/x[1].bin', '[v2]/x1.bin'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv('HOME', str(tmp_path))
    for pattern, names in (
        ('[v2]/?.bin', ['[v2]/a.bin', '[v2]/b.bin']),
        ('[v2]/x[1].bin', ['[v2]/x[1].bin']),
        ('[v2]/x[12].bin', ['[v2]/x1.bin']),
        ('[v3]/*.bin', ['v/c.bin']),
        ('**/?.bin', ['2/d.bin', '[v2]/a.bin', '[v2]/b.bin', 'v/c.bin']),
        ('[v2]/none.bin', []),
    ):
        expected = [tmp_path / name for name in names]
        assert files.matching(f'{tmp_path}/{pattern}') == files.matching(f'~/{pattern}') == expected
        monkeypatch.chdir(tmp_path)
        assert files.matching(pattern) == [Path(name) for name in names]


@pytest.mark.parametrize('address', ['gs://b/r', 's3://b', 'HTTPS://x', 'file:///etc/passwd'])
def test_addresses_are_refused(address):
    with pytest.raises(UsageError, match=f'{address} is an address: expected a path on this mach'):
        files.user_path(address)


def test_text_too_long_for_a_path_is_refused():
    for path in (files.user_path, files.matching):
        with pytest.raises(UsageError, match=r'\[\[\[ has 99,999 characters: expected a path'):
            path('[' * 99_999)


def test_the_current_folder_was_removed(tmp_path, monkeypatch):
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    assert files.user_path(tmp_path) == tmp_path
    for path in ('runs/a', '.'):
        with pytest.raises(UsageError, match='cannot be found: the current folder was removed'):
            files.user_path(path)


def test_only_regular_files_are_replaced(tmp_path):
    """Root could replace /dev/null by a file."""
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('pipe')
    (tmp_path / 'folder').mkdir()
    for name in ('pipe', 'link', 'folder'):
        with pytest.raises(OSError, match='is not a regular file'):
            files.write_text(tmp_path / name, 'x')
        with pytest.raises(UsageError, match=f'{name}: it is not a regular file'):
            files.output_path(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ['folder', 'link', 'pipe']
    assert stat.S_ISFIFO(os.stat(tmp_path / 'link').st_mode)


def test_paths_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert files.output_path('a.html') == Path('a.html')
    assert files.output_path('~/a.html') == tmp_path / 'a.html'
    for path in ('no/a.html', '.', '..', '/'):
        with pytest.raises(UsageError, match=f'^cannot write {re.escape(path)}: '):
            files.output_path(path)
    with pytest.raises(UsageError, match='a path is empty: is a variable of the shell not set'):
        files.output_path('')
    monkeypatch.setattr(os, 'access', lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with pytest.raises(UsageError, match=r'^cannot write a.html: no permission to write in '):
        files.output_path('a.html')


def test_user_paths(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert files.user_path('~/a') == Path('/home/me/a')
    for path in ('a', './~/a', 'C:/a', 'a:b', Path('a//b')):
        assert files.user_path(path) == Path(path)
