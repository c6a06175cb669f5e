"""What the fused GPU kernels share. They are written in Pallas (Triton), with their backward passes:

    attention_kernel    softmax(q k^T / sqrt(K), causal) v with the pattern's dropout
    norm_kernel         x + dropout(branch + bias), and its LayerNorm
    gelu_kernel         gelu_new(x + bias)
    loss_kernel         the cross-entropy of the tied head, with the gradient of the logits made in the forward pass
    adamw_kernel        the update of a parameter

They compute what model.py, step.py and optim.py spell out, in fewer passes over memory, which is where a small model's
time goes: between two matrix products stands one kernel. On a CPU they run in Pallas' interpreter: slow, and only there
to be tested against the open formulas.

The gradient of a bias or scale is a sum over all rows: each program adds up its own, and XLA the few sums of programs.
Each call is jitted by itself, so that the equal ones of all layers are traced and lowered once.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)

# A kernel's part of model.dropout_seeds: None where it drops nothing.
SEED_SPECS = {
    'words': pl.BlockSpec((2,), lambda *grid: (0,)),
    'place': pl.BlockSpec((1,), lambda *grid: (0,)),
}


def interprets() -> bool:
    """Whether kernels run in the interpreter, where there is no GPU."""
    return jax.default_backend() != 'gpu'


def call(kernel, *, warps, stages=2, **options):
    """pallas_call on a GPU; in the interpreter elsewhere."""
    return pl.pallas_call(
        kernel,
        interpret=interprets(),
        **options,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )


def only(present, specs):
    """`specs` with None for what is not there."""
    return {name: None if present[name] is None else spec for name, spec in specs.items()}


def seed_inputs(seeds):
    """The inputs of SEED_SPECS; `seeds` may be None."""
    words_2, place = (None, None) if seeds is None else seeds
    return {'words': words_2, 'place': None if place is None else jnp.reshape(place, 1)}


def seeds_of(ins):
    """The seeds again, within a kernel."""
    return (ins['words'][0], ins['words'][1]), ins['place'][0]


def column_blocks(D, most):
    """Blocks, of a power of two, that D columns are cut into: their size, and how many. The last may hold padding."""
    size = min(most, pl.next_power_of_2(D))
    return size, pl.cdiv(D, size)
