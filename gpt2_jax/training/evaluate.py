"""Evaluation over a whole split: every target once, sums divided at the end."""

import math
from typing import NamedTuple

import numpy as np

from gpt2_jax.data import batches
from gpt2_jax.parallel import mesh
from gpt2_jax.data.shards import Tokens
from gpt2_jax.data.tokenizers import Tokenizer


class Evaluation(NamedTuple):
    """Figures of one split. `loss` is in nats per token; `tokens` and `bytes` count the targets."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(eval_step, params, tokens: Tokens, tokenizer: Tokenizer, *, batch_size: int, seq_len: int,
             mesh, stride: int | None = None) -> Evaluation:
    """All N - 1 targets of `tokens` once, in windows of `seq_len`; see batches.eval_batches for `stride`.

    Deterministic. Rows are summed on the device in fp32, and over rows in fp64 on the host. The targets are the text
    but its first token, so their bytes are the text's less that token's.
    """
    rows = [eval_step(params, mesh.put_batch(mesh, batch))
            for batch in batches.eval_batches(tokens, batch_size=batch_size, seq_len=seq_len, stride=stride)]
    nats = math.fsum(np.concatenate([np.asarray(nats_B, np.float64) for nats_B in rows]))
    n_tokens = len(tokens) - 1
    n_bytes = count_bytes(tokens, tokenizer)
    loss = nats / n_tokens
    return Evaluation(loss, math.exp(min(loss, 700)), nats / math.log(2) / n_bytes, n_tokens, n_bytes)


def count_bytes(tokens: Tokens, tokenizer: Tokenizer, block: int = 1 << 22) -> int:
    """UTF-8 bytes of the targets: of all tokens but the first."""
    return sum(int(tokenizer.byte_lengths[tokens.read(start, min(start + block, len(tokens)))].sum())
               for start in range(1, len(tokens), block))
