"""The one door to the fast paths: which of them can run on this machine in this configuration.

Only the kernels import Pallas, so that asking costs nothing.
"""

import dataclasses
from collections.abc import Iterator

from gpt2_jax.architecture import GPT2Config

# The fused kernels of training process queries and keys in blocks of the first number, and rows
# (the tokens of a micro-batch) in groups of the second.
SEQ_LEN_MULTIPLE = 64
ROWS_MULTIPLE = 2048
HEAD_DIMS = (16, 32, 64, 128)

PARTS = ('training', 'optimizer', 'decoding', 'cudnn')


def unmet_needs(
    part: str,
    cfg: GPT2Config,
    platform: str,
    *,
    n_devices: int = 1,
    rows: int | None = None,
    seq_len: int | None = None,
) -> Iterator[str]:
    """Yields what a fast path needs and lacks here, in words; nothing if it can run.

    `part` is one of PARTS: the fused kernels of 'training', of the 'optimizer' or of 'decoding', or
    'cudnn' attention. `platform` is JAX's name of it. `rows` and `seq_len` are the size of a
    micro-batch in training.
    """
    if platform != 'gpu':
        yield f'an NVIDIA GPU, but this runs on {platform}'
    if part in ('training', 'decoding', 'cudnn') and cfg.dtype != 'bfloat16':
        yield "model.dtype = 'bfloat16'"
    if part == 'cudnn' and cfg.attn_pdrop:
        yield 'model.attn_pdrop = 0: its kernel has no dropout'
    if part in ('training', 'optimizer') and n_devices > 1:
        yield 'one device: mesh.data = mesh.fsdp = mesh.tensor = 1'
    if part != 'training':
        return
    if cfg.activation_function != 'gelu_new':
        yield "model.activation_function = 'gelu_new'"
    if cfg.head_dim not in HEAD_DIMS:
        yield f'a head width n_embd / n_head = 16, 32, 64 or 128, not {cfg.head_dim}'
    if seq_len and seq_len % SEQ_LEN_MULTIPLE:
        yield f'train.seq_len to be a multiple of {SEQ_LEN_MULTIPLE}, not {seq_len}'
    if rows and rows * seq_len % ROWS_MULTIPLE:
        tokens = f'{rows} rows x {seq_len} tokens'
        yield f'a micro-batch of a multiple of {ROWS_MULTIPLE:,} tokens, not {tokens}'


def usable(cfg: GPT2Config, platform: str) -> GPT2Config:
    """The same model, with XLA in place of each fast path in its settings that cannot run here."""
    changes = {}
    if cfg.kernels == 'fused' and any(unmet_needs('decoding', cfg, platform)):
        changes['kernels'] = 'xla'
    if cfg.attention == 'cudnn' and any(unmet_needs('cudnn', cfg, platform)):
        changes['attention'] = 'xla'
    return dataclasses.replace(cfg, **changes)
