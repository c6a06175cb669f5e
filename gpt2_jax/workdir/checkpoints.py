"""Checkpoints: saved in the background, read back, committed by checksums, restored.

A checkpoint is a folder `checkpoints/STEP` with the items `params`, `train` (step and optimizer
state), `meta` (JSON: configuration, tokenizer, and what the loop needs to resume) and, if the step
was evaluated, `metrics`. If the parameters are averaged, `params` is the average, which everything
but training uses, and `train` has the parameters themselves too. Orbax writes the folder and moves
it into place in one piece. Then everything is read back from disk, and SHA256SUMS commits the
checkpoint (checksums.py). The latest two checkpoints and the best one are kept, and more if
checkpoint.keep says so. A folder without SHA256SUMS, or one that does not match it, is never
restored.
"""

import concurrent.futures
import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt2_jax import files, foreign
from gpt2_jax.errors import UserError
from gpt2_jax.parallel import hosts
from gpt2_jax.parallel.partition import one_replica
from gpt2_jax.workdir import storage
from gpt2_jax.workdir.checksums import (
    CHECKSUMS,
    METRICS,
    add_checksum,
    all_steps,
    committed_steps,
    write_checksums,
)

# The keys of `meta` that every run and every conversion writes: a schema of foreign.py.
META = {
    'config': str,
    'tokenizer': str,
    'corpus': {'name': str, 'sha256': str, 'fallback': bool},
    'progress': {},
    'log_sizes': {str: foreign.integer(0)},
}

# Checkpoints on disk at a time: the latest two, the best, and the one being written.
AT_A_TIME = 4
# A failed save counts as removed once QUIET_LOOKS looks in a row, 0.05 s apart, find no part of it.
# The looks end after REMOVAL_SECONDS in any case.
QUIET_LOOKS, REMOVAL_SECONDS = 5, 10


