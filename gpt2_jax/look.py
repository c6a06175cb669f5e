"""What scripts/lens.py does: a page about a model at work, a look on the terminal, a shape flow.

It joins the package lens, which knows models and texts, with what makes texts and training steps.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax import files
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.data import load
from gpt2_jax.inference.decoding import generate
from gpt2_jax.inference.sampling import TO_READ
from gpt2_jax.inference.streaming import encode_prompt
from gpt2_jax.lens import flow as flow_lib
from gpt2_jax.lens import report as report_lib
from gpt2_jax.library import Loaded
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.reports import model as model_report
from gpt2_jax.reports import terminal
from gpt2_jax.reports.flow import to_json, to_markdown, to_page
from gpt2_jax.speed.benchmark import random_data
from gpt2_jax.training import programs
from gpt2_jax.training.setup import build

TOKENS = 64  # of a text for which no number was given: the prompt, continued by the model


def text_to_show(
    loaded: Loaded,
    prompt: str,
    new_tokens: int | None,
    seed: int,
    notify: Callable[[str], None] = print,
) -> tuple[np.ndarray, int]:
    """The tokens (T,) of the prompt and what the model writes after it, and how many were given.

    By default the text ends at 64 tokens, or at the context. A prompt beyond the context loses its
    beginning, and `notify` says so. Raises UserError if the prompt has no tokens.
    """
    context = loaded.model.cfg.n_positions
    ids = encode_prompt(loaded.tokenizer, prompt).astype(np.int32)
    if len(ids) > context:
        notify(f'the prompt has {len(ids)} tokens: its last {context}, the context, are shown')
        ids = ids[-context:]
    least = 2 - len(ids)
    wanted = TOKENS - len(ids) if new_tokens is None else new_tokens
    wanted = max(0, least, min(wanted, context - len(ids)))
    written = []
    if wanted:
        options = {'max_new_tokens': wanted, 'seed': seed, 'sampling': TO_READ}
        chunks = generate(loaded.model, loaded.params, ids, notify=notify, **options)
        written = [chunk[0] for chunk in chunks]
    return np.concatenate([ids, *written]), len(ids)


@allow_transfers
def report(
    loaded: Loaded,
    prompt: str,
    out: str | Path,
    *,
    new_tokens: int | None = None,
    seed: int = 0,
    skip: Collection[str] = (),
    notify: Callable[[str], None] = print,
) -> None:
    """Writes the page of a model on a text: one HTML file. See lens.report.collect.

    Raises UsageError before anything is computed if `out` cannot be written.
    """
    out = files.output_path(out)
    tokens_T, n_given = text_to_show(loaded, prompt, new_tokens, seed, notify)
    train = loaded.config.train
    found = report_lib.collect(
        loaded,
        tokens_T,
        title=f'{loaded.path.absolute().name}, step {loaded.step:,}',
        path=str(loaded.path),
        prompt_tokens=n_given,
        skip=skip,
        make_step=training_step(loaded.config),
        step_size=(train.batch_size, train.seq_len, train.grad_accum_steps),
        notify=notify,
    )
    page = model_report.render(found)
    files.write_text(out, page)
    notify(f'wrote {out}: {len(tokens_T)} tokens, {len(page) / 1e6:.1f} MB')


@allow_transfers
def show(
    loaded: Loaded,
    prompt: str,
    *,
    new_tokens: int | None = None,
    seed: int = 0,
    at: int = -1,
    head: tuple[int, int] | None = None,
) -> None:
    """Prints a text with its losses, the guesses of the layers and a head: see reports.terminal."""
    tokens_T, _ = text_to_show(loaded, prompt, new_tokens, seed)
    terminal.show(loaded, tokens_T, terminal.PipeConsole(highlight=False), at=at, head=head)


def shapes(config: ConfigDict, vocab_size: int, form: str, notify: Callable[[str], None]) -> str:
    """The shape flow of a configuration's training step as 'md', 'json' or 'html'.

    With a `vocab_size` of 0 the vocabulary is the corpus's own.
    """
    vocab_size = vocab_size or load.load_dataset(**config.data).tokenizer.vocab_size
    plain = as_xla(config)
    if plain.to_dict() != config.to_dict():
        notify('the shape flow is of the xla path: fused kernels compute the same formulas')
    flow = flow_lib.shape_flow(
        GPT2Config(**plain.model, vocab_size=vocab_size),
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        grad_accum_steps=config.train.grad_accum_steps,
        make_step=training_step(config),
    )
    return {'md': to_markdown, 'json': to_json, 'html': to_page}[form](flow)


def as_xla(config: ConfigDict) -> ConfigDict:
    """The configuration on one device, without fused kernels: a trace cannot look into them."""
    config = config_lib.resolve(config).copy_and_resolve_references()
    config.model.update(kernels='xla', attention='xla')
    if config.optim.implementation != 'explicit':
        config.optim.implementation = 'optax'
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return config


def training_step(config: ConfigDict) -> flow_lib.MakeStep:
    """How to build the training step of a configuration for any sizes: see lens.flow.shape_flow."""
    plain = as_xla(config)

    def make_step(sizes: flow_lib.Sizes):
        changed = plain.copy_and_resolve_references()
        changed.model.update({name: getattr(sizes.cfg, name) for name in plain.model})
        changed.train.update(
            batch_size=sizes.batch_size,
            seq_len=sizes.seq_len,
            grad_accum_steps=sizes.grad_accum_steps,
        )
        setup = build(changed, random_data(sizes.cfg.vocab_size, 1))
        rows = sizes.batch_size
        batch = programs.abstract_batch(setup, rows, inputs=np.int32, targets=np.int32)
        return programs.compile_train_step(setup), (programs.abstract_state(setup), batch)

    return make_step
