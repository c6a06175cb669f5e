"""Files that appear whole or not at all, their SHA-256, and where published files are.

The files of a published NAME are looked for in three folders, in this order: `data/NAME` below the
current folder, `$GPT2_JAX_DATA_DIR/NAME`, and `gpt2_jax/NAME` in the user's cache
(`$XDG_CACHE_HOME`, by default ~/.cache). A download goes to that cache. No file found is changed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import http.client
import os
import re
import secrets
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2_jax import foreign
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.progress import Progress

MAX_PATH = 4096  # characters; Linux allows as many bytes
BLOCK_BYTES = 1 << 16  # of a download, at once
TIMEOUT_SECONDS = 10  # of silence; a slow download that keeps moving is not cut off


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes its name, replacing an older file, once it is complete.

    If the block raises, nothing is left. Raises OSError that names the file, also for a folder or a
    device: root would replace /dev/null by a file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, 'is not a regular file', str(path))
    part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
    try:
        with open(part, 'xb') as file:  # x: a link in this place is not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno and str(error.filename) in ('None', str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is either complete or as it was before. Raises OSError."""
    with new_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes its name once everything is written.

    If the block raises, nothing is left; what a killed process left is removed by the next one that
    writes the same folder. Raises UserError if something is at `path` already, other than an empty
    folder, and if the disk refuses to write.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f'{path} exists and is not an empty folder: choose another, or move it away'
        )
    partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
    try:
        partial.mkdir(parents=True)
        with _locked(partial):  # in use, until this process ends
            _remove_leftovers(path)
            yield partial
            partial.rename(path)
    except OSError as error:
        name = str(error.filename or path).replace(str(partial), str(path))
        raise UserError(f'cannot write {name}: {error.strerror or error}') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; False if another process holds it, or the disk has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes the unfinished folders of `path` that belong to no running process."""
    for leftover in path.parent.glob(f'.{glob.escape(path.name)}.*.partial'):
        ours = re.fullmatch(rf'\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial', leftover.name)
        if ours and leftover.is_dir() and not leftover.is_symlink():
            with _locked(leftover) as held:
                if held:
                    shutil.rmtree(leftover, ignore_errors=True)
                    print(f'removed {leftover}, which a killed process left', file=sys.stderr)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a regular file's bytes, in hex. Raises UserError."""
    with foreign.open_file(path) as file, foreign.parsing(path, 'a file'):
        return hashlib.file_digest(file, 'sha256').hexdigest()


def user_path(path: str | os.PathLike) -> Path:
    """The path, or pattern, that a user wrote, with ~ for the home folder.

    Raises UsageError for what is not a path, such as a number or an address like gs://bucket, for
    an empty text and one too long to be a path, and for a relative path if the current folder was
    removed.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f'{foreign.show(path)} is not a path: expected a text or a pathlib.Path')
    text = os.fspath(path)
    if not text:
        raise UsageError('a path is empty: is a variable of the shell not set?')
    if len(text) > MAX_PATH:
        problem = f'has {len(text):,} characters: expected a path of at most {MAX_PATH:,}'
        raise UsageError(str(foreign.error(text[-50:], problem)))
    if scheme := re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
        raise UsageError(
            f'{foreign.escape(text)} is an address: expected a path on this machine; copy what is '
            f'there to a folder first, {scheme[0]} is not supported'
        )
    expanded = Path(os.path.expanduser(text))
    try:
        expanded.absolute()
    except FileNotFoundError:
        raise UsageError(
            f'{foreign.escape(text)} cannot be found: the current folder was removed; change to '
            'another one'
        ) from None
    return expanded


def output_path(path: str | os.PathLike) -> Path:
    """The path of a file to write, as `user_path`, checked before the work that makes the file.

    Raises UsageError if its folder does not exist or is not writable, or if the path itself is a
    folder or a device.
    """
    out = user_path(path)
    folder = out.absolute().parent
    if not folder.is_dir():
        raise UsageError(f'cannot write {out}: {folder} is not a folder')
    if not out.name or (out.exists() and not out.is_file()):
        raise UsageError(f'cannot write {out}: it is not a regular file')
    # Even replacing a file needs a writable folder: `new_file` first writes a file beside it.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f'cannot write {out}: no permission to write in {folder}')
    return out


def matching(pattern: str) -> list[Path]:
    """The paths that match a pattern (*, ?, [ab], ** for folders of any depth), sorted.

    A name that exists as it is written is taken as it is, and not as a pattern: `runs[1]/*.bin`
    finds the files in the folder `runs[1]`, if there is such a folder.
    """
    path = user_path(pattern)
    for i in range(len(path.parts), -1, -1):
        fixed = Path(*path.parts[:i])
        if i == len(path.parts) and os.path.lexists(fixed):
            return [path]
        if os.path.isdir(fixed):
            rest = os.path.join(*path.parts[i:])
            with foreign.parsing(pattern, 'a pattern'):
                names = glob.glob(rest, root_dir=fixed, recursive=True)
            return [fixed / name for name in sorted(names)]
    return []


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
    with (
        urllib.request.urlopen(source.url, timeout=TIMEOUT_SECONDS) as response,
        Progress('downloaded', source.n_bytes) as progress,
    ):
        while block := response.read(min(BLOCK_BYTES, source.n_bytes + 1 - n_bytes)):
            file.write(block)
            digest.update(block)
            n_bytes += len(block)
            if n_bytes > source.n_bytes:
                raise OSError(f'the server sent more than the expected {source.n_bytes:,} bytes')
            progress.add(len(block))
    print(f'downloaded {n_bytes / 1e6:.1f} MB', file=sys.stderr, flush=True)
    return digest.hexdigest()
