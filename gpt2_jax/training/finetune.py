"""Fine-tuning: a run that starts from the parameters of another run or of published weights."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from gpt2_jax import files
from gpt2_jax.errors import UsageError
from gpt2_jax.training import programs
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import checksums, restore, storage
from gpt2_jax.workdir.checkpoints import train_item

# Settings that shape the parameters or give them their meaning. Dropout and precision may change.
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
    """Raises UserError if `initial_state` would, before an old run's folder is moved aside."""
    train = setup.config.train
    if train.init_from:
        _load_matching(
            setup, files.user_path(train.init_from), train.init_step, train.init_optimizer
        )


def initial_state(setup: Setup) -> TrainState:
    """The state before a run's first update: random, or loaded from `train.init_from`.

    Raises UserError as `from_pretrained` does.
    """
    train = setup.config.train
    if not train.init_from:
        return programs.new_state(setup)
    return from_pretrained(
        setup,
        files.user_path(train.init_from),
        step=train.init_step,
        keep_optimizer=train.init_optimizer,
    )


def from_pretrained(
    setup: Setup,
    run: Path,
    *,
    step: str = 'best',
    keep_optimizer: bool = False,
    notify: Callable[[str], None] = print,
) -> TrainState:
    """The state before a run's first update, with the parameters of a checkpoint in `run`.

    `step` is 'best', 'latest' or a number. If the parameters were averaged there, the run starts
    from the average. If n_positions is smaller than in the checkpoint, the first positions are
    kept. With `keep_optimizer` the moments are kept too; the schedule always starts at update 0.
    Raises UserError without such a checkpoint, UsageError naming each setting that does not fit.
    """
    restored = _load_matching(setup, run, step, keep_optimizer)
    old, new = restored.model.cfg, setup.model.cfg
    opt_state = setup.optimizer.init(restored.params)
    if keep_optimizer:
        opt_state = jax.tree.map(
            lambda fresh, old: fresh if isinstance(fresh, optax.ScaleByScheduleState) else old,
            opt_state,
            _saved_optimizer(restored, run, opt_state),
            is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
        )

    def crop(path, leaf):
        is_wpe = [getattr(key, 'key', None) for key in path[-2:]] == ['wpe', 'embedding']
        return leaf[: new.n_positions] if is_wpe else leaf

    cropped = jax.tree_util.tree_map_with_path(crop, (restored.params, opt_state))
    optimizer = 'its optimizer' if keep_optimizer else 'a fresh optimizer'
    context = ''
    if new.n_positions < old.n_positions:
        context = f'; context cropped from {old.n_positions} to {new.n_positions}'
    notify(f'starting from checkpoint {restored.step:,} in {run}, with {optimizer}{context}')
    # A copy, because an update reuses the memory of each array in the state.
    average = jax.tree.map(np.copy, cropped[0]) if setup.averages else None
    return jax.device_put(TrainState(np.int32(0), *cropped, average), setup.layout)


def _load_matching(setup: Setup, run: Path, step: str, keep_optimizer: bool) -> restore.Restored:
    """The checkpoint, if a run may start from it; raises UserError as `from_pretrained` does."""
    restored = restore.load(run, step)
    old, new = restored.model.cfg, setup.model.cfg
    wrong = [
        f'model.{name} is {getattr(old, name)!r} there, {getattr(new, name)!r} here'
        for name in KEPT
        if getattr(old, name) != getattr(new, name)
    ]
    if new.n_positions > old.n_positions:
        wrong.append(
            f'model.n_positions is {old.n_positions} there, and {new.n_positions} here: it can '
            'only shrink'
        )
    theirs, ours = restored.tokenizer, setup.dataset.tokenizer
    if theirs != ours:
        wrong.append(
            f'its tokenizer is {theirs.name} with {theirs.vocab_size:,} tokens, but the data use '
            f'{ours.name} with {ours.vocab_size:,} tokens'
        )
    if keep_optimizer:
        wrong += _optimizer_conflicts(restored.config.optim, setup.config.optim)
    if wrong:
        raise UsageError(f'this run cannot start from {run}: {"; ".join(wrong)}')
    return restored


def _optimizer_conflicts(theirs, ours) -> list[str]:
    """Settings of the optim section that keep a saved optimizer state from being used, in words."""
    conflicts = []
    if ours.algorithm != theirs.algorithm:
        conflicts.append(
            'its optimizer can only be kept if optim.algorithm is the same in both runs, but it is '
            f'{theirs.algorithm!r} there, {ours.algorithm!r} here'
        )
    if 'explicit' in (ours.implementation, theirs.implementation):
        conflicts.append(
            "its optimizer can only be kept if optim.implementation is 'explicit' in neither run, "
            'but '
            f'it is {theirs.implementation!r} there, {ours.implementation!r} here'
        )
    is_adamw = ours.algorithm == theirs.algorithm == 'adamw'
    if is_adamw and (ours.clip_norm > 0) != (theirs.clip_norm > 0):
        conflicts.append(
            'its optimizer can only be kept if both runs clip gradients or neither does, but '
            f'optim.clip_norm is {theirs.clip_norm} there, {ours.clip_norm} here'
        )
    return conflicts


def _saved_optimizer(restored: restore.Restored, run: Path, like):
    """The optimizer state of a checkpoint, as numpy arrays; `like` gives structure and shapes."""
    average = restored.params if restored.config.optim.average else None
    state = TrainState(np.int32(0), restored.params, like, average)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), train_item(state))
    train = ocp.args.StandardRestore(zeros)
    with storage.open_manager(run / checksums.FOLDER, read_only=True) as manager:
        return storage.restore_items(manager, restored.step, train=train).train['opt_state']
