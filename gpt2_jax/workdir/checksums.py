"""Which checkpoints of a run are whole: SHA256SUMS of each, and what to do about a damaged one.

A checkpoint counts as saved once its folder holds SHA256SUMS, which `sha256sum -c` reads too. The
first line has the step and the SHA-256 of the lines below it. Each of these has the SHA-256 and the
path of a file. Other files in the folder (.DS_Store, ..) do no harm.
"""

import hashlib
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gpt2_jax import files, foreign
from gpt2_jax.errors import UserError

FOLDER = 'checkpoints'  # inside a run's folder
CHECKSUMS = 'SHA256SUMS'
METRICS = 'metrics'  # Orbax's item, and the file in it, of a checkpoint saved with metrics

MAX_BYTES = 1 << 26  # of SHA256SUMS; a real one has kilobytes
STEP_NAME = r'0|[1-9][0-9]{0,15}'  # the name of a checkpoint's folder
CUT_SHORT = 'its save was cut short'


class Sums(NamedTuple):
    """The content of SHA256SUMS: {path inside: SHA-256}. Older versions did not write the step."""

    step: int | None
    files: dict[str, str]


def all_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, committed or not, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(STEP_NAME, path.name))


def committed_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints whose save was finished, in order."""
    return [step for step in all_steps(folder) if (folder / str(step) / CHECKSUMS).is_file()]


def is_better(loss: float, best: float | None) -> bool:
    """Whether a validation loss makes its checkpoint the best. A tie does, as in Orbax."""
    return best is None or loss <= best


def best_step(folder: Path) -> tuple[int, float] | tuple[None, None]:
    """The committed checkpoint with the lowest validation loss, and this loss.

    On a tie, the later step. (None, None) if no checkpoint was evaluated. Raises UserError for
    metrics that cannot be read.
    """
    best, best_loss = None, None
    for step in committed_steps(folder):
        loss = _val_loss(folder / str(step))
        if loss is not None and is_better(loss, best_loss):
            best, best_loss = step, loss
    return best, best_loss


def write_checksums(path: Path) -> None:
    """Commits the checkpoint at `path`: writes SHA256SUMS over all of its files, in one piece."""
    names = [
        file.relative_to(path).as_posix()
        for file in sorted(path.rglob('*'))
        if file.is_file() and file != path / CHECKSUMS
    ]
    _write(path, {name: files.sha256(path / name) for name in names})


def add_checksum(path: Path, name: str) -> None:
    """Adds a file to SHA256SUMS of the checkpoint at `path`, whose other sums stay as they are."""
    _write(path, read_checksums(path).files | {name: files.sha256(path / name)})


def read_checksums(path: Path) -> Sums | None:
    """SHA256SUMS of the checkpoint at `path`; None if it is damaged."""
    if (path / CHECKSUMS).stat().st_size > MAX_BYTES:
        return None
    return parse_checksums((path / CHECKSUMS).read_bytes())


def parse_checksums(data: bytes) -> Sums | None:
    """The content of a file SHA256SUMS; None if it is damaged."""
    step, text = None, data.decode('utf-8', 'replace')
    if match := re.match(rf'# checkpoint of step ({STEP_NAME});.*\n', text):
        step, text = int(match[1]), text[match.end() :]
        if match[0] != _header(step, text):
            return None
    sums = {}
    for line in re.findall(r'[^\n]*\n|[^\n]+\Z', text):
        parts = re.fullmatch(r'([0-9a-f]{64})  ([^\n]+)\n', line)
        # A name that leaves the folder is never followed.
        if not parts or {'..', '/'} & set(PurePosixPath(parts[2]).parts):
            return None
        sums[parts[2]] = parts[1]
    return Sums(step, sums) if sums else None


def verify(path: Path, item: str = '') -> str | None:
    """What is wrong with the checkpoint at `path`, in words; None if each byte is as it was saved.

    With `item` only the files of this item are read. Files that were added are not looked at.
    """
    if not (path / CHECKSUMS).is_file():
        return CUT_SHORT
    sums = read_checksums(path)
    if sums is None:
        return f'{CHECKSUMS!r} is not as it was saved'
    if sums.step not in (None, int(path.name)):
        return f'it is the checkpoint of step {sums.step} under another name'
    wrong = [
        problem
        for name, digest in sums.files.items()
        if name.startswith(item) and (problem := _compare(path / name, name, digest))
    ]
    if not wrong:
        return None
    return wrong[0] + (f' ({len(wrong) - 1} more files are damaged)' if wrong[1:] else '')


def quarantine(folder: Path) -> list[str]:
    """Renames each damaged or unfinished checkpoint to STEP.damaged; returns one line for each.

    A whole checkpoint under the name of another step gets its own name back. Raises UserError, and
    renames nothing, if checkpoints were saved and none is left that can be used, or if `folder` is
    a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is not a folder, and checkpoints could not be saved: remove it')
    bad, usable = {}, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := re.fullmatch(rf'({STEP_NAME})(\.orbax-checkpoint-tmp.*)?', path.name):
            if problem := CUT_SHORT if match[2] else verify(path):
                bad[path] = problem
            else:
                usable.append(path)
    # Only one save at a time can be cut short: if several folders lack SHA256SUMS, some were whole.
    uncommitted = [path for path in bad if path.name.isdigit() and not (path / CHECKSUMS).is_file()]
    lost = [path for path, problem in bad.items() if problem != CUT_SHORT or len(uncommitted) > 1]
    if lost and not usable and not any(map(_own_name, bad)):
        problems = '; '.join(f'{path.name}: {bad[path]}' for path in lost)
        raise UserError(
            f'every checkpoint in {folder} is damaged ({problems}): nothing was changed. Copy one '
            'back from a backup, or start from step 0 with --fresh or another --workdir'
        )
    reports = []
    for path, problem in bad.items():
        own_name = _own_name(path)
        name = own_name or _unused_name(folder / f'{_step(path)}.damaged')
        path.rename(name)
        verb = 'gets its name back' if own_name else 'cannot be used'
        reports.append(f'checkpoint {_step(path)} {verb}: {problem}; renamed to {name}')
    return reports


