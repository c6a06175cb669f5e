"""The documents in a file, as text.

A text file is one document. A JSON Lines file holds one in each line, a Parquet file one in each
row.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpt2_jax import files
from gpt2_jax.errors import UserError

BLOCK_BYTES = 1 << 20  # of a text file, in memory at once
PARQUET_ROWS = 1000  # of a Parquet file, in memory at once


class Placed(NamedTuple):
    """A document and where its file has it: line or row (from 1), byte (from 0; None: unknown)."""

    line: int
    byte: int | None
    blocks: Iterable[str]


def read(path: str, text_field: str) -> Iterator[Iterable[str]]:
    """Each document of a file, as blocks of its text.

    Files are .jsonl, .jsonl.gz, .parquet, or text under any other name. `text_field` is the field
    or the column that holds the text. Raises UserError naming the file, and the line or row in it.
    """
    return (document.blocks for document in read_placed(path, text_field))


def holds_records(path: str) -> bool:
    """Whether a file holds a document in each line or row; any other file is one document."""
    return path.endswith(('.jsonl', '.jsonl.gz', '.parquet'))


def read_placed(path: str, text_field: str) -> Iterator[Placed]:
    """As `read`, with the place of each document; in a compressed file, within its content."""
    try:
        if path.endswith(('.jsonl', '.jsonl.gz')):
            yield from _json_lines(path, text_field)
        elif path.endswith('.parquet'):
            yield from _parquet(path, text_field)
        else:
            yield Placed(1, 0, _text(path))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f'cannot read the text {path}: {getattr(error, "strerror", None) or error}'
        ) from None


def _text(path: str) -> Iterator[str]:
    """A file's text, one block at a time."""
    try:
        with open(path, 'rb') as file:
            yield from files.decode_utf8(iter(lambda: file.read(BLOCK_BYTES), b''), path)
    except OSError as error:
        raise UserError(f'cannot read the text {path}: {error.strerror}') from None


def _json_lines(path: str, text_field: str) -> Iterator[Placed]:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
        end = 0
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}, line {number} is not JSON: {error}') from None
            fields = record if isinstance(record, dict) else {}
            text = _checked(fields.get(text_field), f'{path}, line {number}', text_field, fields)
            yield Placed(number, start, text)


def _parquet(path: str, text_field: str) -> Iterator[Placed]:
    try:
        # An extra, and slow to import: only if there is a Parquet file to read.
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                _checked(None, path, text_field, columns)
            batches = file.iter_batches(PARQUET_ROWS, columns=[text_field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts, 1):
                text = _checked(text, f'{path}, row {number}', text_field, columns)
                yield Placed(number, None, text)
    except ArrowException as error:
        raise UserError(f'{path} cannot be read as Parquet: {error}') from None


def _checked(text, where: str, text_field: str, fields: Iterable[str]) -> tuple[str]:
    """The text as a document of one block."""
    if not isinstance(text, str):
        raise UserError(
            f'{where} has no text in {text_field!r}, but {text!r:.40}; its fields are '
            f'{", ".join(map(repr, fields)) or "none"}: name the field with the text by '
            '--text_field'
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: half of a surrogate pair, {text[error.start]!r}, is not Unicode text'
            ) from None
    return (text,)
