"""What a configuration builds: data, model, optimizer, mesh and the compiled functions, before any parameter exists."""

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import Executor

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from gpt2_jax.data import batches, load
from gpt2_jax.parallel import mesh
from gpt2_jax.training import step
from gpt2_jax.training.evaluate import Evaluation, evaluate
from gpt2_jax.model.gpt2 import GPT2, GPT2Config, count_params, flops_per_token, init_params
from gpt2_jax.training.optim import Optimizer, decay_mask, make_optimizer, make_schedule
from gpt2_jax.data.shards import Dataset
from gpt2_jax.workdir.log import duration

# fp32 rate of one CPU core on small matrix products, as measured on a two-core server. Only for the hint that a recipe
# was made for a GPU.
CPU_CORE_FLOPS = 45e9

ROUNDING = {'float32': 'full fp32 matrix products', 'tf32': 'TF32 matrix products, where the device has them',
            'bfloat16': 'bf16 matrix products, accumulated in fp32'}


KERNELS = {'open': 'open: those that XLA makes of model.py',
           'fused': 'fused: training by fused_step.py, decoding by decode_kernels.py, evaluation by model.py'}
ATTENTION = {('open', 'explicit'): 'explicit, as in model.py', ('open', 'cudnn'): 'cudnn',
             ('fused', 'explicit'): 'fused, as in attention_kernel.py', ('fused', 'cudnn'): 'cudnn'}


def schedule_of(config: ConfigDict) -> optax.Schedule:
    """The learning rate as a function of the update's number."""
    optim = config.optim
    return make_schedule(implementation=optim.implementation, learning_rate=optim.learning_rate,
                         end_learning_rate=optim.end_learning_rate, warmup_steps=optim.warmup_steps,
                         steps=config.train.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """The parts of a run. `shapes` and `layout` are a TrainState of shapes and one of shardings."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    dataset: Dataset
    model: GPT2
    schedule: optax.Schedule
    optimizer: Optimizer
    shapes: step.TrainState
    layout: step.TrainState

    @property
    def device(self) -> jax.Device:
        """The first device of the mesh; the others are like it."""
        return self.mesh.devices.flat[0]

    @property
    def tokens_per_step(self) -> int:
        """B T."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def flops_per_token(self) -> int:
        """Model FLOPs of one training token; see model.flops_per_token."""
        return flops_per_token(self.model.cfg, self.config.train.seq_len)

    def check(self) -> None:
        """Raises UsageError where GPU kernels are asked for in training and cannot do it; see fused_step.check."""
        model = self.config.model
        if 'fused' in (model.kernels, self.config.optim.implementation) or model.attention == 'cudnn':
            _fused().check(self.config, self.device.platform)

    @property
    def _compiler_options(self) -> dict[str, bool]:
        """With fused kernels XLA does not try its own ones for products, in training and evaluation.

        cuBLAS's are as fast in the one, 6 % slower in the other, and the trial takes seven seconds of a start
        (shakespeare_fast.py on an H100).
        """
        return {'xla_gpu_enable_triton_gemm': False} if self.model.cfg.kernels == 'fused' else {}

    def new_state(self) -> step.TrainState:
        """The state before the first update, laid out on the mesh."""
        return jax.jit(lambda: step.init_state(init_params(self.model, self.config.train.seed), self.optimizer),
                       out_shardings=self.layout)()

    def abstract_state(self) -> step.TrainState:
        """Shape, dtype and sharding of each leaf of the state, as restoring needs them."""
        return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                            self.shapes, self.layout)

    def _abstract_batch(self, rows: int, **dtypes):
        shape, sharding = (rows, self.config.train.seq_len), mesh.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}

    def batch(self, index: int) -> step.Batch:
        """The batch of update number `index`, on the devices."""
        train = self.config.train
        return mesh.put_batch(self.mesh, batches.rows(self.dataset.train, seed=train.seed, step=index,
                                                          batch_size=train.batch_size, seq_len=train.seq_len))

    def train_step(self, pool: Executor | None = None):
        """The update, train_step(state, batch) -> (state, metrics); it takes over the state's memory.

        It is compiled at the first call, or, given a pool, from now on, on a thread of that. Raises as `check` does.
        """
        train = self.config.train
        self.check()
        update = step.make_train_step(self.model, self.optimizer, self.schedule, seed=train.seed,
                                      accumulate=train.accumulate, gather=mesh.make_gather(self.mesh))
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(self.layout, None),
                         compiler_options=self._compiler_options)
        return mesh.in_turn(self.mesh, _ahead(pool, jitted, lambda: (
            self.abstract_state(), self._abstract_batch(train.batch_size, inputs=np.int32, targets=np.int32))))

    def evaluator(self, stride: int | None = None, pool: Executor | None = None):
        """The function run(params, split='val') -> Evaluation over that whole split.

        `stride` as in evaluate; `pool` as in train_step.
        """
        train, gather = self.config.train, mesh.make_gather(self.mesh)
        rows = train.batch_size // train.accumulate
        jitted = jax.jit(step.make_eval_step(self.model, gather), compiler_options=self._compiler_options)
        eval_step = mesh.in_turn(self.mesh, _ahead(pool, jitted, lambda: (
            self.abstract_state().params,
            self._abstract_batch(rows, inputs=np.int32, targets=np.int32, mask=np.float32))))

        def run(params, split: str = 'val') -> Evaluation:
            return evaluate(eval_step, params, getattr(self.dataset, split), self.dataset.tokenizer, mesh=self.mesh,
                            batch_size=rows, seq_len=train.seq_len, stride=stride)

        return run


