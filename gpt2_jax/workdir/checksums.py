"""TODO."""

import json
import re
from pathlib import Path

from gpt2_jax import files

CHECKSUMS = 'SHA256SUMS'


FOLDER = 'checkpoints'


METRICS = 'metrics'  # the item, and the file in it, that orbax writes where a save has metrics


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, sealed or not, in order."""
    return (
        sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        if folder.is_dir()
        else []
    )


def committed_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints whose save was finished, in order."""
    return [step for step in all_steps(folder) if (folder / str(step) / CHECKSUMS).is_file()]


def is_better(loss: float, best: float | None) -> bool:
    """Whether a validation loss makes its checkpoint the best; on a tie the later one, as Orbax does."""
    return best is None or loss <= best


def best_step(folder: Path) -> tuple[int, float] | tuple[None, None]:
    """The finished checkpoint of least validation loss, the later one of two equal ones, and that loss."""
    files = {step: folder / str(step) / METRICS / METRICS for step in committed_steps(folder)}
    losses = [
        (json.loads(file.read_text())['val_loss'], -step)
        for step, file in files.items()
        if file.is_file()
    ]
    loss, step = min(losses, default=(None, None))
    return (None, None) if step is None else (-step, loss)


def _checksum_lines(path: Path, item: str = '') -> dict[str, str]:
    """The line of SHA256SUMS for each file of a checkpoint (or of one item of it), by the file's path inside."""
    lines = {}
    for file in sorted(
        file for file in (path / item).rglob('*') if file.is_file() and file != path / CHECKSUMS
    ):
        name = str(file.relative_to(path))
        lines[name] = f'{files.sha256(file)}  {name}'
    return lines if item else lines | {'': ''}  # an empty last one: the file ends with a newline


def write_checksums(path: Path) -> None:
    files.write_text(path / CHECKSUMS, '\n'.join(_checksum_lines(path).values()))


def verify(path: Path, item: str = '') -> str | None:
    """What is wrong with the checkpoint at `path` (or one item of it), in words; None where each byte is as saved."""
    if not (path / CHECKSUMS).is_file():
        return 'its save was cut short'
    # Compared as whole lines, split at \n alone: no bit of the seal itself can change unseen.
    lines = (path / CHECKSUMS).read_bytes().decode('utf-8', 'replace').split('\n')
    wanted = {line[66:]: line for line in lines if line[66:].startswith(item)}
    found = _checksum_lines(path, item)
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    more = f' (nor are {len(wrong) - 1} more)' if wrong[1:] else ''
    return f'{wrong[0] or CHECKSUMS!r} is not as it was saved{more}' if wrong else None


def quarantine(folder: Path) -> list[str]:
    """Renames every checkpoint that is damaged or half-written to STEP.damaged; returns one line for each."""
    reports = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(r'(\d+)(\.orbax-checkpoint-tmp.*)?', path.name)
        problem = match and ('its save was cut short' if match[2] else verify(path))
        if problem:
            names = [f'{match[1]}.damaged'] + [f'{match[1]}.damaged.{i}' for i in range(2, 1000)]
            aside = next(folder / name for name in names if not (folder / name).exists())
            path.rename(aside)
            reports.append(f'checkpoint {match[1]} cannot be used: {problem}; renamed to {aside}')
    return reports
