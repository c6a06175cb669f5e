"""Fine-tuning: a run that starts from the parameters of another run's checkpoint, published weights included."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from gpt2_jax.errors import UsageError
from gpt2_jax.training import programs
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import checkpoints as checkpoints_lib
from gpt2_jax.workdir import checksums, restore

# Settings that shape the parameters or say what they mean. Dropout and precision may be others than before.
KEPT = (
    'n_layer',
    'n_head',
    'n_embd',
    'n_inner',
    'activation_function',
    'layer_norm_epsilon',
    'bias',
)


def check(setup: Setup) -> None:
    """Raises UserError where `initial_state` would: before an old run is moved out of a new one's way."""
    train = setup.config.train
    if train.init_from:
        _fitting(setup, Path(train.init_from), train.init_step, train.init_optimizer)


def initial_state(setup: Setup) -> TrainState:
    """The state before a run's first update: drawn at random, or that of `train.init_from`. Raises as `from_pretrained`."""
    train = setup.config.train
    if not train.init_from:
        return programs.new_state(setup)
    return from_pretrained(
        setup, Path(train.init_from), which=train.init_step, keep_optimizer=train.init_optimizer
    )


def from_pretrained(
    setup: Setup,
    run: Path,
    *,
    which: str = 'best',
    keep_optimizer: bool = False,
    notify: Callable[[str], None] = print,
) -> TrainState:
    """The state before a run's first update, with the parameters of the checkpoint `which` in the folder `run`.

    A smaller n_positions than that run's crops its positions. With `keep_optimizer` AdamW's moments go on from there
    too; the schedule starts anew in any case. Raises UserError, UsageError naming each setting that does not fit.
    """
    restored = _fitting(setup, run, which, keep_optimizer)
    old, new = restored.model.cfg, setup.model.cfg
    opt_state = setup.optimizer.init(restored.params)
    if keep_optimizer:
        opt_state = jax.tree.map(
            lambda fresh, old: fresh if isinstance(fresh, optax.ScaleByScheduleState) else old,
            opt_state,
            _saved_optimizer(run, restored.step, opt_state),
            is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
        )

    def crop(path, leaf):
        at_positions = [getattr(key, 'key', None) for key in path[-2:]] == ['wpe', 'embedding']
        return leaf[: new.n_positions] if at_positions else leaf

    state = TrainState(
        np.int32(0), *jax.tree_util.tree_map_with_path(crop, (restored.params, opt_state))
    )
    notify(
        f'starting from checkpoint {restored.step:,} in {run}'
        + (', with its optimizer' if keep_optimizer else ', with a fresh optimizer')
        + (
            f'; context cropped from {old.n_positions} to {new.n_positions}'
            if new.n_positions < old.n_positions
            else ''
        )
    )
    return jax.device_put(state, setup.layout)


def _fitting(setup: Setup, run: Path, which: str, keep_optimizer: bool) -> restore.Restored:
    """The checkpoint, where a run may start from it; raises UserError, UsageError naming each setting in the way."""
    restored = restore.load(run, which)
    old, new = restored.model.cfg, setup.model.cfg
    wrong = [
        f'model.{name} is {getattr(old, name)!r} there, {getattr(new, name)!r} here'
        for name in KEPT
        if getattr(old, name) != getattr(new, name)
    ]
    if new.n_positions > old.n_positions:
        wrong.append(
            f'model.n_positions is {old.n_positions} there, and {new.n_positions} here: it can only shrink'
        )
    if restored.tokenizer != setup.dataset.tokenizer:
        wrong.append(
            f'its tokenizer is {restored.tokenizer.name} with {restored.tokenizer.vocab_size:,} tokens, that '
            f'of the data another, {setup.dataset.tokenizer.name} with {setup.dataset.tokenizer.vocab_size:,}'
        )
    ours, theirs = setup.config.optim, restored.config.optim
    if keep_optimizer and (ours.implementation, theirs.implementation) != ('optax', 'optax'):
        wrong.append(
            f"its optimizer goes on only with optim.implementation 'optax', but that is "
            f'{theirs.implementation!r} there, {ours.implementation!r} here'
        )
    if keep_optimizer and (ours.clip_norm > 0) != (theirs.clip_norm > 0):
        wrong.append(
            f'its optimizer goes on only where both clip or none does, but optim.clip_norm is '
            f'{theirs.clip_norm} there, {ours.clip_norm} here'
        )
    if wrong:
        raise UsageError(f'this run cannot start from {run}: {"; ".join(wrong)}')
    return restored


def _saved_optimizer(run: Path, step: int, like):
    """The optimizer state of a checkpoint, as numpy arrays; `like` gives its structure and shapes."""
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    with checkpoints_lib.open_manager(run / checksums.FOLDER, read_only=True) as manager:
        return checkpoints_lib.restore_items(
            manager,
            step,
            train=ocp.args.StandardRestore({'step': np.zeros((), np.int32), 'opt_state': like}),
        ).train['opt_state']