class Checkpoints:
    """The checkpoints of a run while it trains: saved in the background, one at a time.

    Use as a context manager: leaving it waits until the last save is committed. `check_claim`
    raises UserError if the folder no longer belongs to this process: see folder.claim. `kept` says
    which checkpoints are kept beside the latest and the best.
    """

    def __init__(
        self,
        folder: Path,
        check_claim: Callable[[], None] = lambda: None,
        kept: storage.Kept = storage.LATEST,
    ):
        self.folder, self.kept = folder, kept
        self._check_claim = check_claim
        self._orbax = storage.open_manager(folder, read_only=False, kept=kept)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending = None  # (step, future) of the save in progress

    def __enter__(self):
        return self

    def __exit__(self, error_class, *_):
        if error_class and hosts.several():
            return  # the other processes may be gone: a save in progress may never end
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
        self._check_claim()
        items = array_items(state)
        if not hosts.several():
            # Of an array with replicas Orbax would save a part from each, and compile a program
            # for each part: the first save of the quickstart on two simulated devices would hold up
            # training for 3 s instead of 0.3 s (2 CPU cores).
            items = jax.tree.map(one_replica, items)
        with self._failures(step):
            if lack := self._lack_of_room(state):
                raise OSError(lack)
            saved = self._orbax.save(
                step,
                metrics=None if val_loss is None else {'val_loss': val_loss},
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    meta=ocp.args.JsonSave(meta),
                ),
            )
            if not saved:
                steps = all_steps(self.folder)
                raise OSError(f'a checkpoint of the same or a later step exists: {steps}')
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)
        self._pending = step, self._pool.submit(self._finish, step, shapes)

    def add_val_loss(self, step: int, val_loss: float) -> None:
        """Adds the validation loss to a checkpoint that was saved before its evaluation."""
        self._check_claim()
        if hosts.is_first():
            path = self.folder / str(step)
            (path / METRICS).mkdir(exist_ok=True)
            files.write_text(path / METRICS / METRICS, json.dumps({'val_loss': val_loss}))
            add_checksum(path, f'{METRICS}/{METRICS}')
        hosts.barrier(f'metrics of checkpoint {step}')
        self._orbax.reload()  # it compares the losses when it decides which checkpoints to keep

    def committed(self) -> list[int]:
        """The steps whose save was finished, in order."""
        return committed_steps(self.folder)

    def describe_kept(self, state, steps: int, every: int, eval_every: int) -> list[str]:
        """A line about how many checkpoints a run will keep and how large they are.

        If only the latest are kept, there is no line unless the disk is short of room for them.
        `state` may be abstract. All multiples of `every` are saved, and evaluated steps, multiples
        of `eval_every`, if they are the best so far.
        """
        size, free = state_bytes(state), shutil.disk_usage(self.folder).free
        both = math.lcm(every, eval_every)
        saved = steps // every + steps // eval_every - steps // both  # without step 0
        saved += steps % every > 0 and steps % eval_every > 0
        if self.kept.keep == 'latest':
            n = min(AT_A_TIME, saved) - len(self.committed())
            if not size <= free < n * size:  # without room for one, `check_room` says so
                return []
            return [
                f'little room: there will be {n} more checkpoints of '
                f'{size / 2**20:,.1f} MiB, and the disk has {free / 2**20:,.1f} MiB left'
            ]
        n = saved + 1
        if self.kept.keep == 'log':
            n = storage.count_log_spaced(steps, self.kept.every) + (not self.kept.includes(steps))
        return [
            f'checkpoints kept for good: up to {n:,} of {size / 2**20:,.1f} MiB, '
            f'{n * size / 2**30:,.2f} GiB; the disk has {free / 2**30:,.1f} GiB left'
        ]

    def check_room(self, state) -> None:
        """Raises UserError if the disk has no room for one checkpoint; `state` may be abstract.

        It is called before the first update: later, the updates until the first save would be lost.
        """
        if lack := self._lack_of_room(state):
            raise UserError(
                f'{self.folder} has no room for a checkpoint: {lack}. Make room, or choose another '
                '--workdir'
            )

    def check(self) -> None:
        """Raises UserError if the save in progress has failed already; waits for nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress, if any, is committed. Raises UserError if it failed."""
        if self._pending:
            (step, future), self._pending = self._pending, None
            with self._failures(step):
                future.result()

    def restore(self, step: int, abstract):
        """The state saved at `step`; `abstract` gives shape, dtype and sharding of each leaf.

        Raises UserError if the state is not the state after `step` updates.
        """
        return restore_state(self._orbax, step, abstract)

    def _lack_of_room(self, state) -> str:
        """What a checkpoint needs and the disk has, or '' if that is enough."""
        needed, free = state_bytes(state), shutil.disk_usage(self.folder).free
        if free >= needed:
            return ''
        return f'it takes {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB left'

    def _finish(self, step: int, shapes: dict[str, Any]) -> None:
        """Runs in the background: waits for Orbax, reads back, commits.

        In a run of several processes, the first reads back and commits what all have written.
        """
        self._orbax.wait_until_finished()
        if hosts.is_first():
            storage.read_back(self.folder / str(step), step, shapes)
            read_meta(self.folder / str(step))
            self._check_claim()
            write_checksums(self.folder / str(step))
        hosts.barrier(f'commit of checkpoint {step}')

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns any error of a save into a UserError."""
        try:
            with hosts.lost_processes():
                yield
        except hosts.LostProcess:
            raise
        except Exception as error:
            raise self._failed(step, error) from None

    def _failed(self, step: int, error: Exception) -> UserError:
        """Removes the unfinished save, since the disk may be full; returns the error to raise."""
        self._check_claim()  # in another run's folder nothing is removed
        if hosts.is_first():
            self._remove_unfinished(step)
        steps = ', '.join(map(str, committed_steps(self.folder)))
        left = f'the checkpoints of step {steps} are whole' if steps else 'there is none yet'
        text = ' '.join(str(error).split())
        # TensorStore puts the system's message at the end of a chain of paths.
        system = re.search(r'([^:]+) \[os_error', text)
        reason = system[1].strip() if system else text[:200]
        return UserError(
            f'checkpoint {step} could not be saved in {self.folder}: {reason}; {left}. '
            'Remove the cause, then run the same command to resume'
        )

    def _remove_unfinished(self, step: int) -> None:
        """Removes what a failed save has left, until no more of it appears.

        Orbax writes the items of a checkpoint on several threads and reports the first that fails.
        The other threads may still be writing, and would leave a folder behind.
        """
        quiet, deadline = 0, time.monotonic() + REMOVAL_SECONDS
        while quiet < QUIET_LOOKS and time.monotonic() < deadline:
            parts = [*self.folder.glob(f'{step}.orbax-checkpoint-tmp*'), self.folder / str(step)]
            parts = [part for part in parts if part.exists() and not (part / CHECKSUMS).is_file()]
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
            quiet = 0 if parts else quiet + 1
            time.sleep(0.05)


def state_bytes(state) -> int:
    """The bytes of the arrays in a checkpoint of this state, which may be abstract."""
    leaves = jax.tree.leaves(array_items(state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def array_items(state) -> dict[str, Any]:
    """What a checkpoint keeps of a TrainState, by item."""
    return {'params': state.evaluated, 'train': train_item(state)}


def train_item(state) -> dict[str, Any]:
    """What a checkpoint keeps of a TrainState for training alone."""
    item = {'step': state.step, 'opt_state': state.opt_state}
    return item if state.average is None else item | {'params': state.params}


def restore_state(manager: ocp.CheckpointManager, step: int, abstract):
    """The state saved at `step`: see Checkpoints.restore."""
    items = storage.restore_items(manager, step, **array_items(abstract))
    check_step(Path(manager.directory) / str(step), int(items.train['step']))
    name = 'params' if abstract.average is None else 'average'
    return abstract.replace(**{name: items.params}, **items.train).round_again()


def check_step(path: Path, step: int) -> None:
    """Raises UserError if the state in the checkpoint at `path` has another number of updates."""
    if step != int(path.name):
        raise UserError(
            f'{path} holds the state of step {step}: the folder was renamed. Rename it to {step}'
        )


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON saved beside the state of the checkpoint at `path`; see start.checkpoint_meta.

    Raises UserError if it has another form.
    """
    return foreign.read_json(path / 'meta' / 'metadata', META, 'it was not written by a run')
