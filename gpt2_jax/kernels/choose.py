"""Which code computes each part of the work, on this machine and in this configuration.

A part is attention, norm, gelu or loss of a training step, the optimizer, evaluation, or decoding.
Each takes the fastest implementation whose needs are met:

    hopper  as fused, but GELU's backward pass ends a matrix product: Hopper GPUs, long runs
    fused   the GPU kernels of this package
    cudnn   cuDNN's attention; in evaluation, with everything else as XLA compiles it
    xla     what XLA compiles from model/gpt2.py;  optax: the same of the optimizer

This file does not import Pallas, which takes time to load: only the kernels do.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.errors import UsageError

# The fused kernels of training process queries and keys in blocks of the first number, and rows
# (the tokens of a device's micro-batch) in groups of the second.
SEQ_LEN_MULTIPLE = 64
ROWS_MULTIPLE = 2048
HEAD_DIMS = (16, 32, 64, 128)
# The kernel for Hopper GPUs processes n_inner and n_embd in blocks of these sizes.
# Compiling it takes 2 s longer than the others. It gains about 1 s for each 1e12 numbers that go
# through GELU in a run, so 13,000 updates of configs/shakespeare.py gain 2 s (H100, widths of 384
# to 1,024). At a width of 1,600 it gains nothing; widths between were not measured.
HOPPER_COLUMNS, HOPPER_INNER = 128, 64
HOPPER_NUMBERS, HOPPER_WIDTH = 2e12, 1024
# Tokens of a device's micro-batch, and of a window, from which cuDNN's attention is the faster one
# without dropout: its three products pay only if they are large. Other windows were not measured.
CUDNN_TOKENS, CUDNN_SEQ_LEN = 16 * 1024, 1024
# The compute capability of an A100. Older GPUs, such as a T4, have no bfloat16.
MIN_CAPABILITY = 8


class Kernels(NamedTuple):
    """The implementation of each part."""

    attention: str = 'xla'
    norm: str = 'xla'
    gelu: str = 'xla'
    loss: str = 'xla'
    optimizer: str = 'optax'
    evaluation: str = 'xla'
    decoding: str = 'xla'

    @property
    def fused_training(self) -> bool:
        """Whether training/fused_step.py computes the loss and its gradient."""
        # GELU's kernel 'hopper' comes with the others: what they need it needs too.
        return 'fused' in (self.attention, self.norm, self.gelu, self.loss)


XLA = Kernels()
FUSED = Kernels('fused', 'fused', 'fused', 'fused', 'fused', 'fused', 'fused')


class Place(NamedTuple):
    """Where a model runs: `platform_of` its devices, and one device's share of a micro-batch.

    `deterministic` is the setting train.deterministic, `algorithm` the setting optim.algorithm.
    `micro_batches` is the number of micro-batches in the whole run if kernels for Hopper GPUs can
    run (see parallel/devices.py), and 0 if they cannot.
    """

    platform: str
    tensor: int = 1
    rows: int | None = None
    seq_len: int | None = None
    deterministic: bool = False
    algorithm: str = 'adamw'
    micro_batches: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return (self.rows or 0) * (self.seq_len or 0)


def platform_of(device) -> str:
    """JAX's name of a device's platform, or what is wrong with a GPU that cannot run the kernels.

    Such a GPU has a compute capability below MIN_CAPABILITY or, if it is not NVIDIA's, one that is
    not a number.
    """
    capability = getattr(device, 'compute_capability', None)
    if device.platform != 'gpu' or capability is None:
        return device.platform
    major = capability.partition('.')[0]
    if major.isdecimal() and int(major) >= MIN_CAPABILITY:
        return 'gpu'
    return f'a GPU of compute capability {capability}'


def unmet_needs(part: str, name: str, cfg: GPT2Config, place: Place) -> Iterator[str]:
    """Yields what the implementation `name` of a part needs and lacks here; nothing if it can run.

    `part` is a field of Kernels. Needs of `rows` and `seq_len` are skipped if the place has none.
    """
    if name not in ('hopper', 'fused', 'cudnn'):
        return
    training = part in ('attention', 'norm', 'gelu', 'loss')
    if place.platform != 'gpu':
        newer = f' of compute capability {MIN_CAPABILITY}.0 or more' * ('GPU' in place.platform)
        yield f'an NVIDIA GPU{newer}, but this runs on {place.platform}'
    if part == 'optimizer':
        if place.algorithm != 'adamw':
            yield "optim.algorithm = 'adamw': its kernel does not compute Muon"
        return
    if cfg.dtype != 'bfloat16':
        yield "model.dtype = 'bfloat16'"
    if name == 'cudnn':
        if training and cfg.attn_pdrop:
            yield 'model.attn_pdrop = 0: its kernel has no dropout'
        if training and place.deterministic:
            yield 'train.deterministic = False: it adds gradients in no fixed order'
        if cfg.head_dim % 8 or cfg.head_dim > 128:
            yield (
                f'a head width n_embd / n_head that is a multiple of 8 up to 128, not '
                f'{cfg.head_dim}'
            )
        return
    if (training or part == 'evaluation') and place.tensor > 1:
        yield 'mesh.tensor = 1: its kernels hold whole heads and rows'
    if part in ('gelu', 'evaluation') and cfg.activation_function != 'gelu_new':
        yield "model.activation_function = 'gelu_new'"
    if part in ('attention', 'evaluation'):
        if cfg.head_dim not in HEAD_DIMS:
            yield f'a head width n_embd / n_head = 16, 32, 64 or 128, not {cfg.head_dim}'
        if place.seq_len and place.seq_len % SEQ_LEN_MULTIPLE:
            yield f'train.seq_len to be a multiple of {SEQ_LEN_MULTIPLE}, not {place.seq_len}'
    if part in ('norm', 'gelu') and place.tokens % ROWS_MULTIPLE:
        tokens = f'{place.rows} rows x {place.seq_len} tokens'
        yield f'a multiple of {ROWS_MULTIPLE:,} tokens on a device, not {tokens}'
    if name == 'hopper':  # last: the first need is reported, and these do not keep 'fused' away
        if cfg.d_ff % HOPPER_COLUMNS or cfg.n_embd % HOPPER_INNER:
            yield (
                f'n_inner to be a multiple of {HOPPER_COLUMNS} and n_embd of {HOPPER_INNER}, not '
                f'{cfg.d_ff} and {cfg.n_embd}'
            )
        if cfg.n_embd > HOPPER_WIDTH:
            yield f'n_embd up to {HOPPER_WIDTH:,} to be faster, not {cfg.n_embd:,}'
        numbers = place.tokens * cfg.n_layer * cfg.d_ff  # in a micro-batch
        if numbers and numbers * place.micro_batches < HOPPER_NUMBERS:
            yield (
                f'a run of {math.ceil(HOPPER_NUMBERS / numbers):,} micro-batches or more, to make '
                f'up for its compilation, not {place.micro_batches:,}'
            )


def choose(cfg: GPT2Config, optimizer: str, place: Place) -> tuple[Kernels, dict[str, str]]:
    """The implementation of each part, and why a part did not take a faster one, if it did not.

    `optimizer` is the setting optim.implementation; model.kernels and model.attention are in `cfg`.
    A setting of 'auto' takes the fastest that can run, any other forces its value. Raises
    UsageError if what is forced cannot run here.
    """
    chosen, reasons = {}, {}
    for part in Kernels._fields:
        options, setting = _options(part, cfg, optimizer, place)
        for name in options:
            need = next(unmet_needs(part, name, cfg, place), None)
            if need is None:
                chosen[part] = name
                break
            if setting:
                raise UsageError(
                    f"{setting} = '{name}' needs {need}; else set --config.{setting}=auto"
                )
            if reasons.get(part) == f'hopper needs {need}':
                del reasons[part]  # 'fused' lacks the same, on any GPU
            reasons.setdefault(part, f'{name} needs {need}')
    return Kernels(**chosen), reasons


def _options(
    part: str, cfg: GPT2Config, optimizer: str, place: Place
) -> tuple[tuple[str, ...], str]:
    """The implementations that may be taken, the fastest first, and the setting that forces one."""
    if part == 'optimizer':
        if optimizer == 'auto':
            return ('fused', 'optax'), ''
        return (optimizer,), 'optim.implementation'
    if part == 'decoding':  # scripts/sample.py has a flag of its own: a run is not refused for it
        return (('xla',) if cfg.kernels == 'xla' else ('fused', 'xla')), ''
    if part == 'evaluation':
        if cfg.attention == 'xla' or (cfg.attention, cfg.kernels) == ('auto', 'xla'):
            return ('xla',), ''
        is_fused = cfg.attention != 'cudnn' and cfg.kernels != 'xla'
        return (('fused', 'cudnn', 'xla') if is_fused else ('cudnn', 'xla')), ''
    if part == 'attention' and cfg.attention != 'auto':
        return (cfg.attention,), 'model.attention'
    if cfg.kernels != 'auto':
        return (cfg.kernels,), 'model.kernels'
    if part == 'attention':
        is_large = place.tokens >= CUDNN_TOKENS and place.seq_len >= CUDNN_SEQ_LEN
        return (('cudnn', 'fused', 'xla') if is_large else ('fused', 'cudnn', 'xla')), ''
    # On GPUs without such a kernel, 'hopper' is not what is missing.
    hopper = ('hopper',) if part == 'gelu' and place.micro_batches else ()
    return (*hopper, 'fused', 'xla'), ''


def evaluation_attention(cfg: GPT2Config, platform: str) -> str:
    """The attention of the plain model without a gradient, on this platform: 'cudnn' or 'xla'."""
    options, _ = _options('evaluation', cfg, 'auto', Place(platform))
    return next(
        name
        for name in options
        if name != 'fused' and not any(unmet_needs('evaluation', name, cfg, Place(platform)))
    )


def usable(cfg: GPT2Config, platform: str) -> GPT2Config:
    """The same model, with 'auto' for each setting that forces what cannot run on this platform."""
    place, changes = Place(platform), {}
    if cfg.kernels == 'fused' and any(unmet_needs('loss', 'fused', cfg, place)):
        changes['kernels'] = 'auto'
    if any(unmet_needs('attention', cfg.attention, cfg, place)):
        changes['attention'] = 'auto'
    return dataclasses.replace(cfg, **changes)
