"""Where a run starts: at its latest checkpoint, or at step 0 with random or trained parameters."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax import files, foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError
from gpt2_jax.terminal import say
from gpt2_jax.training import programs
from gpt2_jax.training.meter import RunProgress, read_progress
from gpt2_jax.training.setup import Setup, build_schedule
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import folder, restore, storage
from gpt2_jax.workdir.checkpoints import Checkpoints, read_meta, train_item
from gpt2_jax.workdir.checksums import FOLDER, best_step, committed_steps

# Settings of the model that must be those of the checkpoint whose parameters a run starts from:
# they shape the parameters or give them their meaning. Dropout and precision may change.
INHERITED = (
    'n_layer',
    'n_head',
    'n_embd',
    'n_inner',
    'activation_function',
    'layer_norm_epsilon',
    'bias',
)


class Start(NamedTuple):
    """The step that a run starts from, its progress, and the sizes of its logs at that step."""

    step: int
    progress: RunProgress
    log_sizes: dict[str, int]


def corpus_identity(setup: Setup) -> dict[str, Any]:
    """The identity of the text that a run trains on: data.corpus as set, its name, its SHA-256."""
    asked, dataset = setup.config.data.corpus, setup.dataset
    return {
        'asked_for': asked,
        'name': dataset.name,
        'sha256': dataset.sha256,
        'fallback': dataset.name == setup.config.data.fallback != asked,
    }


def checkpoint_meta(setup: Setup, workdir: Path, progress: RunProgress) -> dict[str, Any]:
    """What a checkpoint keeps beside the state, for resuming and for sampling."""
    return {
        'config': config_lib.to_json(setup.config),
        'corpus': corpus_identity(setup),
        'tokenizer': tokenizers.to_json(setup.dataset.tokenizer),
        'progress': dataclasses.asdict(progress),
        'log_sizes': folder.log_sizes(workdir),
    }


def where_to_start(setup: Setup, workdir: Path, checkpoints: Checkpoints, extend: bool) -> Start:
    """The latest checkpoint of the run in `workdir`; step 0 if there is none.

    Two settings in the setup's configuration take the values of the saved run: eval.tokens, if it
    was left at its default, and train.order, if an older version began the run. Raises UsageError
    naming every setting that keeps the run from resuming with this configuration.
    """
    saved = committed_steps(workdir / FOLDER)
    if not saved:
        return Start(0, RunProgress(), {})
    start, config = saved[-1], setup.config
    meta = read_meta(checkpoints.folder / str(start))
    old = config_lib.from_json(meta['config'])
    longer = config.train.steps > old.train.steps
    differ = config_lib.differences(old, config)
    kept_tokens = False
    if extend and longer:
        differ.pop('train.steps')
    if 'eval.tokens' in differ and config.eval.tokens == config_lib.usual_eval_tokens(config):
        config.eval.tokens, _ = differ.pop('eval.tokens')
        kept_tokens = True
    if config.train.order == 'keyed' and 'train.order' in differ:
        config.train.order, _ = differ.pop('train.order')
        say("train.order stays 'table': an older version started this run")
    theirs, ours = meta['corpus'], corpus_identity(setup)
    if theirs['sha256'] != ours['sha256']:
        differ['data.corpus (its text)'] = tuple(
            f'{corpus["name"]} {corpus["sha256"][:12]}' for corpus in (theirs, ours)
        )
    elif 'data.corpus' in differ:  # the text is the same, in another file
        there, now = differ.pop('data.corpus')
        say(f'data.corpus is now {now}: the text is the same as in {there}')
    if differ:
        fields = '; '.join(f'{key}: {a!r} there, {b!r} now' for key, (a, b) in differ.items())
        can_extend = 'train.steps' in differ and longer
        hint = ' (--extend allows a larger train.steps)' if can_extend else ''
        raise UsageError(
            f'the run in {workdir} has another configuration: {fields}{hint}; give the same '
            'settings to resume, another --workdir for a new run, or --fresh to move the old one '
            'aside'
        )
    if kept_tokens:
        say(
            f'evaluations keep their size of {config.eval.tokens:,} tokens, so that losses stay '
            'comparable: the default of eval.tokens depends on settings that have changed'
        )
    progress = read_progress(meta, workdir)
    if extend and longer:
        say(_describe_extension(old, config, start))
        progress.extensions.append({'step': start, 'planned': old.train.steps})
    if progress.best_step not in saved:  # it was damaged: the best of those that can be restored
        progress.best_step, progress.best_val_loss = best_step(workdir / FOLDER)
    return Start(start, progress, meta['log_sizes'])


def _describe_extension(old: ConfigDict, new: ConfigDict, start: int) -> str:
    before, after = (f'{build_schedule(config)(start):.3g}' for config in (old, new))
    change = f'changes from {before} to {after}' if before != after else f'stays {after}'
    return (
        f'extended from {old.train.steps:,} to {new.train.steps:,} steps: the schedule now spans '
        f'all of them, and the learning rate at step {start:,} {change}'
    )


def check_pretrained(setup: Setup, workdir: Path) -> None:
    """Raises UserError if `initial_state` would, before the old run in `workdir` is moved aside."""
    source = setup.config.train.init_from
    if source and files.user_path(source).resolve() == workdir.resolve():
        raise UsageError(
            f'train.init_from = {source} is the folder that --fresh moves aside: give another '
            '--workdir'
        )
    if source:
        _load_matching(setup)


def initial_state(setup: Setup) -> TrainState:
    """The state before a run's first update: random, or from the checkpoint `train.init_from`.

    If the parameters were averaged there, the run starts from the average. If n_positions is
    smaller than in the checkpoint, the first positions are kept. With `train.init_optimizer` the
    moments are kept too; the schedule always starts at update 0. Raises UserError without such a
    checkpoint, UsageError naming each setting that does not fit.
    """
    train = setup.config.train
    if not train.init_from:
        return programs.new_state(setup)
    restored, run = _load_matching(setup), files.user_path(train.init_from)
    old, new = restored.model.cfg, setup.model.cfg
    opt_state = setup.optimizer.init(restored.params)
    if train.init_optimizer:
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
    optimizer = 'its optimizer' if train.init_optimizer else 'a fresh optimizer'
    context = ''
    if new.n_positions < old.n_positions:
        context = f'; context cropped from {old.n_positions} to {new.n_positions}'
    say(f'starting from checkpoint {restored.step:,} in {run}, with {optimizer}{context}')
    # A copy, because an update reuses the memory of each array in the state.
    average = jax.tree.map(np.copy, cropped[0]) if setup.averages else None
    state = TrainState(np.int32(0), *cropped, average, setup.shapes.rounded).round_again()
    return jax.device_put(state, setup.layout)


def _load_matching(setup: Setup) -> restore.Restored:
    """The checkpoint `train.init_from`; raises UserError as `initial_state` does."""
    train = setup.config.train
    run = files.user_path(train.init_from)
    restored = restore.load(run, train.init_step)
    old, new = restored.model.cfg, setup.model.cfg
    wrong = [
        f'model.{name} is {getattr(old, name)!r} there, {getattr(new, name)!r} here'
        for name in INHERITED
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
            f'{ours.name} with {ours.vocab_size:,} tokens{_other_characters(theirs, ours)}'
        )
    if train.init_optimizer:
        wrong += _optimizer_conflicts(restored.config.optim, setup.config.optim)
    if wrong:
        raise UsageError(f'this run cannot start from {run}: {"; ".join(wrong)}')
    return restored


def _other_characters(theirs: Tokenizer, ours: Tokenizer) -> str:
    """How two character tokenizers differ, and what to do; empty for other tokenizers."""
    if not theirs.name == ours.name == 'char':
        return ''
    there, here = set(theirs.alphabet), set(ours.alphabet)
    advice = [
        f'{verb} {foreign.show("".join(sorted(characters)))}, which only {owner} has'
        for verb, characters, owner in (
            ('replace', here - there, 'the text'),
            ('add a line with', there - here, 'the model'),
        )
        if characters
    ]
    return (
        f' (the text must have the characters of the model: {", and ".join(advice)}; or train a '
        'new model with data.tokenizer=byte, which encodes every text)'
    )


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
            f'but it is {theirs.implementation!r} there, {ours.implementation!r} here'
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
    with storage.open_manager(run / FOLDER, read_only=True) as manager:
        return storage.restore_items(manager, restored.step, train=zeros).train['opt_state']
