"""The documents in files, as text.

The suffix of a name, in capitals or not, says what a file is: .jsonl, .ndjson and .json hold one
document in each line, .parquet one in each row; any other file is text and one document. Text and
JSON Lines may be compressed, with .gz at the end of the name.
"""

import collections
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt2_jax import files, foreign
from gpt2_jax.errors import UserError
from gpt2_jax.terminal import counted

TEXT, JSON_LINES, PARQUET = 'text', 'JSON Lines', 'Parquet'
KINDS = {'.jsonl': JSON_LINES, '.ndjson': JSON_LINES, '.json': JSON_LINES, '.parquet': PARQUET}
NOT_TEXT = {
    suffix: remedy
    for suffixes, remedy in (
        ('.csv .tsv .xls .xlsx .arrow .feather .orc', 'convert it to .jsonl, one object a row'),
        ('.zip .tar .tgz .bz2 .xz .zst .7z .rar .deb .rpm .jar .whl', 'unpack it first'),
        ('.pdf .ps .doc .docx .odt .rtf .epub', 'convert it to plain text first'),
        ('.png .jpg .jpeg .gif .webp .bmp .ico .tif .tiff .mp3 .mp4 .wav .ogg', 'leave it out'),
        ('.woff .woff2 .ttf .otf .so .o .a .dll .exe .pyc .class .mo .db', 'leave it out'),
        ('.bin .npy .npz .pt .pth .pkl .safetensors .gguf .h5', 'leave it out'),
    )
    for suffix in suffixes.split()
}
BLOCK_BYTES = 1 << 20  # of a text file, in memory at once
PARQUET_ROWS, PARQUET_BYTES = 100, 1 << 28  # of a Parquet file, in memory at once
MAX_GROUP_BYTES = 1 << 30  # of text in a row group: a single row may have all of them
ONE_A_LINE = "expected one object a line; of one large array, jq -c '.[]' makes that"
MAX_LINE_BYTES = 32 << 20  # of JSON Lines; parsed JSON takes up to 20 times the memory of its text
MARK_OF_UTF8 = b'\xef\xbb\xbf'  # the byte order mark, which is dropped


class Placed(NamedTuple):
    """A document and where its file has it: line or row (from 1), byte (from 0; None: unknown).

    In a compressed file, the byte is one of its content.
    """

    line: int
    byte: int | None
    blocks: Iterable[str]


def file_kind(path: str | os.PathLike) -> str:
    """TEXT, JSON_LINES or PARQUET. Raises UserError for a suffix of files that hold no text."""
    name = os.path.basename(path).lower()
    suffix = os.path.splitext(name.removesuffix('.gz'))[1]
    if suffix == '.parquet' and name.endswith('.gz'):
        raise foreign.error(path, 'is a compressed Parquet file', 'decompress it first')
    if suffix in NOT_TEXT:
        raise foreign.error(path, f'is not text, by its suffix {suffix}', NOT_TEXT[suffix])
    return KINDS.get(suffix, TEXT)


def find_files(inputs: Iterable[str]) -> tuple[list[str], collections.Counter]:
    """The files that `inputs` name, in order, and how many were left out, for which reason.

    An input is a file, a folder (all files below it), a pattern (see files.matching), or @FILE with
    one of these in each line. Folders and patterns leave out hidden files, empty files and files
    that are not text by their suffix. Raises UserError for an input that names no file.
    """
    found, left_out = [], collections.Counter()
    for name in _expand_lists(inputs):
        path = files.user_path(name)
        if os.path.isdir(path):
            candidates = _below(path)
        elif os.path.lexists(path) or not (candidates := files.matching(name)):
            file_kind(path)
            foreign.open_file(path).close()
            found.append(str(path))
            continue
        before = len(found)
        for candidate in candidates:
            if not os.path.isfile(candidate):
                continue
            try:
                file_kind(candidate)
            except UserError:
                left_out[f'{candidate.suffix.lower()} files'] += 1
                continue
            if os.path.getsize(candidate):
                found.append(str(candidate))
            else:
                left_out['empty files'] += 1
        if len(found) == before:
            reasons = ', '.join(counted(n, reason) for reason, n in left_out.most_common(5))
            raise foreign.error(name, 'holds no text', f'left out: {reasons or "nothing"}')
    return found, left_out


def _expand_lists(inputs: Iterable[str]) -> Iterator[str]:
    for name in inputs:
        if name.startswith('@') and not os.path.lexists(name):
            yield from filter(None, map(str.strip, foreign.read_text(name[1:]).splitlines()))
        else:
            yield name


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder by name, files first; no hidden ones, and no linked folders."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith('.'))


def read(
    path: str, text_field: str, observe: Callable[[bytes | memoryview], None] = lambda block: None
) -> Iterator[Iterable[str]]:
    """Each document of a file, as blocks of its text; see `read_placed`."""
    return (document.blocks for document in read_placed(path, text_field, observe))


