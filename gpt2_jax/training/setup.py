"""What a configuration builds before any parameter exists: mesh, data, model, optimizer."""

import dataclasses
import math

import jax
import optax
from ml_collections import ConfigDict

from gpt2_jax.architecture import GPT2Config, flops_per_token
from gpt2_jax.data import load
from gpt2_jax.data.dataset import Dataset
from gpt2_jax.kernels.choose import (
    Kernels,
    Place,
    choose,
    evaluation_attention,
    platform_of,
    usable,
)
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import param_shapes
from gpt2_jax.parallel import partition
from gpt2_jax.parallel.devices import has_hopper_kernels
from gpt2_jax.parallel.mesh import make_mesh
from gpt2_jax.training.muon import make_muon
from gpt2_jax.training.optim import AdamW, Optimizer, make_optimizer, make_schedule
from gpt2_jax.training.step import TrainState, init_state


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The setup of a run. `shapes` and `layout` are TrainStates of shapes and of shardings.

    `kernels` names the code of each part, and `reasons` says why a faster one was not taken.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    dataset: Dataset
    model: GPT2
    kernels: Kernels
    reasons: dict[str, str]
    schedule: optax.Schedule
    optimizer: Optimizer
    shapes: TrainState
    layout: TrainState

    @property
    def device(self) -> jax.Device:
        """The first device of this process; the others of the mesh are like it."""
        return self.mesh.local_devices[0]

    @property
    def tokens_per_step(self) -> int:
        """B T."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def rows_per_micro_batch(self) -> int:
        """B / grad_accum_steps: the rows that one forward pass holds."""
        return self.config.train.batch_size // self.config.train.grad_accum_steps

    @property
    def flops_per_token(self) -> int:
        """Model FLOPs of one training token: see architecture.flops_per_token."""
        return flops_per_token(self.model.cfg, self.config.train.seq_len)

    @property
    def eval_tokens(self) -> int:
        """The targets of an evaluation: eval.tokens, or the whole validation split."""
        n_targets = len(self.dataset.val) - 1
        return min(n_targets, self.config.eval.tokens or n_targets)

    @property
    def averages(self) -> bool:
        """Whether the state has an average of the parameters."""
        return self.shapes.average is not None

    @property
    def batch_options(self) -> dict[str, int | str]:
        """What addresses the batches of this run: the options of feed.train_batch."""
        train = self.config.train
        return {
            'seed': train.seed,
            'order': train.order,
            'batch_size': train.batch_size,
            'seq_len': train.seq_len,
        }


def build(config: ConfigDict, dataset: Dataset | None = None) -> Setup:
    """The setup that a resolved configuration describes. Loads the data, unless they are given.

    Raises UserError for data that cannot be read, UsageError for a mesh larger than the machine and
    for kernels that cannot run on it.
    """
    mesh = make_mesh(**config.mesh)
    dataset = dataset or load.load_dataset(**config.data)
    cfg = GPT2Config(**config.model, vocab_size=dataset.tokenizer.vocab_size)
    kernels, reasons = choose(cfg, config.optim.implementation, place_of(config, mesh))
    attention = evaluation_attention(cfg, platform_of(mesh.devices.flat[0]))
    model = GPT2(cfg, fast_ops(attention))
    schedule = build_schedule(config)
    optimizer = _build_optimizer(config, cfg, kernels, schedule, mesh)
    averages = config.optim.average > 0
    shapes = jax.eval_shape(
        lambda params: init_state(params, optimizer, averages), param_shapes(cfg)
    )
    layout = partition.shardings(mesh, shapes)
    return Setup(
        config, mesh, dataset, model, kernels, reasons, schedule, optimizer, shapes, layout
    )


def fit_to_machine(config: ConfigDict, vocab_size: int) -> ConfigDict:
    """A copy of a saved configuration that runs on this machine.

    Without the GPU that it was trained on, XLA computes what its kernels did. With fewer devices
    than it was trained on, one computes all.
    """
    config = config.copy_and_resolve_references()
    cfg = usable(GPT2Config(**config.model, vocab_size=vocab_size), platform_of(jax.devices()[0]))
    config.model.update(kernels=cfg.kernels, attention=cfg.attention)
    if config.optim.implementation == 'fused':
        config.optim.implementation = 'auto'  # the same state
    if math.prod(config.mesh.values()) > len(jax.devices()):
        config.mesh.update(data=1, fsdp=1, tensor=1)
    return config


def place_of(config: ConfigDict, mesh: jax.sharding.Mesh) -> Place:
    """Where the update runs: its platform, and the share of a micro-batch that a device has."""
    train, shares = config.train, mesh.shape['data'] * mesh.shape['fsdp']
    rows = train.batch_size // train.grad_accum_steps // shares
    device = mesh.devices.flat[0]
    return Place(
        platform_of(device),
        mesh.shape['tensor'],
        rows,
        train.seq_len,
        train.deterministic,
        config.optim.algorithm,
        train.steps * train.grad_accum_steps * has_hopper_kernels(device),
    )


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """AdamW's learning rate as a function of the update's number."""
    optim = config.optim
    return make_schedule(
        implementation='explicit' if optim.implementation == 'explicit' else 'optax',
        learning_rate=optim.learning_rate,
        end_learning_rate=optim.end_learning_rate,
        warmup_steps=optim.warmup_steps,
        steps=config.train.steps,
        decay=optim.decay,
        hold=optim.hold,
    )


def _build_optimizer(
    config: ConfigDict,
    cfg: GPT2Config,
    kernels: Kernels,
    schedule: optax.Schedule,
    mesh: jax.sharding.Mesh,
) -> Optimizer:
    optim = config.optim
    settings = AdamW(
        schedule, optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm
    )
    if optim.algorithm == 'muon':
        ratio = optim.muon_learning_rate / optim.learning_rate
        return make_muon(
            settings,
            kernels.optimizer,
            muon_schedule=lambda step: ratio * schedule(step),
            muon_beta=optim.muon_beta,
            dtype=cfg.compute_dtype,
            precision=cfg.precision,
        )
    if kernels.optimizer == 'fused':
        from gpt2_jax.training import fused_optim  # loads Pallas: half a second

        round_to = cfg.compute_dtype if kernels.fused_training else None
        return fused_optim.make_optimizer(settings, round_to, mesh)
    return make_optimizer(settings, kernels.optimizer)
