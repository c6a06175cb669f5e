"""TODO."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt2_jax import config as config_lib
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.data import tokenizers
from gpt2_jax.errors import UserError
from gpt2_jax.kernels.support import usable
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import training_ops
from gpt2_jax.model.params import init_params
from gpt2_jax.workdir.checkpoints import open_manager, restore_items
from gpt2_jax.workdir.checksums import FOLDER, METRICS, best_step, committed_steps, verify


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
    sealed = committed_steps(folder)
    if not sealed:
        raise UserError(
            f'{run} holds no checkpoint: expected the folder of a run, with {FOLDER}/STEP inside; '
            'train one with scripts/train.py --workdir=DIR'
        )
    if which not in ('best', 'latest') and which not in map(str, sealed):
        raise UserError(
            f'{folder} has no checkpoint {which!r}: it has {", ".join(map(str, sealed))}; '
            "or give 'best' or 'latest'"
        )

    def check(step: int, item: str = '') -> None:
        if problem := verify(folder / str(step), item):
            others = ' or '.join(f'--step={other}' for other in sealed if other != step)
            raise UserError(
                f'checkpoint {folder / str(step)} cannot be used: {problem}; '
                + (f'try {others}' if others else 'there is no other')
            )

    if which == 'best':
        for step in sealed:  # the choice rests on the figures of all
            check(step, METRICS)
    step = (
        int(which) if which.isdigit() else (which == 'best' and best_step(folder)[0]) or sealed[-1]
    )
    check(step)
    with open_manager(folder, read_only=True) as manager:
        meta = restore_items(manager, step, meta=ocp.args.JsonRestore()).meta
        config = config_lib.from_json(meta['config'])
        tokenizer = tokenizers.from_json(meta['tokenizer'])
        cfg = usable(
            GPT2Config(**config.model, vocab_size=tokenizer.vocab_size), jax.default_backend()
        )
        config.model.update(kernels=cfg.kernels, attention=cfg.attention)
        model = GPT2(cfg, training_ops(cfg.attention))
        shapes = jax.eval_shape(lambda: init_params(model.cfg, 0))
        params = restore_items(
            manager,
            step,
            params=ocp.args.StandardRestore(
                jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            ),
        ).params
    return Restored(step, model, params, tokenizer, config, meta)
