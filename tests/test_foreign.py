"""Foreign files: only regular files are opened, limits hold, every failure is one short line."""

import json
import os
import re
import sys

import pytest

from gpt2_jax import foreign
from gpt2_jax.errors import UserError
from gpt2_jax.foreign import PLAIN_NAME, SHA256, Check, Maybe, integer, parse_json


def blocks(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize('size', [1, 2, 3, 5, 100])
def test_utf8_in_blocks(size):
    text = 'né\r\n漢🎭\ufeff'
    for begin in (b'', b'\xef\xbb\xbf'):
        assert ''.join(foreign.decode_utf8(blocks(begin + text.encode(), size), 'x')) == text
    assert ''.join(foreign.decode_utf8([], 'x')) == ''
    for data, byte, offset in (
        (b'abc\xe9', 0xE9, 3),
        (b'abcd\xc3\xa9\xe2\x82x', 0xE2, 6),
        (b'a\xff\xff', 0xFF, 1),
        ('é🎭'.encode()[:-1], 0xF0, 2),
    ):
        with pytest.raises(
            UserError, match=f'x is not UTF-8 text: byte {byte:#x} at offset {offset};'
        ):
            ''.join(foreign.decode_utf8(blocks(data, size), 'x'))


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / 'file').write_bytes(b'abc')
    (tmp_path / 'link').symlink_to('file')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'device').symlink_to('/dev/zero')
    (tmp_path / 'circle').symlink_to('circle')
    for name in ('file', 'link'):
        assert foreign.read_bytes(tmp_path / name, 3) == b'abc'
    for name, named in (
        ('pipe', 'it is a device, a pipe or a socket; give a regular file'),
        ('device', 'it is a device'),
        ('folder', 'Is a directory'),
        ('circle', 'Too many levels of symbolic links'),
        ('none', 'No such file'),
        ('file/x', 'Not a directory'),
        ('a\0b', 'null (byte|character)'),
    ):
        with pytest.raises(UserError, match=f'cannot be read: .*{named}'):
            foreign.open_file(tmp_path / name)


def test_a_file_over_the_limit_is_not_read(tmp_path):
    with open(tmp_path / 'huge', 'wb') as file:
        file.truncate(1 << 40)  # a hole: a file of 1 TiB that takes no space
    with pytest.raises(
        UserError, match=r'huge has 1,099,511,627,776 bytes: expected at most 33,554,432'
    ):
        foreign.read_json(tmp_path / 'huge', dict)


SCHEMA = {
    'format': Check('1', lambda value: value == 1),
    'shards': [{'file': PLAIN_NAME, 'tokens': integer(0)}],
    'weights': Maybe({str: SHA256}),
}
GOOD = {'format': 1, 'shards': [{'file': 'a b.npy', 'tokens': 0, 'more': []}], 'extra': None}


def test_json_that_fits():
    assert parse_json(json.dumps(GOOD), 'x', SCHEMA) == GOOD
    assert parse_json('{"weights": null}', 'x', {'weights': Maybe(str)}) == {'weights': None}
    assert parse_json('[[]]', 'x', [list]) == [[]]


def changed(**changes):
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize(
    ('text', 'named'),
    [
        ('', 'cannot be read as JSON: Expecting value'),
        ('{"format": NaN}', 'NaN is not JSON'),
        ('[' * 100_000, 'nested too deeply'),
        ('[' * 100 + ']' * 100, 'nested too deeply'),
        ('{"a":' * 100 + '1' + '}' * 100, 'nested too deeply'),
        ('9' * 5000, 'cannot be read as JSON: .*digits'),
        ('{"format": "\\ud800"}', 'surrogates not allowed'),
        ('[]', 'is damaged: it is a list of 0, expected an object'),
        ('{}', "is damaged: it has no 'format'"),
        (changed(format=2), 'is damaged: format is 2, expected 1'),
        (changed(shards={}), 'shards is an object of 0, expected a list'),
        (changed(shards=[[]]), r'shards\[0\] is a list of 0, expected an object'),
        (changed(shards=[{}]), r"'shards\[0\]' has no 'file'"),
        (
            changed(shards=[{'file': 'a', 'tokens': -1}]),
            r'shards\[0\].tokens is -1, expected an int',
        ),
        (changed(shards=[{'file': 'a', 'tokens': True}]), 'tokens is True'),
        (changed(shards=[{'file': 'a', 'tokens': 1.0}]), 'tokens is 1.0'),
        (changed(weights={'x': 'F' * 64}), r"weights.x is 'FFF.*\.\., expected 64 hexadecimal"),
        (changed(weights={'\n' * 999: 3}), r'weights\.\\n\\n.*\.\. is 3, expected'),
    ],
)
def test_json_that_does_not_fit(text, named):
    with pytest.raises(UserError) as caught:
        parse_json(text, 'x.json', SCHEMA, 'write it again')
    message = str(caught.value)
    assert message.startswith('x.json ')
    assert message.endswith('; write it again')
    assert re.search(named, message), message
    assert len(message) <= foreign.MAX_MESSAGE
    assert message.isprintable()


@pytest.mark.parametrize(
    'name', ['', '.', '..', '../a', '/a', 'a/b', 'a\\b', 'a\0', 'a\n', '\ud800', 'a' * 256, 5, None]
)
def test_names_stay_inside_their_folder(name):
    assert not PLAIN_NAME.test(name)


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize(
    ('failure', 'named'),
    [
        (ValueError('\x1b]0;title\x07\r\nno'), r'\\x1b\]0;title\\x07\\r\\nno'),
        (KeyError(), 'KeyError'),
        (MemoryError(), 'it needs more memory than there is'),
        (OSError(5, 'Input/output error'), 'Input/output error'),
        (PanicException('index out of range'), 'index out of range'),
        (AssertionError('long ' * 999), r'long lo.*\.\.'),
    ],
)
def test_every_failure_of_a_parser_is_one_short_line(failure, named):
    with pytest.raises(UserError) as caught, foreign.parsing('/a' * 999, 'a zoo', 'fetch it again'):
        raise failure
    message = str(caught.value)
    assert re.search(f'a cannot be read as a zoo: {named}; fetch it again$', message), message
    assert message.startswith('../a/a')
    assert len(message) <= foreign.MAX_MESSAGE
    assert message.isprintable()


@pytest.mark.parametrize('raised', [UserError('ours'), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_failure_of_the_parser_passes(raised):
    with pytest.raises(type(raised)) as caught, foreign.parsing('x', 'a zoo'):
        raise raised
    assert caught.value is raised


def test_control_characters_are_escaped():
    text = 'é🎭 a\tb\n\x1b[2J\u202e\udc80\x9b'
    assert foreign.escape(text) == 'é🎭 a\\tb\\n\\x1b[2J\\u202e\\udc80\\x9b'
    assert foreign.escape(text, keep='\n\t') == 'é🎭 a\tb\n\\x1b[2J\\u202e\\udc80\\x9b'
    assert foreign.escape('plain') == 'plain'
    assert sys.getrecursionlimit() > foreign.MAX_JSON_DEPTH
