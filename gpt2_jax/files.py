"""Published files: where a local copy is looked for, and how one is downloaded and verified. Nothing found is changed.

The files of NAME are looked for in `data/NAME` below the current folder, then in `$GPT2_JAX_DATA_DIR/NAME`, then in the
user's cache, `$XDG_CACHE_HOME/gpt2_jax/NAME` (~/.cache by default), and are downloaded into that cache.
"""

import dataclasses
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

TIMEOUT_SECONDS = 10  # without an answer; a slow download that keeps moving is never cut off


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a published file can be downloaded, and how to know it is that file."""

    url: str
    sha256: str
    n_bytes: int


def folders(name: str) -> list[Path]:
    """The local folders of NAME, in the order of search; the last one is in the user's cache."""
    parents = [
        Path('data'),
        Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'gpt2_jax'),
    ]
    if data_dir := os.environ.get('GPT2_JAX_DATA_DIR'):
        parents.insert(1, Path(data_dir).expanduser())
    return [parent / name for parent in parents]


def download(name: str, source: Source, path: Path) -> None:
    """Fetches a file, called `name` for people, to `path`, where it appears only whole and verified; else OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f'{path.stem}.', suffix='.part', dir=path.parent)
        try:
            with os.fdopen(descriptor, 'wb') as file:
                digest = _fetch(name, source, file)
                os.fsync(file.fileno())
            if digest != source.sha256:
                raise OSError(f'what arrived has SHA-256 {digest}, expected {source.sha256}')
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except http.client.HTTPException as error:
        raise OSError(f'{type(error).__name__}: {error}') from None


def _fetch(name: str, source: Source, file) -> str:
    """Copies the URL into an open file, with progress on stderr; returns the SHA-256 of what arrived."""
    print(
        f'downloading {name}, {source.n_bytes / 1e6:.1f} MB, from {source.url}',
        file=sys.stderr,
        flush=True,
    )
    digest, n_bytes = hashlib.sha256(), 0
    with urllib.request.urlopen(source.url, timeout=TIMEOUT_SECONDS) as response:
        while block := response.read(1 << 16):
            file.write(block)
            digest.update(block)
            n_bytes += len(block)
            if sys.stderr.isatty():
                print(
                    f'\r{n_bytes / 1e6:.1f} MB, {n_bytes / source.n_bytes:.0%} ',
                    end='',
                    file=sys.stderr,
                    flush=True,
                )
    print(f'\rdownloaded {n_bytes / 1e6:.1f} MB', file=sys.stderr, flush=True)
    return digest.hexdigest()