def _fused():
    """The module, which loads Pallas: half a second that only those who use it wait."""
    from gpt2_jax.training import fused_step
    return fused


def _ahead(pool: Executor | None, jitted, shapes: Callable):
    """`jitted`; given a pool, its compilation for arguments of those shapes begins there now, and a call waits for it.

    XLA takes seconds to minutes for a program, on one core for the most part: several are compiled side by side.
    """
    if pool is None:
        return jitted
    compiled = pool.submit(lambda: jitted.lower(*shapes()).compile())
    return lambda *args: compiled.result()(*args)


def build(config: ConfigDict, dataset: Dataset | None = None) -> Recipe:
    """Loads the data, unless it is given, and lays everything out. `config` is a resolved one. Raises UserError."""
    mesh = mesh.make_mesh(**config.mesh)
    dataset = dataset or load.load(**config.data)
    model = GPT2(GPT2Config(**config.model, vocab_size=dataset.tokenizer.vocab_size))
    schedule, optim = schedule_of(config), config.optim
    make = _fused().make_optimizer if optim.implementation == 'fused' else functools.partial(
        make_optimizer, implementation=optim.implementation)
    optimizer = make(schedule=schedule, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps,
                     weight_decay=optim.weight_decay, clip_norm=optim.clip_norm)
    shapes = jax.eval_shape(lambda: step.init_state(init_params(model, 0), optimizer))
    return Recipe(config, mesh, dataset, model, schedule, optimizer, shapes, mesh.shardings(mesh, shapes))


def describe(recipe: Recipe) -> list[str]:
    """What runs, in lines for people: device, precision, attention, data, model, optimizer, cost."""
    cfg, config, dataset, params = recipe.model.cfg, recipe.config, recipe.dataset, recipe.shapes.params
    train, tokens, flops = config.train, recipe.tokens_per_step, recipe.flops_per_token
    leaves = list(zip(jax.tree.leaves(decay_mask(params)), jax.tree.leaves(params), strict=True))
    decayed, kept = ([leaf for decays, leaf in leaves if decays is which] for which in (True, False))
    peak = mesh.peak_flops(recipe.device)
    lines = [
        f'device     {mesh.describe_device(recipe.device)}; mesh data {config.mesh.data} x fsdp {config.mesh.fsdp} '
        f'x tensor {config.mesh.tensor}; jax {jax.__version__}',
        f'precision  {cfg.dtype}: {ROUNDING[cfg.dtype]}; parameters, moments, softmax, LayerNorm and loss in fp32'
        + ('; in training logits in bf16' if cfg.kernels == 'fused' else ''),
        f'kernels    {KERNELS[cfg.kernels]}',
        f'attention  {ATTENTION[cfg.kernels, cfg.attention]}'
        + ('; blocks recomputed in the backward pass' if cfg.remat else ''),
        f'data       {dataset.name}: {len(dataset.train):,} training and {len(dataset.val):,} '
        f'{"held-out training" if config.data.holdout else "validation"} tokens, '
        f'{dataset.tokenizer.name} tokenizer, vocabulary {dataset.tokenizer.vocab_size:,}',
        f'model      {count_params(params):,} parameters: {cfg.n_layer} layers, {cfg.n_head} heads, '
        f'width {cfg.n_embd}, context {cfg.n_positions}',
        f'optimizer  AdamW ({config.optim.implementation}): {len(decayed)} leaves with {count_params(decayed):,} '
        f'parameters are decayed, {len(kept)} with {count_params(kept):,} are not',
        f'step       {train.batch_size} windows x {train.seq_len} = {tokens:,} tokens'
        + (f', in {train.accumulate} micro-batches' if train.accumulate > 1 else '')
        + f'; {train.steps:,} steps = {tokens * train.steps / len(dataset.train):.1f} epochs',
        f'cost       6 x matmul weights + 12 L D T = {flops:,} FLOPs a token, {flops * tokens:.3g} a step; '
        'MFU = FLOPs a token x tokens/s / peak, the peak '
        + (f'{peak * recipe.mesh.size / 1e12:,.0f} TFLOP/s (dense bf16)' if peak else 'unknown for this device'),
    ]
    seconds = flops * tokens / (CPU_CORE_FLOPS * (os.cpu_count() or 1))
    if recipe.device.platform == 'cpu' and seconds > 2:
        lines.append(f'hint       this recipe is made for a GPU: a step takes about {seconds:.0f} s on this CPU, '
                     f'the run about {duration(seconds * train.steps)}. In minutes: --config=configs/quickstart.py')
    return lines
