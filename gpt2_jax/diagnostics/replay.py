"""One update of a run, opened: what it saw, what every token cost, and what it changed.

A run is a function of its configuration, so any update can be computed again: from the nearest kept
checkpoint before it, by the same compiled program. On the CPU that trained, the replayed metrics
equal the recorded ones to the last digit; see `verdict` for other devices.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.origins import Origin
from gpt2_jax.errors import UserError
from gpt2_jax.lens.subject import leaf_shapes
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.parallel.feed import Batch, train_batch
from gpt2_jax.parallel.partition import make_unshard
from gpt2_jax.training import programs
from gpt2_jax.training.optim import as_parameters
from gpt2_jax.training.setup import Setup, build, fit_to_machine
from gpt2_jax.training.start import initial_state
from gpt2_jax.training.step import TrainState, make_token_losses, split_rows
from gpt2_jax.workdir import checksums, history
from gpt2_jax.workdir.checkpoints import restore_state
from gpt2_jax.workdir.storage import open_manager

METRICS = ('loss', *history.FIGURES)
# Relative difference between recorded and replayed metrics that counts as rounding, if the two were
# not computed by the same program on the same device.
TOLERANCE = 1e-3


class Tensor(NamedTuple):
    """What an update did to one parameter array.

    Norms are Euclidean. `weight` is before the update, `gradient` before clipping. `ratio` is
    update / weight, None for a weight of 0.
    """

    name: str
    shape: tuple[int, ...]
    weight: float
    gradient: float
    update: float
    ratio: float | None


def floats(metrics) -> dict[str, float]:
    """METRICS of an update, or of its record."""
    return {name: float(metrics[name]) for name in METRICS}


def complete_records(run: Path) -> dict[int, dict[str, float]]:
    """The METRICS of the updates that the run recorded, by step; of all that have each of them."""
    return {
        record['step']: floats(record)
        for record in history.read_records(run, 'train')
        if all(record.get(name) is not None for name in METRICS)
    }


@dataclasses.dataclass(frozen=True)
class OpenedStep:
    """Update number `step` of a run. B rows of T tokens; losses in nats.

    tokens_BT1 are the inputs and the last target; `starts_B` their positions in the training text,
    `origins` the files. `before_BT` and `after_BT` are the losses of the targets with the
    parameters before and after the update, both under the dropout masks of this update, so that the
    mean of the first one is the loss that training recorded. `recorded` is None if metrics.jsonl
    skipped the step.
    """

    step: int
    checkpoint: int
    recorded: dict[str, float] | None
    replayed: dict[str, float]
    tokens_BT1: np.ndarray
    starts_B: np.ndarray
    origins: list[Origin]
    before_BT: np.ndarray
    after_BT: np.ndarray
    tensors: list[Tensor]

    @property
    def largest_difference(self) -> float | None:
        """Of the replayed metrics from the recorded ones, relative; None if there is no record."""
        if self.recorded is None:
            return None
        pairs = [(self.recorded[name], self.replayed[name]) for name in METRICS]
        return max(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)

    @property
    def verdict(self) -> str:
        """Whether this is what the run computed, in words."""
        difference = self.largest_difference
        if difference is None:
            return 'no record of this step to compare with (see log.every)'
        if difference == 0:
            return 'the replayed metrics equal the recorded ones to the last digit'
        if difference <= TOLERANCE:
            return (
                f'the replayed metrics equal the recorded ones to {difference:.1e}, relative: '
                'rounding, as on another device'
            )
        return (
            f'THE REPLAY DIFFERS: by {difference:.1e}, relative. The run was not computed by this '
            'version, on this text, or with this configuration'
        )

    def worst_rows(self) -> list[int]:
        """The rows in the order of their mean loss before the update, the highest first."""
        return np.argsort(-self.before_BT.mean(1), kind='stable').tolist()


class Replay:
    """Computes updates of a run again. Compiles once; steps in ascending order are the fastest.

    `notify` receives a line when many updates must be replayed. `corpus` is as in ledger.open_run.
    """

    def __init__(
        self,
        folder: Path,
        notify: Callable[[str], None] = lambda text: None,
        corpus: str | None = None,
    ):
        self.run, self.notify = ledger.open_run(folder, corpus), notify
        self._setups = {}  # by train.steps: the programs of each configuration of an extended run
        self._at = None  # (step, state) after the last replayed update

    def setup(self, step: int) -> Setup:
        """The setup that update `step` ran with."""
        return self._programs(step).setup

    def batch(self, step: int) -> Batch:
        """The batch of update `step`."""
        setup = self.setup(step)
        return train_batch(setup.mesh, setup.dataset.train, step=step - 1, **setup.batch_options)

    def nearest(self, step: int) -> int:
        """The latest undamaged checkpoint up to `step`; 0, the initial state, if there is none."""
        folder = self.run.folder / checksums.FOLDER
        saved = [number for number in checksums.committed_steps(folder) if number <= step]
        while saved and checksums.verify(folder / str(saved[-1])) is not None:
            saved.pop()
        return saved[-1] if saved else 0

    def dropout_key(self, step: int) -> jax.Array:
        """The key of the dropout masks of update `step`."""
        return jax.random.fold_in(jax.random.key(self.run.config.train.seed), step - 1)

    def state_before(self, step: int) -> tuple[int, TrainState]:
        """The checkpoint to replay from, and the state before update `step`.

        The caller may overwrite the state: nothing else refers to it.
        """
        checkpoint = self.nearest(step - 1)
        if self._at and checkpoint <= self._at[0] < step:
            first, state = self._at
        else:
            first, state = checkpoint, self._restore(checkpoint, self.setup(step))
            if step - checkpoint > 100:
                self.notify(
                    f'replaying {step - 1 - checkpoint:,} updates from checkpoint {checkpoint:,}'
                )
        self._at = None
        for earlier in range(first + 1, step):
            state, _ = self.update(earlier, state)
        return checkpoint, state

    def update(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        """Update `step`, which overwrites the state before it: the state after it, and metrics."""
        return self._programs(step).update(state, self.batch(step))

    def losses(self, step: int, params) -> np.ndarray:
        """The losses of the targets of update `step`, under its dropout masks: (B, T)."""
        key = self.dropout_key(step)
        return np.asarray(self._programs(step).losses(params, self.batch(step), key))

    def gradient(self, step: int, params):
        """The gradient of the mean loss of update `step`, before clipping."""
        return self._programs(step).gradient(params, self.batch(step), self.dropout_key(step))

    def check(self, step: int) -> None:
        """Raises UserError if the run has not done update `step`."""
        done = history.steps_done(self.run.folder)
        if not 1 <= step <= done:
            raise UserError(
                f'{self.run.folder} has no update {step}: it has done {done:,}, counted from 1'
            )

    @allow_transfers
    def open(self, step: int) -> OpenedStep:
        """Everything about update `step`. Raises as `check`."""
        self.check(step)
        checkpoint, state = self.state_before(step)
        before = jax.tree.map(jnp.copy, state.params)
        before_BT, gradient = self.losses(step, before), self.gradient(step, before)
        state, metrics = self.update(step, state)
        after_BT = self.losses(step, state.params)
        change = jax.tree.map(jnp.subtract, state.params, before)
        norms, batch = self._programs(step).norms, self.batch(step)
        sizes = jax.device_get([norms(tree) for tree in (before, gradient, change)])
        self._at = step, state
        starts_B = ledger.row_starts(self.run.addressing, step)
        return OpenedStep(
            step=step,
            checkpoint=checkpoint,
            recorded=complete_records(self.run.folder).get(step),
            replayed=floats(metrics),
            tokens_BT1=np.concatenate([batch['inputs'], batch['targets'][:, -1:]], 1),
            starts_B=starts_B,
            origins=[self.run.where(int(start)) for start in starts_B],
            before_BT=before_BT,
            after_BT=after_BT,
            tensors=[
                Tensor(name, shape, *values, values[2] / values[0] if values[0] else None)
                for (name, shape), *values in zip(
                    leaf_shapes(before).items(),
                    *(map(float, size) for size in sizes),
                    strict=True,
                )
            ],
        )

    def _programs(self, step: int) -> 'Programs':
        config = history.config_at(self.run.folder, step)
        if config.train.steps not in self._setups:
            self._setups[config.train.steps] = make_programs(config, self.run)
        return self._setups[config.train.steps]

    def _restore(self, checkpoint: int, setup: Setup) -> TrainState:
        if checkpoint == 0:
            return initial_state(setup)
        with open_manager(self.run.folder / checksums.FOLDER, read_only=True) as manager:
            return restore_state(manager, checkpoint, programs.abstract_state(setup))


class Programs(NamedTuple):
    """The compiled functions of a setup.

    update(state, batch) -> (state, metrics), as in training. gradient(params, batch, key) -> tree,
    the gradient before clipping. losses(params, batch, key) -> (B, T). norms(tree) -> one for each
    leaf.
    """

    setup: Setup
    update: Callable
    gradient: Callable
    losses: Callable
    norms: Callable


def setup_here(config: ConfigDict, run: ledger.Run) -> Setup:
    """The setup of a run on this machine: see setup.fit_to_machine."""
    return build(fit_to_machine(config, run.dataset.tokenizer.vocab_size), run.dataset)


def make_programs(config: ConfigDict, run: ledger.Run) -> Programs:
    """The setup of a configuration on this machine, and what replaying compiles."""
    setup = setup_here(config, run)
    n, unshard = setup.config.train.grad_accum_steps, make_unshard(setup.mesh)
    chunk_targets = programs.targets_at_once(setup, training=True)
    loss_and_grads = jax.jit(programs.make_loss_and_grads(setup), static_argnums=3)
    micro_losses = jax.jit(make_token_losses(setup.model, unshard, chunk_targets))

    def gradient(params, batch, key):
        _, grads = loss_and_grads(params, batch, key, batch['targets'].size)
        return as_parameters(grads, params)

    def losses(params, batch, key):
        parts = [micro_losses(params, *part) for part in micro_batches(batch, key, n)]
        # Micro-batch m has rows m, m + n, .. of the batch.
        return jnp.stack(parts, 1).reshape(batch['targets'].shape)

    norms = jax.jit(lambda tree: [jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(tree)])
    return Programs(setup, programs.compile_train_step(setup), gradient, losses, norms)


def micro_batches(batch: Batch, key, n: int) -> Iterator[tuple[Batch, jax.Array]]:
    """The n micro-batches of an update, each with its dropout key, as train_step has them."""
    parts = {name: split_rows(x, n) for name, x in batch.items()}
    for index in range(n):
        yield {name: x[index] for name, x in parts.items()}, jax.random.fold_in(key, index)
