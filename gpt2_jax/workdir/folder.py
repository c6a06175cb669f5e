"""A run's folder: locked by one process, with whole files and logs that end at a checkpoint."""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.errors import UserError

# They grow while a run trains. A resumed run cuts them back to its first step.
LOGS = ('metrics.jsonl', 'samples.txt', 'tensorboard/*')


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it for this process; the lock ends with the process in any case.

    Raises UserError if another process has locked the folder, if it holds logs that are not a
    run's, or if it cannot be written, also later on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / '.lock', 'a+') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                process = lock.read().strip() or 'unknown'
                raise UserError(
                    f'another run is using {folder} (process {process}): wait for it, stop it, or '
                    'choose another --workdir'
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            logs = sorted(log_sizes(folder))
            if logs and not is_run(folder):
                raise UserError(
                    f'{folder} is not the folder of a run, but has {logs[0]}, which a run would '
                    'overwrite: choose another --workdir'
                )
            yield
    except BrokenPipeError:  # of the standard output: it says nothing about the folder
        raise
    except OSError as error:
        raise UserError(
            f'the run cannot write {error.filename or folder}: {error.strerror or error}; remove '
            'the cause and run the same command to resume, or choose another --workdir'
        ) from None


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
        if path.is_file()
    }


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Truncates the logs to their sizes at a checkpoint, so that every step gets one record."""
    for name, size in log_sizes(folder).items():
        if name not in sizes:
            (folder / name).unlink()
        elif size > sizes[name]:
            os.truncate(folder / name, sizes[name])
