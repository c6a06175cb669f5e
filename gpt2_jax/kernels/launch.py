"""What the fused GPU kernels share. All but one are written in Pallas (Triton). For training:

    attention       softmax(q k^T / sqrt(K), causal) v, with dropout on the pattern
    norm            x + dropout(branch + bias), and the LayerNorm of the sum
    gelu            gelu_new(x + bias), forward by cuBLAS
    gelu_product    the product dout W^T with GELU's slope at its end, on Hopper GPUs (Mosaic GPU)
    embedding       the loss of the tied head, its gradients, and the gradient of the lookup
    adamw           the update of the parameters, and the sum of squares for clipping

with their backward passes, and for decoding one token at a time:

    decode          LayerNorm, matrix product, GELU and residual in one; attention to the cache
    sample          temperature, top_k and the draw of a token

They compute what model/gpt2.py, training/step.py, training/optim.py and inference/sampling.py spell
out, with only one kernel between two matrix products. This saves passes over memory, which take
most of a small model's time. On a CPU they run in Pallas' interpreter, slowly, so that tests can
compare them with the plain formulas.

The gradient of a bias or a scale is a sum over all rows: each program sums its own rows, and XLA
adds up the programs. Each call is jitted by itself, so that the equal calls of all layers are
traced once.
"""

import math
import sys
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxlib.triton import dialect

# For each operation of a kernel, MLIR looks for the Python module of Triton's dialect under this
# name, but jaxlib has it under another name. The 3,000 searches of the disk take longer than
# everything else in lowering a training step (0.87 -> 0.37 s, configs/shakespeare_fast.py).
sys.modules.setdefault('jaxlib.mlir.dialects.tt', dialect)

LOG2_E = math.log2(math.e)

# Bytes of shared memory that a program can have (CUDA programming guide). The first is the limit of
# an A100; an H100 has more. The second is that of GPUs with less, such as an L4 or an RTX 4090, by
# compute capability.
SHARED_MEMORY = 163 * 1024
SMALL_SHARED_MEMORY = dict.fromkeys(('8.6', '8.9', '12.0', '12.1'), 99 * 1024)

# The blocks of a dropout seed: see seed_inputs.
SEED_SPECS = {
    'words': pl.BlockSpec((2,), lambda *grid: (0,)),
    'site': pl.BlockSpec((1,), lambda *grid: (0,)),
    'row': pl.BlockSpec((1,), lambda *grid: (0,)),
}


def interprets() -> bool:
    """True if kernels run in the interpreter: there is no GPU."""
    return jax.default_backend() != 'gpu'


def shared_memory() -> int:
    """The bytes of shared memory that a program of this GPU can count on."""
    capability = getattr(jax.devices()[0], 'compute_capability', None)
    return SMALL_SHARED_MEMORY.get(capability, SHARED_MEMORY)


def call(kernel, *, warps, stages=2, **options):
    """pallas_call on a GPU, or in the interpreter elsewhere."""
    # Since 0.11 jax warns at each lowering, which comes after this call. There is nothing that a
    # user should do: setup.py holds jax below the version without this backend. The ways out are in
    # docs/architecture.md.
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprecated', DeprecationWarning)
    return pl.pallas_call(
        kernel,
        interpret=interprets(),
        **options,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )


def call_hopper(kernel, *, programs, warpgroups, name, **options):
    """A kernel of Pallas' Mosaic GPU, on a GPU or in its interpreter elsewhere.

    In it, lax.axis_index('program') and lax.axis_index('warpgroup') say which part is computed.
    """
    from jax.experimental.pallas import mosaic_gpu  # takes 0.2 s to load, only where it is used

    return mosaic_gpu.kernel(
        kernel,
        grid=(programs,),
        grid_names=('program',),
        num_threads=warpgroups,
        thread_name='warpgroup',
        kernel_name=name,
        interpret=mosaic_gpu.InterpretGPUParams() if interprets() else None,
        compiler_params=mosaic_gpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **options,
    )


def multiprocessors() -> int:
    """How many multiprocessors this GPU has; the interpreter acts as one with 2."""
    return 2 if interprets() else jax.devices()[0].core_count


def swizzled(columns, dtype):
    """The order in which Hopper's tensor cores read blocks with this many columns."""
    from jax.experimental.pallas import mosaic_gpu

    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = mosaic_gpu.find_swizzle(columns * bits)
    tiling = mosaic_gpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, mosaic_gpu.SwizzleTransform(swizzle)


def only(present, specs):
    """The spec of each input or output in `present`, or None if the array is None."""
    return {name: None if x is None else specs[name] for name, x in present.items()}


def load_or_zero(ref, mask):
    """The elements under the mask, which may be None, and 0 elsewhere."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def block_mask(rows, columns):
    """The mask of a block from those of its rows and columns, each of which may be None."""
    rows = None if rows is None else rows[:, None]
    columns = None if columns is None else columns[None, :]
    return columns if rows is None else rows if columns is None else rows & columns


def seed_inputs(seed):
    """The inputs of SEED_SPECS from a seed of dropout.dropout_seeds, which may be None."""
    if seed is None:
        return dict.fromkeys(SEED_SPECS)
    words_2, site, row = seed
    return {'words': words_2, 'site': jnp.reshape(site, 1), 'row': jnp.reshape(row, 1)}


def read_seed(ins):
    """The seed within a kernel, as dropout.keep_mask takes it."""
    return (ins['words'][0], ins['words'][1]), ins['site'][0], ins['row'][0]


def column_blocks(D, max_size):
    """(size, number) of the blocks that D columns are cut into; the last one may hold padding.

    The size is a power of two, at most `max_size`.
    """
    size = min(max_size, pl.next_power_of_2(D))
    return size, pl.cdiv(D, size)


def row_programs(kernel, N, block, max_programs):
    """The number of programs that share N rows equally, each in whole blocks of `block` rows.

    Raises ValueError if at most `max_programs` programs cannot: rows would be left out.
    """
    programs = min(max_programs, N // block)
    if not programs or N % (programs * block):
        raise ValueError(
            f'the kernel {kernel} got {N} rows; expected a multiple of {max_programs * block}, '
            f'or a multiple of {block} below that'
        )
    return programs
