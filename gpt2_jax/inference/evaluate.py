"""Evaluation of a split: every target once; sums of nats, tokens and bytes, divided at the end."""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.data import batches
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.parallel.mesh import one_at_a_time, put_batch
from gpt2_jax.parallel.partition import make_unshard
from gpt2_jax.training.programs import (
    abstract_batch,
    abstract_state,
    compile_in_background,
    compiler_options,
)
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import make_eval_step


class Evaluation(NamedTuple):
    """Figures of a text. `loss` is in nats per token; `tokens` and `bytes` count the targets."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    eval_step: Callable,
    params,
    tokens: Tokens,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    mesh: Mesh,
    stride: int | None = None,
) -> Evaluation:
    """Evaluates all N - 1 targets of `tokens` once, in windows of `seq_len` tokens.

    `stride` is as in batches.eval_batches. Deterministic: the device sums each row in fp32, the
    host sums the rows in fp64. The first token is no target, so its bytes do not count either.
    """
    rows = [
        eval_step(params, put_batch(mesh, batch))
        for batch in batches.eval_batches(
            tokens, batch_size=batch_size, seq_len=seq_len, stride=stride
        )
    ]
    nats = math.fsum(np.concatenate([np.asarray(nats_B, np.float64) for nats_B in rows]))
    n_tokens, n_bytes = len(tokens) - 1, count_bytes(tokens, tokenizer)
    loss = nats / n_tokens
    bits_per_byte = nats / math.log(2) / n_bytes
    return Evaluation(loss, math.exp(min(loss, 700)), bits_per_byte, n_tokens, n_bytes)


def count_bytes(tokens: Tokens, tokenizer: Tokenizer, block: int = 1 << 22) -> int:
    """UTF-8 bytes of the targets, which are all tokens but the first."""
    return sum(
        int(tokenizer.byte_lengths[tokens.read(start, min(start + block, len(tokens)))].sum())
        for start in range(1, len(tokens), block)
    )


def make_evaluate(
    setup: Setup, stride: int | None = None, pool: Executor | None = None
) -> Callable:
    """The function run(params, split='val') -> Evaluation of a whole split of the run's data.

    `stride` is as in batches.eval_batches, `pool` as in programs.train_step.
    """
    rows = setup.rows_per_micro_batch
    jitted = jax.jit(
        make_eval_step(setup.model, make_unshard(setup.mesh)),
        compiler_options=compiler_options(setup),
    )

    def arguments():
        batch = abstract_batch(setup, rows, inputs=np.int32, targets=np.int32, mask=np.float32)
        return abstract_state(setup).params, batch

    eval_step = one_at_a_time(setup.mesh, compile_in_background(pool, jitted, arguments))

    def run(params, split: str = 'val') -> Evaluation:
        return evaluate(
            eval_step,
            params,
            getattr(setup.dataset, split),
            setup.dataset.tokenizer,
            mesh=setup.mesh,
            batch_size=rows,
            seq_len=setup.config.train.seq_len,
            stride=stride,
        )

    return run
