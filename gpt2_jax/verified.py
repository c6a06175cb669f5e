"""Which large files were read and verified before, so that the next start need not read them.

As in git's index, a file counts as unchanged if its size, its inode and its times of modification
and of change are what they were before it was read. A bit that a disk loses later changes none of
them. The records are in `gpt2_jax/verified` in the user's cache (see files.py), one for each set of
files, with absolute paths. Without them, all is read again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2_jax import files, foreign
from gpt2_jax.errors import UserError

SCHEMA = {str: {'state': [int], 'sha256': foreign.SHA256}}  # by path
# A file may change twice within one tick of its disk's clock, and 2 s is the longest. The state of
# a file that changed a moment ago is not recorded.
SETTLED_NS = 2 * 10**9

State = list[int]


def states(paths: Sequence[str]) -> list[State]:
    """What changes if a file is replaced or written to; empty if that happened a moment ago."""
    now = time.time_ns()
    return [_state(path, now) for path in paths]


def _state(path: str, now: int) -> State:
    try:
        about = os.stat(path)
    except OSError:  # reading the file will say why
        return []
    times = [about.st_mtime_ns, about.st_ctime_ns]
    return [about.st_size, about.st_ino, *times] if max(times) < now - SETTLED_NS else []


def recall(paths: Sequence[str], now: Sequence[State], vocab_size: int) -> list[str | None]:
    """The SHA-256 of each file that was verified in the state it has now; else None."""
    try:
        record = foreign.read_json(_record(paths, vocab_size), SCHEMA)
    except UserError:  # there is none, or it is damaged
        return [None] * len(paths)
    return [
        record[path]['sha256'] if path in record and state == record[path]['state'] != [] else None
        for path, state in zip(paths, now, strict=True)
    ]


def remember(
    paths: Sequence[str],
    before: Sequence[State],
    sha256: Sequence[str | None],
    vocab_size: int,
) -> None:
    """Records the files with a SHA-256, and ids below `vocab_size`, and their states before that.

    Without a cache that can be written to, nothing is recorded.
    """
    path = _record(paths, vocab_size)
    rows = zip(paths, before, sha256, strict=True)
    record = {name: {'state': state, 'sha256': digest} for name, state, digest in rows if digest}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(record))


def _record(paths: Sequence[str], vocab_size: int) -> Path:
    identity = json.dumps([vocab_size, *paths])
    name = hashlib.sha256(identity.encode()).hexdigest()
    return files.local_folders('verified')[-1] / f'{name}.json'
