"""Checkpoints: save, verify, restore; the latest two and the best one are kept.

A checkpoint is a folder `checkpoints/STEP` with the items `params`, `train` (step and optimizer state), `meta` (JSON:
configuration, tokenizer, and what the loop needs to go on) and, where the step was evaluated, `metrics`. Orbax writes
it and moves it into place in one piece; after that, `SHA256SUMS` (checked by us, or by `sha256sum -c`) seals it. A
folder without a seal, or that does not match it, was cut short or damaged, and is never restored.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gpt2_jax import config as config_lib
from gpt2_jax.data import tokenizers
from gpt2_jax.errors import UserError
from gpt2_jax.model.gpt2 import GPT2, GPT2Config, init_params
from gpt2_jax.training.step import TrainState

SEAL = 'SHA256SUMS'
FOLDER = 'checkpoints'
METRICS = 'metrics'  # the item, and the file in it, that orbax writes where a save has metrics


def _val_loss(metrics) -> float:
    return metrics['val_loss']


def _manager(folder: Path, read_only: bool) -> ocp.CheckpointManager:
    keep = policies.AnyPreservationPolicy([
        # Two, so that one is left when the newest turns out to be damaged.
        policies.LatestN(2),
        # reverse: the lowest loss is the best.
        policies.BestN(get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)])
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(
        best_fn=_val_loss, best_mode='min', preservation_policy=keep, read_only=read_only))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, sealed or not, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def sealed_in(folder: Path) -> list[int]:
    """The steps of the checkpoints whose save was finished, in order."""
    return [step for step in steps_in(folder) if (folder / str(step) / SEAL).is_file()]


def best_in(folder: Path) -> tuple[int, float] | tuple[None, None]:
    """The finished checkpoint of least validation loss, the later one of two equal ones, and that loss."""
    files = {step: folder / str(step) / METRICS / METRICS for step in sealed_in(folder)}
    losses = [(json.loads(file.read_text())['val_loss'], -step) for step, file in files.items() if file.is_file()]
    loss, step = min(losses, default=(None, None))
    return (None, None) if step is None else (-step, loss)


def _seal_lines(path: Path, item: str = '') -> dict[str, str]:
    """The line of SHA256SUMS for each file of a checkpoint (or of one item of it), by the file's path inside."""
    lines = {}
    for file in sorted(file for file in (path / item).rglob('*') if file.is_file() and file != path / SEAL):
        name = str(file.relative_to(path))
        with open(file, 'rb') as opened:
            lines[name] = f'{hashlib.file_digest(opened, "sha256").hexdigest()}  {name}'
    return lines if item else lines | {'': ''}  # an empty last one: the file ends with a newline


def _write_seal(path: Path) -> None:
    part = path / (SEAL + '.part')
    part.write_text('\n'.join(_seal_lines(path).values()), encoding='utf-8')
    os.replace(part, path / SEAL)


def damage(path: Path, item: str = '') -> str | None:
    """What is wrong with the checkpoint at `path` (or one item of it), in words; None where each byte is as saved."""
    if not (path / SEAL).is_file():
        return 'its save was cut short'
    # Compared as whole lines, split at \n alone: no bit of the seal itself can change unseen.
    lines = (path / SEAL).read_bytes().decode('utf-8', 'replace').split('\n')
    wanted = {line[66:]: line for line in lines if line[66:].startswith(item)}
    found = _seal_lines(path, item)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    more = f' (nor are {len(wrong) - 1} more)' if wrong[1:] else ''
    return f'{wrong[0] or SEAL!r} is not as it was saved{more}' if wrong else None


def set_aside_damaged(folder: Path) -> list[str]:
    """Renames every checkpoint that is damaged or half-written to STEP.damaged; returns one line for each."""
    reports = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(r'(\d+)(\.orbax-checkpoint-tmp.*)?', path.name)
        problem = match and ('its save was cut short' if match[2] else damage(path))
        if problem:
            names = [f'{match[1]}.damaged'] + [f'{match[1]}.damaged.{i}' for i in range(2, 1000)]
            aside = next(folder / name for name in names if not (folder / name).exists())
            path.rename(aside)
            reports.append(f'checkpoint {match[1]} cannot be used: {problem}; renamed to {aside}')
    return reports


