"""What a run compiles: the initial state, the update, and helpers to compile in the background."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import jax
import numpy as np

from gpt2_jax.kernels.choose import XLA, Kernels
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import init_params
from gpt2_jax.parallel.collectives import first_row, on_own_rows
from gpt2_jax.parallel.faults import warn_about_program
from gpt2_jax.parallel.mesh import batch_sharding, one_at_a_time
from gpt2_jax.parallel.partition import make_unshard
from gpt2_jax.progress import Progress
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import (
    TrainState,
    accumulate,
    init_state,
    make_train_step,
    plain_value_and_grad,
)

# Smaller vocabularies have all logits at once.
LARGE_VOCAB = 4096
# Targets with logits at a time: the fastest of those tried. With GPT-2's vocabulary, 4 layers of
# width 256 and 8 x 128 targets, an evaluation step takes 490 instead of 690 ms of processor time,
# an update 1,458 instead of 1,522 (2 CPU cores); it takes 51 MB for logits instead of 206.
CPU_EVAL_TARGETS, CPU_TRAIN_TARGETS = 128, 256
GPU_EVAL_TARGETS = 8192  # 1.6 GB of logits

# Options of XLA for drawing the initial state, by platform. This program runs once, so it is
# compiled with less care, to the same numbers: 6 layers of width 384 take 4 -> 2 s (CPU). On a GPU
# XLA would compile and time several kernels for each fusion: 5 -> 2.6 s (for an H100, 2 CPU cores).
DRAW_OPTIONS = {
    'cpu': {'xla_backend_optimization_level': 1},
    'gpu': {'xla_gpu_autotune_level': 0},
}


def new_state(setup: Setup) -> TrainState:
    """The state before the first update, drawn from train.seed and laid out on the mesh."""
    cfg, seed = setup.model.cfg, setup.config.train.seed
    draw = jax.jit(
        lambda: init_state(init_params(cfg, seed), setup.optimizer, setup.averages),
        out_shardings=setup.layout,
        compiler_options=DRAW_OPTIONS.get(setup.device.platform),
    )
    with Progress('compiling and drawing the parameters'):
        return jax.block_until_ready(draw())


def abstract_state(setup: Setup) -> TrainState:
    """Shape, dtype and sharding of each leaf of the state, as restoring needs them."""

    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, setup.shapes, setup.layout)


def abstract_batch(setup: Setup, rows: int, **dtypes):
    """Shape, dtype and sharding of a batch of `rows` windows.

    For example: abstract_batch(setup, 8, inputs=np.int32, targets=np.int32).
    """
    shape, sharding = (rows, setup.config.train.seq_len), batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }


def compiler_options(setup: Setup, training: bool) -> dict[str, bool | int]:
    """Options of XLA for a program of training or of evaluation.

    With fused kernels XLA does not try Triton kernels of its own for matrix products: cuBLAS is as
    fast in training and 6 % slower in evaluation, and trying takes 7 s of a start
    (shakespeare_fast.py, H100). Nor does XLA time several kernels for each of the few fusions that
    are left to it: a step takes as long, and compiling 4.2 instead of 5.1 s (124M, H100). Nor does
    it join products with a common input: of the three before cuDNN's attention it would join two,
    cut their result apart, and join its gradients (61.3 instead of 60.4 ms, 124M, 32 x 1024, H100).

    XLA times several kernels for a matrix product and takes the fastest, so two machines may take
    different ones and round differently. With train.deterministic it takes the first (a step takes
    1 to 2 % longer with GPT-2 124M, 5 % with shakespeare.py, H100). The fused kernels add in fixed
    order; XLA's scatter-add does so only with an option.
    """
    kernels, options = setup.kernels, {}
    fused = kernels.fused_training if training else kernels.evaluation == 'fused'
    if fused:
        options['xla_gpu_enable_cublaslt'] = True  # see kernels/gelu.py
        options['xla_gpu_enable_triton_gemm'] = False
        options['xla_gpu_dot_merger_threshold_mb'] = 0
        options['xla_gpu_experimental_enable_fusion_autotuner'] = False
    if setup.config.train.deterministic and setup.device.platform == 'gpu':
        options['xla_gpu_autotune_level'] = 0
        if not fused:
            options['xla_gpu_exclude_nondeterministic_ops'] = True
    return options


def targets_at_once(setup: Setup, training: bool) -> int:
    """How many targets have logits at a time; 0: all. See model/loss.py.

    Training on a GPU or on several devices takes all at once: on several devices, the gradient of
    the table would be summed over the devices once a chunk.
    """
    on_cpu = setup.device.platform == 'cpu'
    if setup.model.cfg.vocab_size < LARGE_VOCAB:
        return 0
    if training:
        return CPU_TRAIN_TARGETS if on_cpu and setup.mesh.size == 1 else 0
    return CPU_EVAL_TARGETS if on_cpu else GPU_EVAL_TARGETS


def make_value_and_grad(
    model: GPT2,
    kernels: Kernels = XLA,
    unshard: Callable = lambda params: params,
    chunk_targets: int = 0,
) -> Callable:
    """The loss and its gradient on one device: see step.plain_value_and_grad and fused_step."""
    if kernels.fused_training:
        from gpt2_jax.training import fused_step  # loads Pallas: half a second

        return functools.partial(fused_step.value_and_grad, model.cfg, kernels)
    return plain_value_and_grad(model, unshard, chunk_targets)


def make_loss_and_grads(setup: Setup) -> Callable:
    """The loss and its gradient on the mesh, over the micro-batches: see step.accumulate.

    XLA divides the plain model over a mesh by itself. Fused kernels run on each device's own rows.
    """
    # The attention of an evaluation may have a backward pass that training must not use.
    model = setup.model.clone(ops=fast_ops(setup.kernels.attention))
    value_and_grad = make_value_and_grad(
        model, setup.kernels, make_unshard(setup.mesh), targets_at_once(setup, training=True)
    )
    n = setup.config.train.grad_accum_steps
    if not setup.kernels.fused_training or setup.mesh.size == 1:
        return accumulate(value_and_grad, n)
    from gpt2_jax.training.fused_step import cast_kernels

    def on_rows(params, micro_batch, dropout_key, n_targets):
        row = first_row(len(micro_batch['inputs']))
        return value_and_grad(params, micro_batch, dropout_key, n_targets, first_row=row)

    cast = functools.partial(cast_kernels, setup.model.cfg)
    return on_own_rows(setup.mesh, accumulate(on_rows, n), cast, setup.config.train.reduce_dtype)


def compile_train_step(setup: Setup, pool: Executor | None = None) -> Callable:
    """The update, train_step(state, batch) -> (state, metrics), which reuses the state's memory.

    It is compiled at its first call or, if a pool is given, on a thread of the pool from now on.
    """
    train = setup.config.train
    update = make_train_step(
        make_loss_and_grads(setup),
        setup.optimizer,
        setup.schedule,
        seed=train.seed,
        average=setup.config.optim.average,
    )
    jitted = jax.jit(
        update,
        donate_argnums=() if debugging() else 0,  # JAX repeats an update to find its first nan
        out_shardings=(setup.layout, None),
        compiler_options=compiler_options(setup, training=True),
    )

    def arguments():
        batch = abstract_batch(setup, train.batch_size, inputs=np.int32, targets=np.int32)
        return abstract_state(setup), batch

    compiled = compile_in_background(
        pool, jitted, arguments, lambda program: warn_about_program(program, setup.device)
    )
    return one_at_a_time(setup.mesh, compiled)


def debugging() -> bool:
    """Whether JAX_DISABLE_JIT, JAX_DEBUG_NANS or JAX_DEBUG_INFS is set."""
    config = jax.config
    return config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs


def compile_in_background(
    pool: Executor | None,
    jitted,
    arguments: Callable[[], tuple],
    on_compiled: Callable = lambda compiled: None,
) -> Callable:
    """`jitted`, traced for the shapes of arguments() here and compiled on a thread of `pool`.

    A call waits for the compilation. Without a pool, or when `debugging`, returns `jitted` itself.
    XLA takes seconds to minutes for a program, mostly on one core, so several are compiled side by
    side. Tracing holds Python's lock, so on threads the traces would only delay the first program.
    """
    if pool is None or debugging():  # JAX's checks see no program that was compiled ahead
        return jitted
    lowered = jitted.lower(*arguments())

    def compile_now():
        compiled = lowered.compile()
        on_compiled(compiled)
        return compiled

    compiled = pool.submit(compile_now)
    return lambda *args: compiled.result()(*args)


@contextlib.contextmanager
def compiling() -> Iterator[ThreadPoolExecutor]:
    """Threads to compile on. An error that ends the run is reported without waiting for them."""
    pool = ThreadPoolExecutor(2, 'compile')
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
