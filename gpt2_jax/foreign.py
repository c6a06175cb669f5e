"""Reading files that others wrote: whatever they hold, the result is a value or a UserError.

A file may be damaged, of another kind, or made to do harm. So every reader of the package opens and
parses files through these functions:

    open_file(path)                    a regular file, never a pipe, a device or a folder
    read_bytes, read_text, read_json   the same, with a limit on size before anything is read
    parse_json(text, source, schema)   a limit on depth, and one check of all that is used
    with parsing(source, 'Parquet'):   any failure of a parser becomes a UserError
    error(source, problem, remedy)     that UserError: one line of at most 300 characters

A schema describes the JSON that a reader uses; what it does not mention is ignored:

    schema = {'format': Check('1', lambda value: value == 1),
              'shards': [{'file': PLAIN_NAME, 'tokens': integer(0)}],     # a list, of any length
              'weights': {str: PLAIN_NAME},                               # an object, of any keys
              'note': Maybe(str)}                                         # absent, null or a str
"""

import codecs
import contextlib
import itertools
import json
import os
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

from gpt2_jax.errors import UserError

MAX_MESSAGE = 300  # characters of an error
MAX_SOURCE = 120  # of them for the path
MAX_JSON_BYTES = 32 << 20  # parsed JSON takes up to 20 times the memory of its text
MAX_JSON_DEPTH = 64
TO_UTF8 = 'convert it first, for instance with iconv'
JOINERS = '\u200c\u200d'


def escape(text: str, keep: str = '') -> str:
    """The text with control characters as escapes (\\x1b, \\n, \\u202e), except those in `keep`.

    A terminal obeys control characters: a file must not set its title or write to the clipboard.
    Spaces of all kinds and the two joiners, which scripts and emoji need, are shown as they are.
    """
    if text.isprintable():
        return text

    def is_shown(c: str) -> bool:
        return c.isprintable() or c in keep or c in JOINERS or unicodedata.category(c) == 'Zs'

    return ''.join(c if is_shown(c) else c.encode('unicode_escape').decode() for c in text)


def error(source: str | os.PathLike, problem: str, remedy: str = '') -> UserError:
    """The error 'SOURCE PROBLEM; REMEDY' in one line of at most 300 printable characters.

    A long source loses its beginning, a long problem its end.
    """
    source, remedy = escape(str(source)), f'; {remedy}' if remedy else ''
    if len(source) > MAX_SOURCE:
        source = '..' + source[2 - MAX_SOURCE :]
    problem = cut(problem, MAX_MESSAGE - len(source) - len(remedy) - 1)
    return UserError(cut(f'{source} {problem}{remedy}'))


def show(value: Any) -> str:
    """A value in a few words, for errors."""
    if isinstance(value, dict):
        return f'an object of {len(value)}'
    if isinstance(value, list):
        return f'a list of {len(value)}'
    return cut(repr(value[:50] if isinstance(value, str) else value), 50)


def cut(text: str, length: int = MAX_MESSAGE) -> str:
    """The text with control characters escaped, and without its end if that is beyond `length`."""
    text = escape(text[:MAX_MESSAGE])
    return text if len(text) <= length else text[: max(0, length - 2)] + '..'