def read_placed(
    path: str, text_field: str, observe: Callable[[bytes | memoryview], None] = lambda block: None
) -> Iterator[Placed]:
    """Each document of a file, as blocks of its text, with its place.

    `text_field` is the field or the column that holds the text. `observe` is called with every byte
    of the file, in blocks, in order. Raises UserError naming the file, and the line or row in it.
    """
    kind = file_kind(path)
    with foreign.open_file(path) as file:
        if kind == PARQUET:
            for block in iter(lambda: file.read(BLOCK_BYTES), b''):
                observe(block)
            yield from _parquet(path, file, text_field)
            return
        stream = io.BufferedReader(_Observed(file, observe))
        if compressed := path.lower().endswith('.gz'):
            stream = gzip.GzipFile(fileobj=stream)
        expected = f'compressed {kind}' if compressed else kind
        if kind == TEXT:
            with foreign.parsing(path, expected):
                marked = stream.peek(3)[:3] == MARK_OF_UTF8
            yield Placed(1, 3 if marked else 0, _text(path, stream, expected))
        else:
            with foreign.parsing(path, expected):
                yield from _json_lines(path, stream, text_field)


class _Observed(io.RawIOBase):
    """A file that shows to `observe` what is read from it."""

    def __init__(self, file: io.BufferedIOBase, observe: Callable[[bytes | memoryview], None]):
        self.file, self.observe = file, observe

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        n_bytes = self.file.readinto(buffer)
        self.observe(memoryview(buffer)[:n_bytes])
        return n_bytes


def _text(path: str, stream, expected: str) -> Iterator[str]:
    with foreign.parsing(path, expected):
        yield from foreign.decode_utf8(iter(lambda: stream.read(BLOCK_BYTES), b''), path)


def _json_lines(path: str, stream, text_field: str) -> Iterator[Placed]:
    lines, end = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b''), 0
    for number, line in enumerate(lines, 1):
        start, end = end, end + len(line)
        place = f'{path}, line {number}'
        if len(line) > MAX_LINE_BYTES:
            problem = f'has over {MAX_LINE_BYTES:,} bytes'
            raise foreign.error(place, problem, 'split the document, or give it as a text file')
        if number == 1:
            line = line.removeprefix(MARK_OF_UTF8)
        if not line.strip():
            continue
        with foreign.parsing(place, 'JSON', ONE_A_LINE):
            record = json.loads(line.decode())
        if not isinstance(record, dict):
            raise foreign.error(place, f'is {foreign.show(record)}', ONE_A_LINE)
        yield Placed(number, start, _checked(record.get(text_field), place, text_field, record))


def _parquet(path: str, file, text_field: str) -> Iterator[Placed]:
    try:
        from pyarrow import parquet  # an extra, and slow to import: only for a Parquet file
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install -e '.[parquet]'") from None
    with (
        foreign.parsing(path, PARQUET),
        parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES) as table,
    ):
        columns = table.schema_arrow.names
        if text_field not in columns:
            _checked(None, path, text_field, columns)
        sizes = _text_bytes(table.metadata, text_field)
        for group, n_bytes in enumerate(sizes):
            if n_bytes > MAX_GROUP_BYTES:
                problem = f'has {n_bytes:,} bytes of text in row group {group}'
                remedy = f'write it with row groups of at most {MAX_GROUP_BYTES:,} bytes'
                raise foreign.error(path, problem, remedy)
        numbers = itertools.count(1)
        for group, n_bytes in enumerate(sizes):
            # A row may be as long as its group, and each of many rows if they are equal.
            n_rows = min(PARQUET_ROWS, max(1, PARQUET_BYTES // max(1, n_bytes)))
            for batch in table.iter_batches(n_rows, row_groups=[group], columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number = next(numbers)
                    text = _checked(text, f'{path}, row {number}', text_field, columns)
                    yield Placed(number, None, text)


def _text_bytes(metadata, text_field: str) -> list[int]:
    """The bytes of the text of each row group in a Parquet file, decompressed."""
    sizes = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in range(group.num_columns)]
        sizes.append(
            sum(
                chunk.total_uncompressed_size
                for chunk in chunks
                if f'{chunk.path_in_schema}.'.startswith(f'{text_field}.')
            )
        )
    return sizes


def _checked(text, place: str, text_field: str, fields: Iterable[str]) -> tuple[str]:
    """The text as a document of one block."""
    if not isinstance(text, str):
        names = ', '.join(map(foreign.show, fields)) or 'none'
        problem = f'has no text in {text_field!r}, but {foreign.show(text)}; its fields are {names}'
        raise foreign.error(place, problem, 'name the field with the text by --text_field')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f'holds half of a surrogate pair, {text[error.start]!r}'
            raise foreign.error(place, problem, 'expected Unicode text') from None
    return (text,)
