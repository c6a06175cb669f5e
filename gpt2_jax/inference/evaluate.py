"""Evaluation of a text: every target once; sums of nats, tokens and bytes, divided at the end."""

import collections
import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.data import batches
from gpt2_jax.data.batches import HostBatch
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.parallel.collectives import evaluate_own_rows
from gpt2_jax.parallel.mesh import one_at_a_time, put_batch, replicated
from gpt2_jax.parallel.partition import make_unshard, shardings
from gpt2_jax.terminal import counted
from gpt2_jax.training.programs import (
    abstract_batch,
    abstract_state,
    compile_in_background,
    compiler_options,
    targets_at_once,
)
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import make_eval_step

# Batches dispatched before the oldest is fetched: a device always has work, and progress is seen.
BATCHES_AHEAD = 2


class Evaluation(NamedTuple):
    """Figures of a text. `loss` is in nats per token; `tokens` and `bytes` count the targets.

    `split_tokens` counts the targets of the whole text, of which an evenly spread part may have
    been evaluated. `bits_per_byte` is None if the targets have no bytes, as <|endoftext|> has
    none.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    split_tokens: int

    def __str__(self):
        per_byte = '' if self.bits_per_byte is None else f'{self.bits_per_byte:.4f} bits per byte '
        part = (
            '' if self.tokens == self.split_tokens else f' of {self.split_tokens:,}, evenly spread'
        )
        return (
            f'loss {self.loss:.4f} nats, perplexity {show_perplexity(self.perplexity, 3)}, '
            f'{per_byte}over {counted(self.tokens, "tokens")}{part}'
        )


class Sums(NamedTuple):
    """Sums over targets: their loss in nats, their number, their UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int


def sum_losses(
    eval_step: Callable,
    params,
    batches: Iterable[HostBatch],
    byte_lengths: np.ndarray,
    mesh: Mesh,
    on_batch: Callable[[int], None],
) -> Sums:
    """Sums the losses of all targets that count; batches are as batches.eval_batches makes them.

    Deterministic: the device sums each row in fp32, the host sums the rows in fp64. After each
    batch on_batch(tokens) is called with the number of its targets; what it raises ends the
    evaluation.
    """
    pending, nats, n_tokens, n_bytes = collections.deque(), [], 0, 0

    def fetch():
        nats_B, tokens = pending.popleft()
        nats.append(np.asarray(nats_B, np.float64))
        on_batch(tokens)

    for batch in batches:
        targets = batch['targets'][batch['mask'] > 0]
        n_tokens += len(targets)
        n_bytes += int(byte_lengths[targets].sum())
        pending.append((eval_step(params, put_batch(mesh, batch)), len(targets)))
        if len(pending) > BATCHES_AHEAD:
            fetch()
    while pending:
        fetch()
    return Sums(math.fsum(np.concatenate(nats)), n_tokens, n_bytes)


def make_evaluation(sums: Sums, split_tokens: int) -> Evaluation:
    """The figures that follow from sums over targets, of a text of `split_tokens` targets."""
    nats, n_tokens, n_bytes = sums
    loss = nats / n_tokens
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
    return Evaluation(loss, perplexity(loss), bits_per_byte, n_tokens, n_bytes, split_tokens)


def perplexity(nats: float) -> float:
    """exp(nats), limited to exp(700) because exp(710) overflows."""
    return math.exp(min(nats, 700))


def show_perplexity(value: float, decimals: int = 4) -> str:
    """With so many decimals, or as a power of ten if the number would be long."""
    return f'{value:.{decimals}f}' if value < 1e9 else f'{value:.4g}'


def make_jitted_eval_step(setup: Setup, pool: Executor | None = None) -> Callable:
    """eval_step(prepared, batch) -> nats_B on the mesh of the setup.

    `prepared` is what the function of `make_prepare` returns; `pool` is as in
    programs.compile_train_step.
    """
    if uses_kernels(setup):
        from gpt2_jax.training import fused_step  # loads Pallas: half a second

        step = fused_step.make_eval_step(setup.model.cfg)
        if setup.mesh.size > 1:
            step = evaluate_own_rows(setup.mesh, step)
    else:
        max_targets = targets_at_once(setup, training=False)
        step = make_eval_step(setup.model, make_unshard(setup.mesh), max_targets)
    jitted = jax.jit(
        step,
        # Every process sums the losses of all rows.
        out_shardings=replicated(setup.mesh) if jax.process_count() > 1 else None,
        compiler_options=compiler_options(setup, training=False),
    )

    def arguments():
        dtypes = {'inputs': np.int32, 'targets': np.int32, 'mask': np.float32}
        batch = abstract_batch(setup, setup.rows_per_micro_batch, **dtypes)
        return abstract_prepared(setup), batch

    return one_at_a_time(setup.mesh, compile_in_background(pool, jitted, arguments))


def make_prepare(setup: Setup, pool: Executor | None = None) -> Callable:
    """prepare(params) -> the parameters as `make_jitted_eval_step`'s function takes them."""
    if not uses_kernels(setup):
        return lambda params: params
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_prepared(setup))
    jitted = jax.jit(_prepare(setup), out_shardings=layout)
    return compile_in_background(pool, jitted, lambda: (abstract_state(setup).params,))


def abstract_prepared(setup: Setup):
    """Shape, dtype and sharding of each prepared parameter."""
    if not uses_kernels(setup):
        return abstract_state(setup).params
    shapes = jax.eval_shape(_prepare(setup), setup.shapes.params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(setup.mesh, shapes),
    )


def _prepare(setup: Setup) -> Callable:
    from gpt2_jax.training import fused_step

    return functools.partial(fused_step.prepare, setup.model.cfg)


def uses_kernels(setup: Setup) -> bool:
    """Whether the fused kernels compute an evaluation."""
    return setup.kernels.evaluation == 'fused'


def make_evaluate(
    setup: Setup, stride: int | None = None, pool: Executor | None = None
) -> Callable:
    """The function run(params, split='val', on_batch=..) -> Evaluation of a split of the data.

    It evaluates eval.tokens targets, evenly spread over the split, or all. The first token is not a
    target, so its bytes do not count either. `stride` is as in batches.eval_batches, `pool` as in
    programs.compile_train_step, `on_batch` as in `sum_losses`.
    """
    eval_step, prepare = make_jitted_eval_step(setup, pool), make_prepare(setup, pool)

    def run(params, split: str = 'val', on_batch=lambda tokens: None) -> Evaluation:
        tokens: Tokens = getattr(setup.dataset, split)
        windows = batches.eval_batches(
            tokens,
            batch_size=setup.rows_per_micro_batch,
            seq_len=setup.config.train.seq_len,
            stride=stride,
            max_targets=setup.config.eval.tokens,
        )
        byte_lengths = setup.dataset.tokenizer.byte_lengths
        sums = sum_losses(eval_step, prepare(params), windows, byte_lengths, setup.mesh, on_batch)
        return make_evaluation(sums, len(tokens) - 1)

    return run