class Checkpoints:
    """The checkpoints of a running training: saved in the background, one at a time.

    Use as a context manager: leaving it waits until the last save is sealed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._orbax = _manager(folder, read_only=False)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            with contextlib.suppress(Exception):  # what failed has been reported; closing would raise it once more
                self._orbax.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts saving the state after `step` updates; returns once it may be overwritten.

        Raises UserError where it cannot be saved, or the save before it could not.
        """
        self.wait()
        try:
            free = shutil.disk_usage(self.folder).free
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if free < need:
                raise OSError(f'it takes {need / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB left')
            saved = self._orbax.save(
                step, metrics=None if val_loss is None else {'val_loss': val_loss},
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state}),
                    meta=ocp.args.JsonSave(meta)))
            if not saved:
                raise OSError(f'a checkpoint of a later step is in the way: {steps_in(self.folder)}')
        except Exception as error:
            raise self._failed(step, error) from None
        self._pending = step, self._pool.submit(self._finish, step)

    def check(self) -> None:
        """Raises UserError where the save under way has failed already; waits for nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def _finish(self, step: int) -> None:
        self._orbax.wait_until_finished()
        _write_seal(self.folder / str(step))

    def wait(self) -> None:
        """Returns when the save under way, if any, is sealed. Raises UserError where it failed."""
        if self._pending:
            (step, future), self._pending = self._pending, None
            try:
                future.result()
            except Exception as error:
                raise self._failed(step, error) from None

    def _failed(self, step: int, error: Exception) -> UserError:
        for part in [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*'), self.folder / str(step)]:
            if not (part / SEAL).is_file():  # of no use to anyone, and the disk may be full
                shutil.rmtree(part, ignore_errors=True)
        kept = ', '.join(map(str, sealed_in(self.folder)))
        said = ' '.join(str(error).split())
        reason = re.search(r'([^:]+) \[os_error', said)  # what the system said, at the end of a chain of paths
        return UserError(
            f'checkpoint {step} could not be saved in {self.folder}: {reason[1].strip() if reason else said[:300]}; '
            + (f'those of step {kept} are whole' if kept else 'there is none yet')
            + '. Put it right, then run the same command to go on')

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`; `abstract` gives shape, dtype and sharding of each leaf."""
        items = _restore(self._orbax, step, params=ocp.args.StandardRestore(abstract.params),
                         train=ocp.args.StandardRestore({'step': abstract.step, 'opt_state': abstract.opt_state}))
        return TrainState(items.train['step'], items.params, items.train['opt_state'])

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return _restore(self._orbax, step, meta=ocp.args.JsonRestore()).meta


def _restore(manager: ocp.CheckpointManager, step: int, **items):
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax has no error of its own for what does not fit
        raise UserError(f'checkpoint {step} in {manager.directory} is undamaged, but is not what this version saves: '
                        f'{" ".join(str(error).split())[:300]}') from None


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model as sampling and evaluation need it; `params` are numpy arrays."""

    step: int
    model: GPT2
    params: Any
    tokenizer: tokenizers.Tokenizer
    config: Any
    meta: dict[str, Any]


def load(run: Path, which: str) -> Restored:
    """The model of a run's folder: which='best', 'latest' or a step. Reads that folder alone, and changes nothing.

    Where no checkpoint was evaluated, the latest is the best. Without an NVIDIA GPU the kernels made for one are left
    for the open model. Raises UserError where there is no such checkpoint, or it is damaged.
    """
    folder = run / FOLDER
    sealed = sealed_in(folder)
    if not sealed:
        raise UserError(f'{run} holds no checkpoint: expected the folder of a run, with {FOLDER}/STEP inside; '
                        'train one with scripts/train.py --workdir=DIR')
    if which not in ('best', 'latest') and which not in map(str, sealed):
        raise UserError(f'{folder} has no checkpoint {which!r}: it has {", ".join(map(str, sealed))}; '
                        "or give 'best' or 'latest'")

    def check(step: int, item: str = '') -> None:
        if problem := damage(folder / str(step), item):
            others = ' or '.join(f'--which={other}' for other in sealed if other != step)
            raise UserError(f'checkpoint {folder / str(step)} cannot be used: {problem}; '
                            + (f'try {others}' if others else 'there is no other'))

    if which == 'best':
        for step in sealed:  # the choice rests on the figures of all
            check(step, METRICS)
    step = int(which) if which.isdigit() else (which == 'best' and best_in(folder)[0]) or sealed[-1]
    check(step)
    with _manager(folder, read_only=True) as manager:
        meta = _restore(manager, step, meta=ocp.args.JsonRestore()).meta
        config = config_lib.from_json(meta['config'])
        if jax.default_backend() != 'gpu':
            config.model.update(kernels='open', attention='explicit')
        tokenizer = tokenizers.from_json(meta['tokenizer'])
        model = GPT2(GPT2Config(**config.model, vocab_size=tokenizer.vocab_size))
        shapes = jax.eval_shape(lambda: init_params(model, 0))
        params = _restore(manager, step, params=ocp.args.StandardRestore(
            jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))).params
    return Restored(step, model, params, tokenizer, config, meta)