@contextlib.contextmanager
def parsing(source: str | os.PathLike, expected: str, remedy: str = '') -> Iterator[None]:
    """Turns any failure of the block, which parses `source` as `expected`, into a UserError."""
    try:
        yield
    except BaseException as failure:  # Rust libraries raise PanicException, not an Exception
        if isinstance(failure, UserError | KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if isinstance(failure, MemoryError):
            reason = 'it needs more memory than there is'
        elif isinstance(failure, RecursionError):
            reason = 'it is nested too deeply'
        else:
            reason = getattr(failure, 'strerror', None) or str(failure) or type(failure).__name__
        raise error(source, f'cannot be read as {expected}: {reason}', remedy) from None


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, or a link to one, open for reading. Raises UserError.

    A pipe would wait for its writer, a device might never end, and opening one can act on it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            _refuse_kind(path)
        # If the path has become a pipe since, O_NONBLOCK keeps this from waiting for its writer.
        file = open(  # noqa: SIM115
            path, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
        )
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        reason = getattr(failure, 'strerror', None) or str(failure)
        raise error(path, f'cannot be read: {reason}') from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        _refuse_kind(path)
    return file


def _refuse_kind(path: str | os.PathLike) -> NoReturn:
    kind = 'Is a directory' if os.path.isdir(path) else 'it is a device, a pipe or a socket'
    raise error(path, f'cannot be read: {kind}', 'give a regular file')


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """All of a regular file. Raises UserError, without reading it, if it is over `max_bytes`."""
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        with parsing(path, 'a file'):
            data = file.read(max_bytes + 1) if n_bytes <= max_bytes else b''
    if max(n_bytes, len(data)) > max_bytes:
        problem = f'has {max(n_bytes, len(data)):,} bytes: expected at most {max_bytes:,}'
        raise error(path, problem, 'it is another file, or damaged')
    return data


def read_text(
    path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES, remedy: str = TO_UTF8
) -> str:
    """All of a regular UTF-8 file of at most `max_bytes`. Raises UserError; see `decode_utf8`."""
    return ''.join(decode_utf8([read_bytes(path, max_bytes)], path, remedy))


def decode_utf8(
    blocks: Iterable[bytes], source: str | os.PathLike, remedy: str = TO_UTF8
) -> Iterator[str]:
    """The text of UTF-8 bytes, one piece for each block; no newline is translated.

    A block may end inside a character. A byte order mark at the beginning is dropped. Raises
    UserError with the first wrong byte, its offset and the `remedy`.
    """
    decoder, n_bytes, begins = codecs.getincrementaldecoder('utf-8')(), 0, True
    for block in itertools.chain(blocks, [b'']):
        n_held = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as failure:
            byte, offset = failure.object[failure.start], n_bytes - n_held + failure.start
            raise error(
                source,
                f'is not UTF-8 text: byte {byte:#04x} at offset {offset}',
                remedy,
            ) from None
        if begins and text:
            text, begins = text.removeprefix('\ufeff'), False
        yield text
        n_bytes += len(block)


class Check(NamedTuple):
    """What a value must be: in words, for errors, and as a test that raises nothing."""

    words: str
    test: Callable[[Any], bool]


class Maybe(NamedTuple):
    """The schema of a key that may be absent or null."""

    schema: Any


def integer(low: int) -> Check:
    """64-bit integers that are at least `low`."""
    return Check(
        f'an integer from {low}', lambda value: type(value) is int and low <= value < 2**63
    )


def one_of(*values: str) -> Check:
    """One of these texts."""
    words = 'one of ' + ', '.join(map(repr, values))
    return Check(words, lambda value: isinstance(value, str) and value in values)


NUMBER = Check('a number', lambda v: type(v) in (int, float) and abs(v) <= sys.float_info.max)
SHA256 = Check(
    '64 hexadecimal digits',
    lambda v: isinstance(v, str) and len(v) == 64 and not v.strip('0123456789abcdef'),
)
# A name cannot lead out of its folder. Opening it by `open_file` refuses all but regular files.
PLAIN_NAME = Check(
    'the plain name of a file',
    lambda v: (
        isinstance(v, str)
        and v not in ('', '.', '..')
        and v.isprintable()
        and not {'/', '\\'} & set(v)
        and len(v.encode()) <= 255
    ),
)
KINDS = {dict: 'an object', list: 'a list', str: 'a text', int: 'an integer', bool: 'true or false'}


def read_json(path: str | os.PathLike, schema: Any, remedy: str = '') -> Any:
    """The content of a JSON file that fits a schema. Raises UserError, see `parse_json`."""
    return parse_json(read_text(path), path, schema, remedy)


def parse_json(text: str, source: str | os.PathLike, schema: Any, remedy: str = '') -> Any:
    """The value of a JSON text that fits a schema, with all its strings Unicode text.

    Raises UserError naming `source`, the place in it and what was expected there.
    """

    def refuse(word):
        raise ValueError(f'{word} is not JSON')

    with parsing(source, 'JSON', remedy):
        value = json.loads(text, parse_constant=refuse)
        _check_depth(value)
    check(value, schema, source, remedy)
    return value


def _check_depth(value: Any) -> None:
    """Raises RecursionError beyond MAX_JSON_DEPTH, and UnicodeError for half a surrogate pair."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        for item in level:
            if isinstance(item, str) and not item.isascii():
                item.encode()
        parts = [[*item, *item.values()] if isinstance(item, dict) else item for item in level]
        level = [item for part in parts if isinstance(part, list) for item in part]
        if not level:
            return
    raise RecursionError


def check(
    value: Any, schema: Any, source: str | os.PathLike, remedy: str = '', place: str = ''
) -> None:
    """Raises UserError if a value in the content of `source` does not fit a schema.

    `place` says in the error where the value is; it is '' for the whole content.
    """

    def expect(fits: bool, words: str) -> None:
        if not fits:
            where = cut(place, 60) or 'it'
            raise error(source, f'is damaged: {where} is {show(value)}, expected {words}', remedy)

    if isinstance(schema, Maybe):
        if value is not None:
            check(value, schema.schema, source, remedy, place)
    elif isinstance(schema, Check):
        expect(schema.test(value), schema.words)
    elif isinstance(schema, list):
        expect(isinstance(value, list), KINDS[list])
        for i, item in enumerate(value):
            check(item, schema[0], source, remedy, f'{place}[{i}]')
    elif isinstance(schema, dict):
        expect(isinstance(value, dict), KINDS[dict])
        for key, inner in schema.items():
            for name in value if key is str else [key]:
                if name in value:
                    check(value[name], inner, source, remedy, f'{place}.{name}'.lstrip('.'))
                elif not isinstance(inner, Maybe):
                    where = f'{show(place)} has' if place else 'it has'
                    raise error(source, f'is damaged: {where} no {show(name)}', remedy)
    else:
        expect(type(value) is schema, KINDS[schema])
