"""Where a run starts: at step 0, or at the latest checkpoint of the same run."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax import foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.errors import UsageError
from gpt2_jax.terminal import say
from gpt2_jax.training.meter import Progress
from gpt2_jax.training.setup import Setup, build_schedule
from gpt2_jax.workdir import folder, history
from gpt2_jax.workdir.checkpoints import Checkpoints, read_meta
from gpt2_jax.workdir.checksums import FOLDER, best_step, committed_steps

# The fields of Progress, as JSON.
PROGRESS = dict.fromkeys(
    ('best_val_loss', 'final_val_loss', 'seconds', 'seconds_to_first_step', 'train_seconds'),
    foreign.Maybe(foreign.NUMBER),
) | {
    'best_step': foreign.Maybe(foreign.integer(0)),
    'val_tokens': foreign.Maybe(foreign.integer(0)),
    'train_steps': foreign.Maybe(foreign.integer(0)),
    'unfinished': foreign.Maybe([foreign.one_of('evaluation', 'sample')]),
    'extensions': foreign.Maybe(history.EXTENSIONS),
}


class Start(NamedTuple):
    """The step that a run starts from, its progress, and the sizes of its logs at that step."""

    step: int
    progress: Progress
    log_sizes: dict[str, int]


def corpus_identity(setup: Setup) -> dict[str, Any]:
    """The identity of the text a run trains on: how it was asked for, its name, its SHA-256."""
    asked, dataset = setup.config.data.corpus, setup.dataset
    return {
        'asked_for': asked,
        'name': dataset.name,
        'sha256': dataset.sha256,
        'fallback': dataset.name == setup.config.data.fallback != asked,
    }


def checkpoint_meta(setup: Setup, workdir: Path, progress: Progress) -> dict[str, Any]:
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

    An eval.tokens that was left open, and the order of a run of an older version, are set in the
    setup's configuration to what they were there.
    Raises UsageError naming every setting that keeps the run from resuming with this configuration.
    """
    saved = committed_steps(workdir / FOLDER)
    if not saved:
        return Start(0, Progress(), {})
    start, config = saved[-1], setup.config
    meta = read_meta(checkpoints.folder / str(start))
    old = config_lib.from_json(meta['config'])
    longer = config.train.steps > old.train.steps
    differ = config_lib.differences(old, config)
    if extend and longer:
        differ.pop('train.steps')
    if 'eval.tokens' in differ and config.eval.tokens == config_lib.usual_eval_tokens(config):
        # It was left open: keep the size, so that the losses compare.
        config.eval.tokens, _ = differ.pop('eval.tokens')
        say(f'eval.tokens stays {config.eval.tokens:,}, as at the start of this run')
    if config.train.order == 'keyed' and 'train.order' in differ:
        config.train.order, _ = differ.pop('train.order')
        say("train.order stays 'table': an older version started this run")
    theirs, ours = meta['corpus'], corpus_identity(setup)
    if theirs['sha256'] != ours['sha256']:
        differ['data.corpus (its text)'] = tuple(
            f'{corpus["name"]} {corpus["sha256"][:12]}' for corpus in (theirs, ours)
        )
    elif 'data.corpus' in differ:  # the text is the same, at another place
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
    progress = read_progress(meta, workdir)
    if extend and longer:
        say(_describe_extension(old, config, start))
        progress.extensions.append({'step': start, 'planned': old.train.steps})
    if progress.best_step not in saved:  # it was damaged: the best of those that can be restored
        progress.best_step, progress.best_val_loss = best_step(workdir / FOLDER)
    return Start(start, progress, meta['log_sizes'])


def read_progress(meta: dict[str, Any], workdir: Path) -> Progress:
    """The progress in the metadata of a checkpoint. Raises UserError if it has another form."""
    source, saved = f'the progress of the checkpoint in {workdir}', meta['progress']
    foreign.check(saved, PROGRESS, source)
    for name in saved.keys() - PROGRESS.keys():
        raise foreign.error(source, f'is of another form: it has {foreign.show(name)}')
    return Progress(**{name: value for name, value in saved.items() if value is not None})


def _describe_extension(old: ConfigDict, new: ConfigDict, start: int) -> str:
    before, after = (float(build_schedule(config)(start)) for config in (old, new))
    return (
        f'extended from {old.train.steps:,} to {new.train.steps:,} steps: the schedule now spans '
        f'all of them, and the learning rate at step {start:,} changes from {before:.3g} to '
        f'{after:.3g}'
    )
