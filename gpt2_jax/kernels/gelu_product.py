"""The MLP from its first product to its second, for Hopper GPUs such as an H100.

    u = x + bias,   h = gelu_new(u),   out = h W
    backward:  du = (dout W^T) gelu_new'(u),   dbias = sum of du over tokens,   dW = h^T dout

Elsewhere cuBLAS writes the product dout W^T to memory, and kernels/gelu.py reads it again. Here the
kernel of the product also multiplies by the slope, and writes du. It is written in Pallas' Mosaic
GPU: in Triton the same gained half as much.

Each multiprocessor runs one program of three warpgroups. The third warpgroup copies blocks of dout
and W into shared memory, up to STAGES of them ahead. The first two compute blocks of du in turn:
while one multiplies, the other computes slopes, so that the tensor cores have work meanwhile. A
warpgroup loads the u of its block into shared memory during the product, and overwrites it with du.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gpt2_jax.kernels.choose import HOPPER_COLUMNS, HOPPER_INNER
from gpt2_jax.kernels.gelu import gelu_forward, gelu_slope
from gpt2_jax.kernels.launch import call_hopper, multiprocessors, swizzled
from gpt2_jax.model.ops import matmul

# Sizes are the best of those tried on an H100; docs/speed.md has times.
ROWS, COLUMNS = 128, HOPPER_COLUMNS  # of a block of du
INNER = HOPPER_INNER  # columns of dout and W that are multiplied at a time
STAGES = 5  # pairs of blocks of dout and W in shared memory: no more fit
PART = 64  # columns of u and du that are copied at a time
SUM_COLUMNS = 8  # the fewest that tensor cores compute
# Registers of a thread that copies, and of a thread that computes. The 384 threads of a program
# start with 168 each, and 40 + 2 x 232 = 3 x 168: with more in all, a warpgroup would wait forever.
COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232


def _reciprocal(x):
    """1 / x, by fewer operations here than a division."""
    return jnp.square(lax.rsqrt(x))


def _kernel(dout, w, u, ones, du, *dbias, D, programs, blocks, u_blocks, filled, freed, u_filled):
    """dout (N, D), w (F, D), u and du (N, F), dbias (N / ROWS, F), all in the GPU's memory.

    In shared memory, `blocks` holds blocks of dout, of w, and of ones, and `u_blocks` the u, then
    the du, of each computing warpgroup, in parts of PART columns. There are three kinds of
    barriers: `filled` complete when blocks of dout and w are in shared memory, `freed` when they
    may be overwritten, and `u_filled` when a part of u is in shared memory. Each computing
    warpgroup has barriers of its own: a barrier must not complete twice before it is waited for,
    and a warpgroup does not wait for the blocks of the other.
    """
    (N, F), (dout_blocks, w_blocks, ones_blocks) = u.shape, blocks
    warpgroup, program = lax.axis_index('warpgroup'), lax.axis_index('program')
    steps, parts = D // INNER, COLUMNS // PART
    turns = lax.div(N // ROWS * (F // COLUMNS) - program + programs - 1, programs)

    def block_of(turn):
        """The row and the column of the block of du that a turn computes, counted in blocks."""
        block = program + turn * programs
        return lax.div(block, F // COLUMNS), lax.rem(block, F // COLUMNS)

    def slot_of(turn, step):
        return lax.rem(turn * steps + step, STAGES)

    def barrier(barriers, turn, slot):
        return barriers.at[lax.rem(turn, 2) * STAGES + slot]

    def fill(n, _):
        """Copies the blocks of step n, counted over all turns, and waits for their place first."""
        turn, step = lax.div(n, steps), lax.rem(n, steps)
        slot = slot_of(turn, step)

        @pl.when(n >= STAGES)
        def _():
            plgpu.barrier_wait(barrier(freed, lax.div(n - STAGES, steps), slot))

        @pl.when(turn < turns)
        def _():
            (i, j), inner = block_of(turn), pl.ds(step * INNER, INNER)
            for source, block, target in ((dout, i, dout_blocks), (w, j, w_blocks)):
                rows = pl.ds(block * target.shape[1], target.shape[1])
                done = barrier(filled, turn, slot)
                plgpu.copy_gmem_to_smem(source.at[rows, inner], target.at[slot], done)

        return _

    def compute(pair, _):
        """Computes a block of du."""
        turn = 2 * pair + warpgroup
        i, j = block_of(turn)
        rows = pl.ds(i * ROWS, ROWS)
        columns = [pl.ds(j * COLUMNS + part * PART, PART) for part in range(parts)]
        # u replaces the du of the turn before, once that is copied out of shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for part in range(parts):
            done = u_filled.at[warpgroup * parts + part]
            plgpu.copy_gmem_to_smem(u.at[rows, columns[part]], u_blocks.at[warpgroup, part], done)

        def multiply(total, step):
            slot = slot_of(turn, step)
            plgpu.barrier_wait(barrier(filled, turn, slot))
            plgpu.wgmma(total, dout_blocks.at[slot], w_blocks.at[slot].transpose((1, 0)))

        def free(step):
            plgpu.barrier_arrive(barrier(freed, turn, slot_of(turn, step)))

        def product(total):
            multiply(total, 0)

            def next_step(step, _):
                multiply(total, step)
                plgpu.wgmma_wait(1)  # only this step's product may still read its blocks
                free(step - 1)
                return _

            lax.fori_loop(1, steps, next_step, None)
            return total[...]

        dh = pl.run_scoped(product, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
        free(steps - 1)
        for part in range(parts):
            here = u_blocks.at[warpgroup, part]
            plgpu.barrier_wait(u_filled.at[warpgroup * parts + part])
            slope = gelu_slope(here[...].astype(jnp.float32), _reciprocal)
            here[...] = (dh[:, part * PART : (part + 1) * PART] * slope).astype(here.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(here, du.at[rows, columns[part]])
        for part in range(parts if dbias else 0):

            def add_rows(total, here=u_blocks.at[warpgroup, part]):
                """du^T times ones: the sum over the rows of du, in equal columns."""
                _, ones_rows = ones.shape
                for row in range(0, ROWS, ones_rows):
                    left = here.at[pl.ds(row, ones_rows)].transpose((1, 0))
                    plgpu.wgmma(total, left, ones_blocks.at[warpgroup].transpose((1, 0)))
                return total[...]

            sums = pl.run_scoped(add_rows, plgpu.ACC((PART, SUM_COLUMNS), jnp.float32))
            dbias[0][i, columns[part]] = sums.sum(1) / SUM_COLUMNS
        return _

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action='decrease')
        lax.fori_loop(0, turns * steps + STAGES, fill, None)  # the last ones only wait

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
        if dbias:
            done = u_filled.at[warpgroup * parts]
            plgpu.copy_gmem_to_smem(ones, ones_blocks.at[warpgroup], done)
            plgpu.barrier_wait(done)
        lax.fori_loop(0, lax.div(turns + 1 - warpgroup, 2), compute, None)
        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames='has_bias')
def gelu_backward(dout_ND, w_FD, u_NF, has_bias: bool):
    """(du, dbias), (N, F) and (F,), from the gradient of `out`. dbias is None without a bias.

    Raises ValueError unless N, F and D are multiples of ROWS, COLUMNS and INNER: the kernel would
    leave out the rest.
    """
    (N, D), F, dtype = dout_ND.shape, w_FD.shape[0], u_NF.dtype
    if N % ROWS or F % COLUMNS or D % INNER:
        raise ValueError(
            f'the kernel gelu_product got sizes {N}, {F}, {D}; expected multiples of {ROWS}, '
            f'{COLUMNS}, {INNER}'
        )
    programs, parts = multiprocessors(), COLUMNS // PART

    def shared(*shape):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))

    outs = [jax.ShapeDtypeStruct((N, F), dtype)]
    outs += [jax.ShapeDtypeStruct((N // ROWS, F), jnp.float32)] * has_bias
    blocks = shared(STAGES, ROWS, INNER), shared(STAGES, COLUMNS, INNER)
    ones = jnp.ones((SUM_COLUMNS, INNER), dtype)
    du_NF, *dbias = call_hopper(
        functools.partial(_kernel, D=D, programs=programs),
        programs=programs,
        warpgroups=3,
        name='gelu_product',
        out_type=outs,
        scratch_types={
            'blocks': (*blocks, shared(2, *ones.shape)),
            'u_blocks': shared(2, parts, ROWS, PART),
            'filled': plgpu.Barrier(num_arrivals=2, num_barriers=2 * STAGES),
            'freed': plgpu.Barrier(num_barriers=2 * STAGES),
            'u_filled': plgpu.Barrier(num_barriers=2 * parts),
        },
    )(dout_ND, w_FD, u_NF, ones)
    return du_NF, dbias[0].sum(0) if has_bias else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gelu_product(x_NF, bias_F, w_FD, precision):
    """gelu_new(x + bias) W: (N, F), (F,), (F, D) -> (N, D). The bias may be None.

    cuBLAS computes the forward pass. Sizes that `gelu_backward` refuses raise ValueError in the
    gradient.
    """
    return matmul(gelu_forward(x_NF, bias_F)[0], w_FD, 1, precision)


def _forward(x_NF, bias_F, w_FD, precision):
    h_NF, u_NF = gelu_forward(x_NF, bias_F)
    return matmul(h_NF, w_FD, 1, precision), (h_NF, u_NF, bias_F, w_FD)


def _backward(precision, saved, dout_ND):
    h_NF, u_NF, bias_F, w_FD = saved
    du_NF, dbias_F = gelu_backward(dout_ND, w_FD, u_NF, bias_F is not None)
    return du_NF, dbias_F, jnp.tensordot(h_NF, dout_ND, (0, 0), precision=precision)


gelu_product.defvjp(_forward, _backward)
