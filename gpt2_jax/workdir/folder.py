"""A run's folder: one process at a time, files that are whole or not there, logs that end where the run stands."""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.errors import UserError

# Grow while a run trains; what they hold past the step a run goes on from is cut off.
LOGS = ('metrics.jsonl', 'samples.txt', 'tensorboard/*')


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; the hold ends with the process, however that ends.

    Raises UserError where another process holds it, where it holds the logs of something else, and where it cannot be
    written, also later on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / '.lock', 'a+') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise UserError(
                    f'another run is using {folder} (process {lock.read().strip() or "unknown"}): wait for '
                    'it, stop it, or choose another --workdir'
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            logs = sorted(log_sizes(folder))
            if logs and not is_run(folder):
                raise UserError(
                    f'{folder} is not the folder of a run, but has {logs[0]}, which a run would overwrite: '
                    'choose another --workdir'
                )
            yield
    except BrokenPipeError:  # no matter of this folder
        raise
    except OSError as error:
        raise UserError(
            f'the run cannot write {error.filename or folder}: {error.strerror or error}; put it right and '
            'the same command goes on from the last checkpoint, or choose another --workdir'
        ) from None


def is_run(folder: Path) -> bool:
    """Whether a run began in this folder."""
    return (folder / 'config.json').exists() or (folder / 'checkpoints').exists()


def move_aside(folder: Path) -> Path | None:
    """Renames a run's folder so that a fresh one can take its name; returns where it went, None if there was none.

    Raises UserError as `claim` does.
    """
    if not is_run(folder):
        return None
    folder = folder.resolve()  # '.' has no name that could be changed
    with claim(folder):
        aside = folder.with_name(f'{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S-%f}')
        folder.rename(aside)
    return aside


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each log file, to be kept with a checkpoint; see `cut_back`."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for pattern in LOGS
        for path in folder.glob(pattern)
        if path.is_file()
    }


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Puts the logs back to what they were at a checkpoint, so that every step gets one record."""
    for name, size in log_sizes(folder).items():
        if name not in sizes:
            (folder / name).unlink()
        elif size > sizes[name]:
            os.truncate(folder / name, sizes[name])
