"""Files of token ids, read when they are used. Large files are verified once, not at each start."""

import dataclasses
import functools
import hashlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpt2_jax import foreign, verified
from gpt2_jax.errors import UserError
from gpt2_jax.progress import Progress

BLOCK_TOKENS = 1 << 22  # read at once to verify a file
LARGE_BYTES = 1 << 30  # a data set of this size or more is verified once, and not at each start
MAX_OPEN = 64  # files of tokens that stay open; a data set may have thousands
RECORD_SECONDS = 30  # between records of what was verified in the background
CHANGED = 'restore it from a copy; the same command resumes'


class KeptFile:
    """A file for reading that stays open until nothing refers to it."""

    def __init__(self, path: str | os.PathLike):
        """Raises UserError if `path` is not a regular file."""
        file = foreign.open_file(path)
        weakref.finalize(self, file.close)
        self.descriptor = file.fileno()
        about = os.fstat(self.descriptor)
        self.n_bytes = about.st_size
        # What changes if the file is replaced, written to or cut short.
        self.version = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


@functools.lru_cache(MAX_OPEN)
def _keep_open(path: str, version: tuple[int, ...]) -> KeptFile:
    """The file in the version that was verified. The files used last stay open."""
    file = KeptFile(path)
    if file.version != version:
        raise foreign.error(path, 'changed while it was in use', CHANGED)
    return file


_damaged: dict[tuple, UserError] = {}  # (path, version) of files; found in the background


@dataclasses.dataclass(frozen=True, eq=False)
class IdsInFile:
    """`n` ids in a file, `offset` bytes from its beginning, read when they are used.

    They are read, not memory-mapped. If the file is cut short during a run, a read fails with one
    line, while a map would end the process with a bus error. `version` is that of the KeptFile.
    """

    path: str
    version: tuple[int, ...]
    dtype: np.dtype
    offset: int
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> 'IdsInFile':
        start, stop, _ = part.indices(self.n)
        offset = self.offset + start * self.dtype.itemsize
        return IdsInFile(self.path, self.version, self.dtype, offset, stop - start)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if failure := _damaged.get((self.path, self.version)):
            raise failure
        ids, file = np.empty(self.n, self.dtype), _keep_open(self.path, self.version)
        view, offset = ids.view(np.uint8), self.offset
        while len(view):
            try:
                n_bytes = os.preadv(file.descriptor, [view], offset)
            except OSError as failure:
                raise foreign.error(self.path, f'cannot be read: {failure.strerror}') from None
            if not n_bytes:
                raise foreign.error(self.path, 'was cut short while it was in use', CHANGED)
            view, offset = view[n_bytes:], offset + n_bytes
        return ids


def verify_ids(ids: IdsInFile, vocab_size: int, *, sha256: str | None, remedy: str) -> str:
    """Reads all of the file of `ids`; returns the SHA-256 of its bytes, in hex.

    Raises UserError if `sha256` is given and differs, or if an id is outside the vocabulary.
    """
    path, outside = ids.path, None
    header = dataclasses.replace(ids, dtype=np.dtype(np.uint8), offset=0, n=ids.offset)
    digest = hashlib.sha256(np.asarray(header))
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = np.asarray(ids[start : start + BLOCK_TOKENS])
        digest.update(block)
        if outside is None and block.max() >= vocab_size:
            at = int((block >= vocab_size).argmax())
            problem = (
                f'holds token {block[at]} at position {start + at}, outside the vocabulary '
                f'[0, {vocab_size})'
            )
            outside = foreign.error(path, problem, remedy)
            if sha256 is None:
                break
    found = digest.hexdigest()
    if sha256 is not None and found != sha256:
        problem = f'is damaged: its SHA-256 is {found[:12]}.., the manifest says {sha256[:12]}..'
        raise foreign.error(path, problem, remedy)
    if outside:
        raise outside
    return found


def verify_files(
    shards: Sequence[IdsInFile],
    vocab_size: int,
    *,
    remedy: str,
    sha256: Sequence[str] | None = None,
) -> list[str]:
    """Verifies the files of a data set side by side, as verify_ids does; returns their SHA-256.

    The files of a data set of LARGE_BYTES or more are read once: a file that verified.py knows, in
    the state that it has now, is not read again. If LARGE_BYTES or more are left to read, and
    `sha256` are given, this returns at once, and the files are read in the background. Then
    reading a file that was found damaged raises the UserError.
    """
    paths = [os.path.abspath(ids.path) for ids in shards]
    sizes = [len(ids) * ids.dtype.itemsize for ids in shards]
    wanted, known, states = sha256 or [None] * len(shards), [None] * len(shards), []
    if is_large := sum(sizes) >= LARGE_BYTES:
        states = verified.states(paths)
        known = verified.recall(paths, states, vocab_size)
        pairs = zip(known, wanted, strict=True)
        known = [digest if want in (None, digest) else None for digest, want in pairs]

    def verify(i: int) -> str:
        return known[i] or verify_ids(shards[i], vocab_size, sha256=wanted[i], remedy=remedy)

    def record() -> None:
        verified.remember(paths, states, known, vocab_size)

    def verify_in_background() -> None:
        """Fills in `known`, one file after the other, and records it now and then."""
        recorded = time.monotonic()
        for i, ids in enumerate(shards):
            try:
                known[i] = verify(i)
            except UserError as failure:
                _damaged[ids.path, ids.version] = failure
            if i == len(shards) - 1 or time.monotonic() - recorded > RECORD_SECONDS:
                record()
                recorded = time.monotonic()

    left = sum(size for size, digest in zip(sizes, known, strict=True) if not digest)
    if sha256 and left >= LARGE_BYTES:
        print(
            f'verifying {left / 1e9:,.1f} GB of tokens in the background, once: if a file is '
            'damaged, the run stops',
            file=sys.stderr,
        )
        remedy += ', and train again from a checkpoint of before the first start with this file'
        threading.Thread(target=verify_in_background, name='verify', daemon=True).start()
        return list(sha256)
    with (
        Progress('verified', sum(sizes)) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # hashing runs outside the interpreter lock
    ):
        for i, digest in enumerate(pool.map(verify, range(len(shards)))):
            known[i] = digest
            progress.add(sizes[i])
    if is_large and left:
        record()
    return known
