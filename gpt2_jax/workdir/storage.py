"""Orbax's manager of a folder, restoring from it, and reading a checkpoint back."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from gpt2_jax import foreign
from gpt2_jax.errors import UserError
from gpt2_jax.parallel import hosts
from gpt2_jax.workdir import fit
from gpt2_jax.workdir.folder import check_path

READ_BACK_BYTES = 1 << 28  # of arrays read at a time


class LiteralPath(type(epath.Path('/'))):
    """A path that Orbax takes literally.

    Orbax merges the files of all processes by `path.glob('ocdbt.process_*')`, and the glob of etils
    takes the whole path for a pattern: with a `[` in any parent folder it would merge nothing, and
    say nothing.
    """

    def glob(self, pattern: str) -> Iterator['LiteralPath']:
        """Yields the files below this folder that match `pattern`."""
        return (type(self)(path) for path in Path(self).glob(pattern))


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silences Orbax, which warns of choices that are made on purpose, and whose errors are raised.

    Without this, a save that fails would also print 300 lines of tracebacks.
    """
    logger = logging.getLogger('absl')

    # A filter of its own: of two runs on two threads, either may end first.
    def is_of_others(record):
        return 'orbax' not in Path(record.pathname).parts

    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


def is_log_spaced(step: int, every: int) -> bool:
    """Whether `step` is one of 0, 1, 2, 4, .. 512, or a later multiple of `every`."""
    return step & (step - 1) == 0 if step <= 512 else step % every == 0


def count_log_spaced(last: int, every: int) -> int:
    """How many of the steps 0 .. last are log-spaced."""
    first = min(last, 512)
    return 1 + first.bit_length() + last // every - first // every


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


LATEST = Kept('latest', 1)


def open_manager(folder: Path, read_only: bool, kept: Kept = LATEST) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in a folder; use it as a context manager.

    Raises UsageError for a path that folder.check_path refuses, and UserError for a checkpoint
    whose metadata Orbax cannot read.
    """
    check_path(folder)
    keep = policies.AnyPreservationPolicy(
        [
            kept,
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
    try:
        with hosts.lost_processes():
            return ocp.CheckpointManager(LiteralPath(folder.absolute()), options=options)
    except (OSError, UserError):
        raise
    except Exception as error:  # in metadata that another program wrote
        raise _another_form(f'a checkpoint in {folder}', error) from None


def restore_items(manager: ocp.CheckpointManager, step: int, **items):
    """The named items of a checkpoint, each described by a tree of arrays or of their shapes.

    Raises UserError if they are not what this version saves, or hold other arrays than are wanted.
    """
    checkpoint = f'checkpoint {step} in {manager.directory}'
    try:
        with hosts.lost_processes():
            pairs = {
                name: (
                    fit.saved_leaves(LiteralPath(manager.directory, str(step), name)),
                    fit.leaves(tree),
                )
                for name, tree in items.items()
            }
            fit.check(checkpoint, pairs)
            wanted = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
            return manager.restore(step, args=ocp.args.Composite(**wanted))
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):
        raise
    except Exception as error:  # Orbax has no error class of its own
        raise _another_form(checkpoint, error) from None


def read_back(path: Path, step: int, items: dict[str, Any]) -> None:
    """Restores the checkpoint at `path` from disk and drops it. Raises OSError if this fails.

    `items` are the trees that were saved, of arrays or of their shapes. Every leaf is read, in
    groups of READ_BACK_BYTES, so that a large state needs little memory a second time. The step
    must be `step`.
    """
    try:
        for name, tree in items.items():
            for group in _groups(tree, READ_BACK_BYTES):
                restored = _read(path / name, group)
                if name == 'train' and restored['step'] not in (..., step):
                    raise ValueError(f'it holds step {restored["step"]}')
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise OSError(f'it was written, but cannot be read back: {reason}') from None


def read_step(path: Path) -> int:
    """The number of updates in the state saved at `path`, which is read from the state itself.

    Raises UserError if the state is not in the form that this version saves.
    """
    like = {'step': np.zeros((), np.int32)}
    try:
        return int(_read(path / 'train', like, partial_restore=True)['step'])
    except MemoryError:
        raise
    except Exception as error:
        raise _another_form(f'checkpoint {path}', error) from None


def _another_form(checkpoint: str, error: BaseException) -> UserError:
    while error.__cause__:  # the reason itself: Orbax says only where it was reading
        error = error.__cause__
    reason = ' '.join(str(error).split()) or type(error).__name__
    problem = f'is undamaged, but not in the form that this version saves: {reason}'
    return foreign.error(checkpoint, problem)


def _val_loss(metrics) -> float:
    return metrics['val_loss']


def _read(path: Path, like, **options):
    """An item as numpy arrays. `like` is its tree of shapes, with `...` for leaves to leave out.

    In a run of several processes, each reads for itself.
    """
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = ocp.args.PyTreeRestore(like, restore_args=as_numpy, **options)
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f'process_{here}'
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(LiteralPath(path.absolute()), args=args)


def _groups(tree, n_bytes: int) -> Iterator[Any]:
    """Copies of the tree with `n_bytes` of its leaves, or one leaf, and `...` for the others."""
    leaves, treedef = jax.tree.flatten(tree)
    group, size = [], 0
    for index, leaf in enumerate(leaves):
        leaf_bytes = leaf.size * leaf.dtype.itemsize
        if group and size + leaf_bytes > n_bytes:
            yield _only(treedef, leaves, group)
            group, size = [], 0
        group.append(index)
        size += leaf_bytes
    yield _only(treedef, leaves, group)


def _only(treedef, leaves: list, indices: list[int]):
    kept = set(indices)
    return treedef.unflatten([leaf if i in kept else ... for i, leaf in enumerate(leaves)])
