"""A model on a mesh of GPUs, and how many of its parameters a device has; no JAX.

Letters as in model/gpt2.py. N is the number of tokens of one device's micro-batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from gpt2_jax.architecture import PRESETS, GPT2Config, parameter_shapes
from gpt2_jax.errors import UsageError
from gpt2_jax.parallel import rules

HOST = 8  # GPUs of a host

# Tokens in a vocabulary, by data.tokenizer; the characters are those of TinyShakespeare.
VOCABULARIES = {'char': 65, 'byte': 256, 'gpt2': 50257}

# The cases of docs/scale.md: size -> windows of a GPU, and the mesh axis of the first host.
SCALE_CASES = {
    'gpt2': (32, 'data'),
    'gpt2-medium': (16, 'data'),
    'gpt2-large': (16, 'fsdp'),
    'gpt2-xl': (16, 'fsdp'),
}


class Case(NamedTuple):
    """A model on a mesh. `rows` is one device's share of a micro-batch."""

    cfg: GPT2Config
    mesh: Mapping[str, int]
    rows: int
    seq_len: int
    micro_batches: int = 1
    reduce_dtype: str = 'float32'
    optimizer: str = 'auto'  # the setting optim.implementation
    algorithm: str = 'adamw'
    averages: bool = False  # whether the state has an average of the parameters

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.seq_len

    @property
    def tokens_an_update(self) -> int:
        """Tokens of an update, over all devices and micro-batches."""
        shares = self.mesh['data'] * self.mesh['fsdp']
        return self.tokens * self.micro_batches * shares


def case_of(config: ConfigDict, vocab_size: int) -> Case:
    """The case that a resolved configuration describes."""
    train, mesh = config.train, dict(config.mesh)
    rows = train.batch_size // train.grad_accum_steps // (mesh['data'] * mesh['fsdp'])
    cfg = GPT2Config(**config.model, vocab_size=vocab_size)
    optim = config.optim
    options = train.grad_accum_steps, train.reduce_dtype, optim.implementation, optim.algorithm
    return Case(cfg, mesh, rows, train.seq_len, *options, averages=optim.average > 0)


def scale_case(base: Case, size: str, devices: int) -> Case:
    """A published size on a number of devices, as docs/scale.md plans and measures it.

    Everything else is as in `base`, without micro-batches. The smaller two sizes run on a mesh of
    data, the larger two of fsdp within a host and data over hosts. Raises UsageError if that takes
    whole hosts and `devices` are not.
    """
    rows, axis = SCALE_CASES[size]
    fsdp = 1 if axis == 'data' else min(devices, HOST)
    if devices % fsdp:
        raise UsageError(
            f'{size} on {devices} GPUs: beyond one host it is planned for whole hosts of {HOST}; '
            f'give a multiple of {HOST}'
        )
    cfg = dataclasses.replace(base.cfg, **PRESETS[size], n_inner=None)
    mesh = {'data': devices // fsdp, 'fsdp': fsdp, 'tensor': 1}
    return base._replace(cfg=cfg, mesh=mesh, rows=rows, micro_batches=1)


def stored_elements(cfg: GPT2Config, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the kernels, and of all other leaves, that a device stores.

    Each moment has as many.
    """
    counts = [0, 0]
    for name, shape in parameter_shapes(cfg).items():
        counts[not name.endswith('kernel')] += rules.local_size(name, shape, mesh)
    return counts[0], counts[1]


def used_elements(cfg: GPT2Config, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the kernels, and of all other leaves, that a device multiplies by.

    They are gathered over fsdp.
    """
    return stored_elements(cfg, {**mesh, 'fsdp': 1})
