"""The one door to the fast paths: what this machine and this configuration can use, and why not.

Pallas is imported by the kernels only, so that asking costs nothing.
"""

import dataclasses
from collections.abc import Iterator

from gpt2_jax.architecture import GPT2Config

# The fused kernels of training work on blocks of this many queries, and on rows in groups.
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
    """What keeps a fast path from running here, in words: nothing is yielded if it can run.

    `part` is one of PARTS: the fused kernels of 'training', the 'optimizer' or 'decoding', or 'cudnn'
    attention. `platform` is JAX's; `rows` and `seq_len` are the size of a micro-batch in training.
    """
    if platform != 'gpu':
        yield f'an NVIDIA GPU, but this runs on {platform}'
    if part in ('training', 'decoding', 'cudnn') and cfg.dtype != 'bfloat16':
        yield "model.dtype = 'bfloat16'"
    if part == 'cudnn' and cfg.attn_pdrop:
        yield 'model.attn_pdrop = 0: its kernel has no dropout'
    if part in ('training', 'optimizer') and n_devices > 1:
        yield 'one device: mesh.data, mesh.fsdp and mesh.tensor = 1'
    if part != 'training':
        return
    if cfg.activation_function != 'gelu_new':
        yield "model.activation_function = 'gelu_new'"
    if cfg.head_dim not in HEAD_DIMS:
        yield (
            f'a head width, n_embd / n_head = {cfg.head_dim}, that is a power of two from 16 to 128'
        )
    if seq_len and seq_len % SEQ_LEN_MULTIPLE:
        yield f'train.seq_len = {seq_len} to be a multiple of {SEQ_LEN_MULTIPLE}'
    if rows and rows * seq_len % ROWS_MULTIPLE:
        yield (
            f'{rows} rows x {seq_len} tokens of a micro-batch to be a multiple of {ROWS_MULTIPLE:,}'
        )


def usable(cfg: GPT2Config, platform: str) -> GPT2Config:
    """The same model, with XLA in place of each fast path of its settings that cannot run here."""
    changes = {}
    if cfg.kernels == 'fused' and any(unmet_needs('decoding', cfg, platform)):
        changes['kernels'] = 'xla'
    if cfg.attention == 'cudnn' and any(unmet_needs('cudnn', cfg, platform)):
        changes['attention'] = 'xla'
    return dataclasses.replace(cfg, **changes)
