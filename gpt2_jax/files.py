"""Files that appear whole or not at all, their SHA-256, their text, and where published files are.

The files of a published NAME are looked for in three folders, in this order: `data/NAME` below the
current folder, `$GPT2_JAX_DATA_DIR/NAME`, and `gpt2_jax/NAME` in the user's cache
(`$XDG_CACHE_HOME`, by default ~/.cache). A download goes to that cache. No file found is changed.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import os
import secrets
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2_jax.errors import UserError

BLOCK_BYTES = 1 << 16  # of a download, at once
TIMEOUT_SECONDS = 10  # of silence; a slow download that keeps moving is not cut off


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes its name, replacing an older file, once it is complete.

    If the block raises, nothing is left. Raises OSError.
    """
    part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
    try:
        with open(part, 'xb') as file:  # x: a link in this place is not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is either complete or as it was before. Raises OSError."""
    with new_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes its name once everything is written.

    If the block raises, nothing is left. Raises UserError if something is at `path` already, other
    than an empty folder, and if the disk refuses to write.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f'{path} exists and is not an empty folder: choose another, or move it away'
        )
    partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        name = str(error.filename or path).replace(str(partial), str(path))
        raise UserError(f'cannot write {name}: {error.strerror or error}') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def decode_utf8(blocks: Iterable[bytes], source: str | os.PathLike) -> Iterator[str]:
    """The text of UTF-8 bytes, one piece for each block; no newline is translated.

    A block may end inside a character. Raises UserError with the first wrong byte and its offset.
    """
    decoder, n_bytes = codecs.getincrementaldecoder('utf-8')(), 0
    for block in itertools.chain(blocks, [b'']):
        n_held = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f'{source} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset '
                f'{n_bytes - n_held + error.start}; convert it first, for instance with iconv'
            ) from None
        yield text
        n_bytes += len(block)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a published file can be downloaded, and how to recognise it."""

    url: str
    sha256: str
    n_bytes: int


def local_folders(name: str) -> list[Path]:
    """The folders that may hold the files of NAME, in the order of search; the cache comes last."""
    parents = [
        Path('data'),
        Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'gpt2_jax'),
    ]
    if data_dir := os.environ.get('GPT2_JAX_DATA_DIR'):
        parents.insert(1, Path(data_dir).expanduser())
    return [parent / name for parent in parents]


def download(name: str, source: Source, path: Path) -> None:
    """Downloads a file, called `name` in messages, to `path`. Raises OSError.

    The file appears only after its SHA-256 is verified. At most `source.n_bytes` + 1 bytes are
    read. urllib is used, and not pooch, because pooch has no limit on size and would fill the
    disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_file(path) as file:
            digest = _download(name, source, file)
            if digest != source.sha256:
                raise OSError(f'the file received has SHA-256 {digest}, expected {source.sha256}')
    except http.client.HTTPException as error:
        raise OSError(f'{type(error).__name__}: {error}') from None


def _download(name: str, source: Source, file: BinaryIO) -> str:
    """Copies the URL into an open file, with progress on stderr; returns the SHA-256 received."""
    print(
        f'downloading {name}, {source.n_bytes / 1e6:.1f} MB, from {source.url}',
        file=sys.stderr,
        flush=True,
    )
    digest, n_bytes = hashlib.sha256(), 0
    with urllib.request.urlopen(source.url, timeout=TIMEOUT_SECONDS) as response:
        while block := response.read(min(BLOCK_BYTES, source.n_bytes + 1 - n_bytes)):
            file.write(block)
            digest.update(block)
            n_bytes += len(block)
            if n_bytes > source.n_bytes:
                raise OSError(f'the server sent more than the expected {source.n_bytes:,} bytes')
            if sys.stderr.isatty():
                progress = f'\r{n_bytes / 1e6:.1f} MB, {n_bytes / source.n_bytes:.0%} '
                print(progress, end='', file=sys.stderr, flush=True)
    print(f'\rdownloaded {n_bytes / 1e6:.1f} MB', file=sys.stderr, flush=True)
    return digest.hexdigest()
