"""The model in a run's folder, for sampling, evaluation and fine-tuning."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import config as config_lib
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.data import tokenizers
from gpt2_jax.errors import UserError
from gpt2_jax.kernels.choose import evaluation_attention, platform_of, usable
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import param_shapes
from gpt2_jax.progress import Progress
from gpt2_jax.workdir import storage
from gpt2_jax.workdir.checkpoints import check_step, read_meta
from gpt2_jax.workdir.checksums import FOLDER, METRICS, best_step, committed_steps, verify


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model as sampling and evaluation need it. `params` are numpy arrays."""

    step: int
    model: GPT2
    params: Any
    tokenizer: tokenizers.Tokenizer
    config: Any
    meta: dict[str, Any]


def load(run: Path, step: str) -> Restored:
    """The model of a run's folder at `step`: 'best', 'latest' or a number. Changes nothing.

    If no checkpoint was evaluated, the latest counts as the best. Kernels that cannot run here are
    replaced. Raises UserError if there is no such checkpoint, or if it is damaged.
    """
    folder = run / FOLDER
    number = choose_step(run, step)
    path = folder / str(number)
    meta = read_meta(path)
    with (
        Progress(f'reading checkpoint {number:,}'),
        storage.open_manager(folder, read_only=True) as manager,
    ):
        config = config_lib.from_json(meta['config'])
        tokenizer = tokenizers.from_json(meta['tokenizer'])
        asked = GPT2Config(**config.model, vocab_size=tokenizer.vocab_size)
        platform = platform_of(jax.devices()[0])
        cfg = usable(asked, platform)
        config.model.update(kernels=cfg.kernels, attention=cfg.attention)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))
        items = storage.restore_items(manager, number, params=zeros)
    check_step(path, storage.read_step(path))
    model = GPT2(cfg, fast_ops(evaluation_attention(cfg, platform)))
    return Restored(number, model, items.params, tokenizer, config, meta)


def choose_step(run: Path, step: str) -> int:
    """The number of an undamaged checkpoint: 'best', 'latest' or a number as text. See `load`."""
    folder = run / FOLDER
    steps = committed_steps(folder)
    if not steps:
        raise _no_checkpoint(run)
    if step not in ('best', 'latest', *map(str, steps)):
        raise UserError(
            f'{folder} has no checkpoint {step!r}: it has {", ".join(map(str, steps))}; '
            "or give 'best' or 'latest'"
        )

    def check(number: int, item: str = '') -> None:
        if problem := verify(folder / str(number), item):
            others = ' or '.join(f'--step={other}' for other in steps if other != number)
            remedy = f'try {others}' if others else 'there is no other checkpoint'
            raise UserError(
                f'checkpoint {folder / str(number)} cannot be used: {problem}; {remedy}'
            )

    if step == 'best':
        for number in steps:  # the choice depends on the metrics of all of them
            check(number, METRICS)
        number = best_step(folder)[0] or steps[-1]
    else:
        number = steps[-1] if step == 'latest' else int(step)
    check(number)
    return number


def _no_checkpoint(run: Path) -> UserError:
    """The error for a path without a checkpoint. It suggests a run that may be meant.

    It may be a folder with a similar name, or a run that contains this path or lies in it.
    """
    if not run.exists():
        names = [path.name for path in run.absolute().parent.glob('*') if path.is_dir()]
        near = difflib.get_close_matches(run.name, names, 1)
        hint = (
            f'did you mean {run.with_name(near[0])}?'
            if near
            else 'scripts/train.py makes the folder of a run, and scripts/convert.py makes '
            'one from published weights'
        )
        return UserError(f'{run}: no such folder; {hint}')
    if (run / 'config.json').exists() and (run / FOLDER).is_dir():
        if any((run / FOLDER).iterdir()):
            return UserError(
                f'the run in {run} has no whole checkpoint: those in its {FOLDER} are damaged or '
                'unfinished; the command that trained it says what can be done'
            )
        return UserError(
            f'the run in {run} has no checkpoint yet: it saves the first one at its first '
            'evaluation, or after checkpoint.every updates; the command that trained it resumes it'
        )
    around = [run.parent, run.parent.parent]  # if `run` is checkpoints or checkpoints/STEP
    inside = sorted(path.parent for path in run.glob(f'*/{FOLDER}'))
    runs = [str(path) for path in (*around, *inside) if committed_steps(path / FOLDER)]
    problem = 'holds no checkpoint' if run.is_dir() else 'is a file'
    expected = f'{run} {problem}: expected the folder of a run'
    if runs:
        return UserError(f'{expected}, such as {" or ".join(runs[:3])}')
    if any(run.glob('*.safetensors')):
        remedy = f'it holds published weights: scripts/convert.py --from_hf={run} --ckpt_dir=DIR'
    else:
        remedy = 'train a model with scripts/train.py --workdir=DIR'
    return UserError(f'{expected}, with {FOLDER}/STEP inside; {remedy}')
