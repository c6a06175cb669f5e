"""Which checkpoints of a run are whole: SHA256SUMS of each, and what to do about a damaged one.

A checkpoint counts as saved once its folder holds SHA256SUMS, which `sha256sum -c` reads too.
"""

import json
import re
from pathlib import Path

from gpt2_jax import files

FOLDER = 'checkpoints'  # inside a run's folder
CHECKSUMS = 'SHA256SUMS'
METRICS = 'metrics'  # Orbax's item, and the file in it, of a checkpoint saved with metrics

CUT_SHORT = 'its save was cut short'


def all_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, committed or not, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def committed_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints whose save was finished, in order."""
    return [step for step in all_steps(folder) if (folder / str(step) / CHECKSUMS).is_file()]


def is_better(loss: float, best: float | None) -> bool:
    """Whether a validation loss makes its checkpoint the best. A tie does, as in Orbax."""
    return best is None or loss <= best


def best_step(folder: Path) -> tuple[int, float] | tuple[None, None]:
    """The committed checkpoint with the lowest validation loss, and this loss.

    On a tie, the later step. (None, None) if no checkpoint was evaluated.
    """
    files = {step: folder / str(step) / METRICS / METRICS for step in committed_steps(folder)}
    losses = [
        (json.loads(file.read_text())['val_loss'], -step)
        for step, file in files.items()
        if file.is_file()
    ]
    loss, step = min(losses, default=(None, None))
    return (None, None) if step is None else (-step, loss)


def write_checksums(path: Path) -> None:
    """Commits the checkpoint at `path`: writes SHA256SUMS over all of its files, in one piece."""
    files.write_text(path / CHECKSUMS, '\n'.join([*_checksum_lines(path).values(), '']))


def verify(path: Path, item: str = '') -> str | None:
    """What is wrong with the checkpoint at `path`, in words; None if each byte is as it was saved.

    With `item` only the files whose path inside begins with it are read.
    """
    if not (path / CHECKSUMS).is_file():
        return CUT_SHORT
    # Whole lines, split at \n alone, are compared: a changed bit of SHA256SUMS itself shows too.
    lines = (path / CHECKSUMS).read_bytes().decode('utf-8', 'replace').split('\n')
    wanted = {line[66:]: line for line in lines if line[66:].startswith(item)}
    found = _checksum_lines(path, item)
    if not item:
        found[''] = ''  # after the last newline
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if not wrong:
        return None
    more = f' (nor are {len(wrong) - 1} more)' if wrong[1:] else ''
    return f'{wrong[0] or CHECKSUMS!r} is not as it was saved{more}'


def quarantine(folder: Path) -> list[str]:
    """Renames each damaged or unfinished checkpoint to STEP.damaged; returns one line for each."""
    reports = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(r'(\d+)(\.orbax-checkpoint-tmp.*)?', path.name)
        problem = match and (CUT_SHORT if match[2] else verify(path))
        if problem:
            aside = _unused_name(folder, f'{match[1]}.damaged')
            path.rename(aside)
            reports.append(f'checkpoint {match[1]} cannot be used: {problem}; renamed to {aside}')
    return reports


def _unused_name(folder: Path, name: str) -> Path:
    """`name`, or `name`.2, .3, .. if files of this name exist."""
    number, path = 1, folder / name
    while path.exists():
        number += 1
        path = folder / f'{name}.{number}'
    return path


def _checksum_lines(path: Path, item: str = '') -> dict[str, str]:
    """{path inside: line of SHA256SUMS} for the files of a checkpoint, or of one item of it."""
    lines = {}
    for file in sorted((path / item).rglob('*')):
        if file.is_file() and file != path / CHECKSUMS:
            name = str(file.relative_to(path))
            lines[name] = f'{files.sha256(file)}  {name}'
    return lines
