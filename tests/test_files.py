"""Files and folders appear whole or not at all; text is decoded in blocks of any size."""

import hashlib
import os

import pytest

from gpt2_jax import files
from gpt2_jax.errors import UserError


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


def test_sha256(tmp_path):
    (tmp_path / 'a').write_bytes(b'abc' * 99999)
    assert files.sha256(tmp_path / 'a') == hashlib.sha256(b'abc' * 99999).hexdigest()


def blocks(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize('size', [1, 2, 3, 5, 100])
def test_utf8_in_blocks(size):
    text = 'né\r\n漢🎭\ufeff'
    assert ''.join(files.decode_utf8(blocks(text.encode(), size), 'x')) == text
    assert ''.join(files.decode_utf8([], 'x')) == ''
    for data, byte, offset in (
        (b'abc\xe9', 0xE9, 3),
        (b'abcd\xc3\xa9\xe2\x82x', 0xE2, 6),
        (b'a\xff\xff', 0xFF, 1),
        ('é🎭'.encode()[:-1], 0xF0, 2),
    ):
        with pytest.raises(
            UserError, match=f'x is not UTF-8 text: byte {byte:#x} at offset {offset};'
        ):
            ''.join(files.decode_utf8(blocks(data, size), 'x'))