def _write(path: Path, digests: dict[str, str]) -> None:
    text = ''.join(f'{digest}  {name}\n' for name, digest in digests.items())
    files.write_text(path / CHECKSUMS, _header(int(path.name), text) + text)


def _header(step: int, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'# checkpoint of step {step}; SHA-256 of the lines below: {digest}\n'


def _compare(file: Path, name: str, digest: str) -> str | None:
    """What is wrong with one file, in words."""
    try:
        # A pipe would be waited for, a link could lead anywhere.
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return f'{name!r} is not a regular file'
        return None if files.sha256(file) == digest else f'{name!r} is not as it was saved'
    except FileNotFoundError:
        return f'{name!r} is missing'
    except OSError as error:
        return f'{name!r} cannot be read: {error.strerror or error}'


def _step(path: Path) -> int:
    return int(path.name.partition('.')[0])


def _own_name(path: Path) -> Path | None:
    """The free name of a whole checkpoint that was renamed to another step; None for all others."""
    if not path.name.isdigit() or not (path / CHECKSUMS).is_file():
        return None
    sums = read_checksums(path)
    if sums is None or sums.step in (None, int(path.name)):
        return None
    whole = not any(_compare(path / name, name, sha) for name, sha in sums.files.items())
    name = path.with_name(str(sums.step))
    return name if whole and not name.exists() else None


def _unused_name(path: Path) -> Path:
    """`path`, or `path` with .2, .3, .. at its end if it exists."""
    number, name = 1, path
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f'{path.name}.{number}')
    return name


def _val_loss(path: Path) -> float | None:
    """The validation loss of a committed checkpoint; None if it was saved without one."""
    name = f'{METRICS}/{METRICS}'
    sums = read_checksums(path)
    if sums is None or name not in sums.files:
        return None
    remedy = 'choose a checkpoint by --step=NUMBER, or move this one away'
    return foreign.read_json(path / name, {'val_loss': foreign.NUMBER}, remedy)['val_loss']
