"""What a configuration builds: data, model, optimizer, mesh and the compiled functions, before any parameter exists."""

import dataclasses
import os

import jax
import optax
from ml_collections import ConfigDict

from gpt2_jax import batches, data, parallel, step
from gpt2_jax.evaluate import Evaluation, evaluate
from gpt2_jax.model import GPT2, GPT2Config, count_params, flops_per_token, init_params
from gpt2_jax.optim import Optimizer, decay_mask, make_optimizer, make_schedule
from gpt2_jax.shards import Dataset
from gpt2_jax.writers import duration

# fp32 rate of one CPU core on small matrix products, as measured on a two-core server. Only for the hint that a recipe
# was made for a GPU.
CPU_CORE_FLOPS = 45e9

ROUNDING = {'float32': 'full fp32 matrix products', 'tf32': 'TF32 matrix products, where the device has them',
            'bfloat16': 'bf16 matrix products, accumulated in fp32'}


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

    def new_state(self) -> step.TrainState:
        """The state before the first update, laid out on the mesh."""
        return jax.jit(lambda: step.init_state(init_params(self.model, self.config.train.seed), self.optimizer),
                       out_shardings=self.layout)()

    def abstract_state(self) -> step.TrainState:
        """Shape, dtype and sharding of each leaf of the state, as restoring needs them."""
        return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                            self.shapes, self.layout)

    def batch(self, index: int) -> step.Batch:
        """The batch of update number `index`, on the devices."""
        train = self.config.train
        return parallel.put_batch(self.mesh, batches.rows(self.dataset.train, seed=train.seed, step=index,
                                                          batch_size=train.batch_size, seq_len=train.seq_len))

    def train_step(self):
        """The compiled update, train_step(state, batch) -> (state, metrics); it takes over the state's memory."""
        train = self.config.train
        update = step.make_train_step(self.model, self.optimizer, self.schedule, seed=train.seed,
                                      accumulate=train.accumulate, gather=parallel.make_gather(self.mesh))
        return parallel.in_turn(self.mesh, jax.jit(update, donate_argnums=0, out_shardings=(self.layout, None)))

    def evaluator(self, stride: int | None = None):
        """The function run(params, split='val') -> Evaluation over that whole split; `stride` as in evaluate."""
        train, gather = self.config.train, parallel.make_gather(self.mesh)
        eval_step = parallel.in_turn(self.mesh, jax.jit(step.make_eval_step(self.model, gather)))

        def run(params, split: str = 'val') -> Evaluation:
            return evaluate(eval_step, params, getattr(self.dataset, split), self.dataset.tokenizer, mesh=self.mesh,
                            batch_size=train.batch_size // train.accumulate, seq_len=train.seq_len, stride=stride)

        return run


def build(config: ConfigDict, dataset: Dataset | None = None) -> Recipe:
    """Loads the data, unless it is given, and lays everything out. `config` is a resolved one. Raises UserError."""
    parallel.keep_freed_memory()
    mesh = parallel.make_mesh(**config.mesh)
    dataset = dataset or data.load(**config.data)
    model = GPT2(GPT2Config(**config.model, vocab_size=dataset.tokenizer.vocab_size))
    schedule, optim = schedule_of(config), config.optim
    optimizer = make_optimizer(implementation=optim.implementation, schedule=schedule, beta1=optim.beta1,
                               beta2=optim.beta2, eps=optim.eps, weight_decay=optim.weight_decay,
                               clip_norm=optim.clip_norm)
    shapes = jax.eval_shape(lambda: step.init_state(init_params(model, 0), optimizer))
    return Recipe(config, mesh, dataset, model, schedule, optimizer, shapes, parallel.shardings(mesh, shapes))


def describe(recipe: Recipe) -> list[str]:
    """What runs, in lines for people: device, precision, attention, data, model, optimizer, cost."""
    cfg, config, dataset, params = recipe.model.cfg, recipe.config, recipe.dataset, recipe.shapes.params
    train, tokens, flops = config.train, recipe.tokens_per_step, recipe.flops_per_token
    leaves = list(zip(jax.tree.leaves(decay_mask(params)), jax.tree.leaves(params), strict=True))
    decayed, kept = ([leaf for decays, leaf in leaves if decays is which] for which in (True, False))
    peak = parallel.peak_flops(recipe.device)
    lines = [
        f'device     {parallel.describe_device(recipe.device)}; mesh data {config.mesh.data} x fsdp {config.mesh.fsdp} '
        f'x tensor {config.mesh.tensor}; jax {jax.__version__}',
        f'precision  {cfg.dtype}: {ROUNDING[cfg.dtype]}; parameters, moments, softmax, LayerNorm and loss in fp32',
        f'attention  {cfg.attention}' + ('; blocks recomputed in the backward pass' if cfg.remat else ''),
        f'data       {dataset.name}: {len(dataset.train):,} training and {len(dataset.val):,} validation tokens, '
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
