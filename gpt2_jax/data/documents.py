"""The documents in a file, as text: a text file is one, a JSON Lines or Parquet file has one in each line or row."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator

from gpt2_jax.errors import UserError

BLOCK_BYTES = 1 << 20  # of a text file held in memory at once
PARQUET_ROWS = 1000  # the same, of a Parquet file


def read(path: str, text_field: str) -> Iterator[Iterable[str]]:
    """Each document of a .jsonl, .jsonl.gz, .parquet or (any other name) text file, as blocks of its text.

    `text_field` is the field or column that holds the text. Raises UserError, naming the place.
    """
    try:
        if path.endswith(('.jsonl', '.jsonl.gz')):
            yield from _json_lines(path, text_field)
        elif path.endswith('.parquet'):
            yield from _parquet(path, text_field)
        else:
            yield _text(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f'cannot read the text {path}: {getattr(error, "strerror", None) or error}'
        ) from None


def _text(path: str) -> Iterator[str]:
    """A file's text, a block at a time, with no newline translated."""
    decoder, n_bytes = codecs.getincrementaldecoder('utf-8')(), 0
    try:
        with open(path, 'rb') as file:
            while block := file.read(BLOCK_BYTES):
                kept = len(
                    decoder.getstate()[0]
                )  # bytes of a character that the last block's end cut in two
                yield decoder.decode(block)
                n_bytes += len(block)
            kept = len(decoder.getstate()[0])
            decoder.decode(b'', final=True)
    except OSError as error:
        raise UserError(f'cannot read the text {path}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        offset = n_bytes - kept + error.start
        raise UserError(
            f'{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {offset}; '
            f'convert it first, for instance with iconv'
        ) from None


def _json_lines(path: str, text_field: str) -> Iterator[tuple[str]]:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}, line {number} is not JSON: {error}') from None
            fields = record if isinstance(record, dict) else {}
            yield _checked(fields.get(text_field), f'{path}, line {number}', text_field, fields)


def _parquet(path: str, text_field: str) -> Iterator[tuple[str]]:
    try:
        from pyarrow import (
            ArrowException,
            parquet,
        )  # an extra, and large: imported only when asked for
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                _checked(None, path, text_field, columns)
            batches = file.iter_batches(PARQUET_ROWS, columns=[text_field])
            for number, text in enumerate(
                (text for batch in batches for text in batch.column(0).to_pylist()), 1
            ):
                yield _checked(text, f'{path}, row {number}', text_field, columns)
    except ArrowException as error:
        raise UserError(f'{path} cannot be read as Parquet: {error}') from None


def _checked(text, where: str, text_field: str, fields: Iterable[str]) -> tuple[str]:
    """The text as a document of one block."""
    if not isinstance(text, str):
        raise UserError(
            f'{where} has no text in {text_field!r}, but {text!r:.40}; its fields are '
            f'{", ".join(map(repr, fields)) or "none"}: name the one with the text by --text_field'
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: half of a surrogate pair, {text[error.start]!r}, is no Unicode text'
            ) from None
    return (text,)
