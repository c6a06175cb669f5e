"""Checkpoints: save, verify, restore; the latest two and the best one are kept.

A checkpoint is a folder `checkpoints/STEP` with the items `params`, `train` (step and optimizer state), `meta` (JSON:
configuration, tokenizer, and what the loop needs to go on) and, where the step was evaluated, `metrics`. Orbax writes
it and moves it into place in one piece; after that, `SHA256SUMS` (checked by us, or by `sha256sum -c`) seals it. A
folder without a seal, or that does not match it, was cut short or damaged, and is never restored.
"""

import concurrent.futures
import contextlib
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


def open_manager(folder: Path, read_only: bool) -> ocp.CheckpointManager:
    keep = policies.AnyPreservationPolicy(
        [
            # Two, so that one is left when the newest turns out to be damaged.
            policies.LatestN(2),
            # reverse: the lowest loss is the best.
            policies.BestN(
                get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            best_fn=_val_loss, best_mode='min', preservation_policy=keep, read_only=read_only
        ),
    )


class Checkpoints:
    """The checkpoints of a running training: saved in the background, one at a time.

    Use as a context manager: leaving it waits until the last save is sealed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._orbax = open_manager(folder, read_only=False)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            with contextlib.suppress(
                Exception
            ):  # what failed has been reported; closing would raise it once more
                self._orbax.close()

    def save(self, step: int, state, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts saving the state after `step` updates; returns once it may be overwritten.

        Raises UserError where it cannot be saved, or the save before it could not.
        """
        self.wait()
        try:
            free = shutil.disk_usage(self.folder).free
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if free < need:
                raise OSError(
                    f'it takes {need / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB left'
                )
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
                raise OSError(
                    f'a checkpoint of a later step is in the way: {all_steps(self.folder)}'
                )
        except Exception as error:
            raise self._failed(step, error) from None
        self._pending = step, self._pool.submit(self._finish, step)

    def committed(self) -> list[int]:
        """The steps whose save was finished, in order."""
        return committed_steps(self.folder)

    def check(self) -> None:
        """Raises UserError where the save under way has failed already; waits for nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def _finish(self, step: int) -> None:
        self._orbax.wait_until_finished()
        write_checksums(self.folder / str(step))

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
            if not (part / CHECKSUMS).is_file():  # of no use to anyone, and the disk may be full
                shutil.rmtree(part, ignore_errors=True)
        kept = ', '.join(map(str, committed_steps(self.folder)))
        said = ' '.join(str(error).split())
        reason = re.search(
            r'([^:]+) \[os_error', said
        )  # what the system said, at the end of a chain of paths
        return UserError(
            f'checkpoint {step} could not be saved in {self.folder}: {reason[1].strip() if reason else said[:300]}; '
            + (f'those of step {kept} are whole' if kept else 'there is none yet')
            + '. Put it right, then run the same command to go on'
        )

    def restore(self, step: int, abstract):
        """The state saved at `step`; `abstract` gives shape, dtype and sharding of each leaf."""
        items = restore_items(
            self._orbax,
            step,
            params=ocp.args.StandardRestore(abstract.params),
            train=ocp.args.StandardRestore(
                {'step': abstract.step, 'opt_state': abstract.opt_state}
            ),
        )
        return abstract.replace(
            step=items.train['step'], params=items.params, opt_state=items.train['opt_state']
        )

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return restore_items(self._orbax, step, meta=ocp.args.JsonRestore()).meta


def restore_items(manager: ocp.CheckpointManager, step: int, **items):
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax has no error of its own for what does not fit
        raise UserError(
            f'checkpoint {step} in {manager.directory} is undamaged, but is not what this version saves: '
            f'{" ".join(str(error).split())[:300]}'
        ) from None
