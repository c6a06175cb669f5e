"""Checkpoints: saved in the background, committed by checksums, restored.

A checkpoint is a folder `checkpoints/STEP` with the items `params`, `train` (step and optimizer
state), `meta` (JSON: configuration, tokenizer, and what the loop needs to resume) and, if the step
was evaluated, `metrics`. Orbax writes the folder and moves it into place in one piece. After this,
SHA256SUMS commits it (checksums.py). The latest two checkpoints and the best one are kept, and more
if checkpoint.keep says so. A folder without SHA256SUMS, or one that does not match it, is never
restored.
"""

import concurrent.futures
import contextlib
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gpt2_jax.errors import UserError
from gpt2_jax.workdir.checksums import CHECKSUMS, all_steps, committed_steps, write_checksums


def _val_loss(metrics) -> float:
    return metrics['val_loss']


def is_log_spaced(step: int, every: int) -> bool:
    """Whether `step` is one of 0, 1, 2, 4, .. 512, or a later multiple of `every`."""
    return step & (step - 1) == 0 if step <= 512 else step % every == 0


class Kept(policies.PreservationPolicy):
    """Keeps the checkpoints that checkpoint.keep names, beside the latest and the best."""

    def __init__(self, keep: str, every: int):
        self.keep, self.every = keep, every

    def includes(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept for good."""
        return self.keep == 'all' or (self.keep == 'log' and is_log_spaced(step, self.every))

    def should_preserve(self, checkpoints, *, context):
        """Orbax's question, for all checkpoints at once."""
        return [self.includes(checkpoint.step) for checkpoint in checkpoints]


def open_manager(folder: Path, read_only: bool, kept: Kept | None = None) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in a folder; use it as a context manager."""
    keep = policies.AnyPreservationPolicy(
        [
            kept or Kept('latest', 1),
            # Two, so that one is left if the newest turns out to be damaged.
            policies.LatestN(2),
            # reverse=True: the lowest loss is the best.
            policies.BestN(
                get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=_val_loss, best_mode='min', preservation_policy=keep, read_only=read_only
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


class Checkpoints:
    """The checkpoints of a running training: saved in the background, one at a time.

    Use as a context manager: leaving it waits until the last save is committed.
    """

    def __init__(self, folder: Path, keep: str = 'latest', keep_every: int = 1):
        self.folder, self.kept = folder, Kept(keep, keep_every)
        self._orbax = open_manager(folder, read_only=False, kept=self.kept)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending = None  # (step, future) of the save in progress

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            # A failed save was reported already; Orbax would raise its error a second time here.
            with contextlib.suppress(Exception):
                self._orbax.close()

    def save(self, step: int, state, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts to save the state after `step` updates; returns once the state may be overwritten.

        Raises UserError if it cannot be saved, or if the save before it failed.
        """
        self.wait()
        try:
            self._check_free_space(state)
            saved = self._orbax.save(
                step,
                metrics=None if val_loss is None else {'val_loss': val_loss},
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state}),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
            if not saved:
                steps = all_steps(self.folder)
                raise OSError(f'a checkpoint of the same or a later step exists: {steps}')
        except Exception as error:
            raise self._failed(step, error) from None
        self._pending = step, self._pool.submit(self._finish, step)

    def committed(self) -> list[int]:
        """The steps whose save was finished, in order."""
        return committed_steps(self.folder)

    def describe(self, state, steps: int, every: int, eval_every: int) -> str | None:
        """How many checkpoints a run will keep and how large they are; None if only the latest.

        `state` may be abstract. Every `every` steps are saved, and the best evaluations.
        """
        if self.kept.keep == 'latest':
            return None
        if self.kept.keep == 'all':
            saved = {step for n in (every, eval_every) for step in range(0, steps + 1, n)}
        else:
            saved = set(filter(self.kept.includes, range(steps + 1)))
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        n, free = len(saved | {steps}), shutil.disk_usage(self.folder).free
        return (
            f'checkpoints kept for good: up to {n:,} of {size / 2**20:,.1f} MiB, '
            f'{n * size / 2**30:,.2f} GiB; the disk has {free / 2**30:,.1f} GiB left'
        )

    def check(self) -> None:
        """Raises UserError if the save in progress has failed already; waits for nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress, if any, is committed. Raises UserError if it failed."""
        if self._pending:
            (step, future), self._pending = self._pending, None
            try:
                future.result()
            except Exception as error:
                raise self._failed(step, error) from None

    def restore(self, step: int, abstract):
        """The state saved at `step`; `abstract` gives shape, dtype and sharding of each leaf."""
        return restore_state(self._orbax, step, abstract)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON that was saved beside the state."""
        return restore_items(self._orbax, step, meta=ocp.args.JsonRestore()).meta

    def _check_free_space(self, state) -> None:
        free = shutil.disk_usage(self.folder).free
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if free < needed:
            raise OSError(
                f'it takes {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB left'
            )

    def _finish(self, step: int) -> None:
        self._orbax.wait_until_finished()
        write_checksums(self.folder / str(step))

    def _failed(self, step: int, error: Exception) -> UserError:
        """Removes the unfinished save, since the disk may be full; returns the error to raise."""
        for part in [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*'), self.folder / str(step)]:
            if not (part / CHECKSUMS).is_file():
                shutil.rmtree(part, ignore_errors=True)
        steps = ', '.join(map(str, committed_steps(self.folder)))
        left = f'the checkpoints of step {steps} are whole' if steps else 'there is none yet'
        text = ' '.join(str(error).split())
        # TensorStore puts the system's message at the end of a chain of paths.
        system = re.search(r'([^:]+) \[os_error', text)
        reason = system[1].strip() if system else text[:300]
        return UserError(
            f'checkpoint {step} could not be saved in {self.folder}: {reason}; {left}. '
            'Remove the cause, then run the same command to resume'
        )


def restore_state(manager: ocp.CheckpointManager, step: int, abstract):
    """The state saved at `step`: see Checkpoints.restore."""
    train = {'step': abstract.step, 'opt_state': abstract.opt_state}
    items = restore_items(
        manager,
        step,
        params=ocp.args.StandardRestore(abstract.params),
        train=ocp.args.StandardRestore(train),
    )
    return abstract.replace(params=items.params, **items.train)


def restore_items(manager: ocp.CheckpointManager, step: int, **items):
    """The named items of a checkpoint. Raises UserError if they are not what this version saves."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax has no error class of its own
        reason = ' '.join(str(error).split())[:300]
        raise UserError(
            f'checkpoint {step} in {manager.directory} is undamaged, but this version of gpt2_jax '
            f'saves another form: {reason}'
        ) from None
