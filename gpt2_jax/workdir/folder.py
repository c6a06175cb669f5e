"""A run's folder: locked by one process, with whole files and logs that end at a checkpoint."""

import contextlib
import datetime
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2_jax import files
from gpt2_jax.errors import UsageError, UserError

# They grow while a run trains. A resumed run cuts them back to its first step.
LOGS = ('metrics.jsonl', 'samples.txt', 'tensorboard/events.out.tfevents.*')

REMOTE = ('gs', 's3', 'az', 'hf')  # first parts of paths that etils takes for remote storage


def check_path(folder: Path) -> None:
    """Raises UsageError if checkpoints in this folder could not be read back.

    TensorStore takes a path as UTF-8 and a backslash as a separator, and Orbax takes some names at
    the root for remote storage.
    """
    path = folder.absolute()
    problem = None
    if not _is_utf8(path):
        problem = 'its name, or the locale of this terminal, is not UTF-8 (LC_ALL=C.UTF-8 is)'
    elif '\\' in str(path):
        problem = 'its name has a backslash'
    elif path.parts[1:] and path.parts[1] in REMOTE:
        problem = f'the checkpoint library takes /{path.parts[1]} for remote storage'
    if problem:
        raise UsageError(
            f'checkpoints in {folder} could not be read back: {problem}; choose another folder'
        )


def _is_utf8(path: Path) -> bool:
    """Whether the file system has the path in UTF-8."""
    try:
        return os.fsencode(path) == str(path).encode('utf-8')
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Callable[[], None]]:
    """Makes the folder and locks it for this process; the lock ends with the process in any case.

    Yields check(), which raises UserError if the folder was moved or replaced since. Raises
    UserError if another process has locked the folder, if it holds logs that are not a run's, or if
    it cannot be written, now or while it is claimed.
    """
    check_path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f'{folder} is a file: expected the folder of a run, or a new one')
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # the target of a link may be missing
        with _lock(folder) as lock:
            logs = sorted(log_sizes(folder))
            if logs and not is_run(folder):
                raise UserError(
                    f'{folder} is not the folder of a run, but has {logs[0]}, which a run would '
                    'overwrite: choose another --workdir'
                )

            def check() -> None:
                if not _is_at(lock, folder / '.lock'):
                    raise UserError(
                        f'{folder} was moved, or its file .lock was removed, while this run was '
                        'writing to it: the run stops. Its checkpoints are in the folder that was '
                        'moved; resume there with --workdir'
                    )

            yield check
    except BrokenPipeError:  # of the standard output: it says nothing about the folder
        raise
    except OSError as error:
        raise UserError(
            f'the run cannot write {error.filename or folder}: {error.strerror or error}; remove '
            'the cause and run the same command to resume, or choose another --workdir'
        ) from None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """The locked file descriptor of `.lock`. Raises UserError if another process has locked it."""
    path = folder / '.lock'
    while True:
        # O_NOFOLLOW: a symbolic link would have its target overwritten.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise UserError(f'{path} is not a regular file: remove it')
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f'another run is using {folder} (process {owner(folder)}): wait for it, stop '
                    'it, or choose another --workdir'
                ) from None
            # Between open and flock, --fresh may have moved the folder with this file.
            if not _is_at(lock, path):
                continue
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield lock
            return
        finally:
            os.close(lock)


def owner(folder: Path) -> str:
    """The id of the process that claimed the folder last; 'unknown' if none did."""
    with contextlib.suppress(OSError), open(folder / '.lock', 'rb') as lock:
        return lock.read(20).decode('ascii', 'replace').strip() or 'unknown'
    return 'unknown'


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def is_run(folder: Path) -> bool:
    """Whether a run began in this folder."""
    return (folder / 'config.json').exists() or (folder / 'checkpoints').exists()


def move_aside(folder: Path) -> Path | None:
    """Renames a run's folder so that a fresh run can take its name; returns the new path.

    Returns None if the folder holds no run. Raises UserError as `claim` does.
    """
    if not is_run(folder):
        return None
    folder = folder.resolve()  # '.' has no name to change
    with claim(folder):
        aside = folder.with_name(f'{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S-%f}')
        folder.rename(aside)
    return aside


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each log file, to be saved with a checkpoint: see `cut_back`."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for pattern in LOGS
        for path in folder.glob(pattern)
        if path.is_file() and not path.is_symlink()
    }


def cut_back(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Truncates the logs to their sizes at a checkpoint, so that every step gets one record.

    Returns one line for each log that has lost records since. A link or a pipe in the place of a
    log is removed, because records would be written to its target. A log with hard links, as
    `cp -al` and many backups make them, becomes a separate file.
    """
    now, reports = log_sizes(folder), []
    for path in (path for pattern in LOGS for path in folder.glob(pattern)):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            path.unlink()
        elif path.is_file() and path.stat().st_nlink > 1:
            with open(path, 'rb') as shared, files.new_file(path) as own:
                shutil.copyfileobj(shared, own)
    for name, size in now.items():
        if name not in sizes:
            (folder / name).unlink()
        elif size > sizes[name]:
            os.truncate(folder / name, sizes[name])
    for name, size in sizes.items():
        if name not in now:
            reports.append(f'{folder / name} is missing: its records up to the checkpoint are lost')
        elif now[name] < size:
            reports.append(
                f'{folder / name} was cut short: {size - now[name]:,} of the {size:,} bytes up to '
                'the checkpoint are lost'
            )
            if name.endswith('.jsonl'):
                _drop_partial_line(folder / name)
    return reports


def _drop_partial_line(path: Path) -> None:
    """Truncates a file to its last newline, so that the next record begins on its own line."""
    os.truncate(path, path.read_bytes().rfind(b'\n') + 1)
