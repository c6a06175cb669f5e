"""One update and one evaluation step, as pure functions.

    train_step(state, batch) -> (state, metrics)        eval_step(params, batch) -> nats_B

A batch holds `inputs` and `targets`, int32 (B, T), and in evaluation a `mask`, float32 (B, T).

An update is made of three functions: `plain_value_and_grad` takes the model forwards and backwards
through a micro-batch, `accumulate` adds micro-batches up, and `make_train_step` adds the optimizer
of optim.py. programs.py puts them together for a run.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.loss import map_logits, summed_loss, token_losses
from gpt2_jax.parallel.feed import Batch
from gpt2_jax.training.optim import (
    DirectOptimizer,
    Optimizer,
    apply_update,
    as_parameters,
    average_in,
    join_kernels,
    round_kernels,
)


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes. `step` counts the updates done.

    `average` is the average of the parameters over updates (see optim.average_in), or None.
    `rounded` holds the matrices in the compute dtype if AdamW's kernel writes them: reading the
    parameters again to round them would take 1 % of an update. A checkpoint does not hold `rounded`
    (see `round_again`).
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    average: dict | None = None
    rounded: dict | None = None

    @property
    def evaluated(self):
        """The parameters to evaluate, sample from and publish: the average, if there is one."""
        return self.params if self.average is None else self.average

    @property
    def used(self):
        """The parameters that an update computes its loss with."""
        return self.params if self.rounded is None else join_kernels(self.rounded, self.params)

    def round_again(self):
        """The same state, with `rounded` made again from the parameters, in the same dtype."""
        if self.rounded is None:
            return self
        dtype = jax.tree.leaves(self.rounded)[0].dtype
        return self.replace(rounded=round_kernels(self.params, dtype))


def init_state(params, optimizer: Optimizer, averages: bool = False) -> TrainState:
    """The state before the first update, with an average of the parameters if `averages`."""
    # Copied, because an update reuses the memory of each array in the state.
    average = jax.tree.map(jnp.copy, params) if averages else None
    round_to = optimizer.round_to if isinstance(optimizer, DirectOptimizer) else None
    rounded = round_kernels(params, round_to) if round_to else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, rounded)


def make_token_losses(model: GPT2, unshard: Callable, chunk_targets: int = 0) -> Callable:
    """The function losses(params, batch, dropout_key=None) -> losses_BT, in nats per target.

    `unshard` gathers parameters that are spread over devices (see partition.make_unshard); on one
    device it changes nothing. If `chunk_targets` is not 0, the losses are computed over chunks of
    at most `chunk_targets` targets (see model/loss.py).
    """

    def losses(params, batch: Batch, dropout_key=None):
        if chunk_targets:
            x_BTD, wte_VD = head_inputs(model, unshard(params), batch['inputs'], dropout_key)
            precision = model.cfg.precision
            return map_logits(
                token_losses, x_BTD, wte_VD, batch['targets'], precision, chunk_targets
            )
        logits_BTV = model.apply({'params': unshard(params)}, batch['inputs'], dropout_key)
        return token_losses(logits_BTV, batch['targets'])

    return losses


def head_inputs(model: GPT2, params, tokens_BT, dropout_key=None):
    """The operands of the head, in its dtype: final hidden states x_BTD and embedding wte_VD."""
    x_BTD, _ = model.apply(
        {'params': params}, tokens_BT, dropout_key=dropout_key, method='features'
    )
    return x_BTD, params['wte']['embedding'].astype(model.cfg.compute_dtype)


def plain_value_and_grad(
    model: GPT2, unshard: Callable = lambda params: params, chunk_targets: int = 0
) -> Callable:
    """value_and_grad(params, batch, dropout_key, n_targets) -> (loss, grads): JAX differentiates.

    `batch` is one micro-batch, and B is its number of rows. The loss is the sum of the losses of
    its targets, divided by `n_targets`, the number of targets of all micro-batches together.
    `unshard` and `chunk_targets` are as in `make_token_losses`.
    """
    losses = make_token_losses(model, unshard)

    def mean_loss(params, batch: Batch, dropout_key, n_targets):
        if not chunk_targets:
            return losses(params, batch, dropout_key).sum() / n_targets
        x_BTD, wte_VD = head_inputs(model, unshard(params), batch['inputs'], dropout_key)
        precision = model.cfg.precision
        return summed_loss(x_BTD, wte_VD, batch['targets'], precision, chunk_targets) / n_targets

    return jax.value_and_grad(mean_loss)


def accumulate(value_and_grad: Callable, grad_accum_steps: int) -> Callable:
    """loss_and_grads(params, batch, step_key, n_targets) -> (loss, grads), over micro-batches.

    The rows of the batch are processed in `grad_accum_steps` equal micro-batches by one lax.scan,
    and their gradients are added in fp32. Micro-batch m has the dropout key fold_in(step_key, m).
    `value_and_grad` is called like the function that `plain_value_and_grad` returns.
    """

    def loss_and_grads(params, batch: Batch, step_key, n_targets: int):
        def micro_step(index, micro_batch):
            return value_and_grad(
                params, micro_batch, jax.random.fold_in(step_key, index), n_targets
            )

        def add_micro_step(total, indexed):
            loss, grads = micro_step(*indexed)
            return jax.tree.map(jnp.add, total, (loss, as_parameters(grads, params))), None

        if grad_accum_steps == 1:
            return micro_step(0, batch)
        micro_batches = jax.tree.map(lambda x: split_rows(x, grad_accum_steps), batch)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        indexed = jnp.arange(grad_accum_steps), micro_batches
        return jax.lax.scan(add_micro_step, (jnp.float32(0), zero), indexed)[0]

    return loss_and_grads


def split_rows(x, n: int):
    """(B, ..) -> (n, B / n, ..): micro-batch m has the rows m, m + n, m + 2 n, ..

    A device holds consecutive rows, so it holds an equal share of each micro-batch.
    """
    return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def make_train_step(
    loss_and_grads: Callable,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    *,
    seed: int,
    average: float = 0.0,
) -> Callable:
    """The function train_step(state, batch) -> (state, metrics). Donate the state to jit.

    `loss_and_grads` (see `accumulate`) returns the mean loss over all B T targets and its gradient.
    Dropout keys are a function of (seed, step, micro-batch) alone, so a restarted run draws the
    same masks.

    The metrics are fp32 scalars: the loss in nats per token, the learning_rate of this update, and
    three global norms: grad_norm (the gradient before clipping), update_norm (the change of the
    parameters) and param_norm (the new parameters). `schedule` only reports the learning rate; the
    optimizer was built with the same schedule and counts its own updates. `average` is the decay of
    the average of the parameters, if the state has one.
    """

    def train_step(state: TrainState, batch: Batch):
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = loss_and_grads(state.used, batch, step_key, batch['targets'].size)
        params, opt_state, rounded, norms = apply_update(
            optimizer, grads, state.opt_state, state.params
        )
        metrics = {'loss': loss, 'learning_rate': jnp.float32(schedule(state.step)), **norms}
        n, averaged = state.step + 1, state.average
        if averaged is not None:
            averaged = average_in(averaged, params, n, average)
        return TrainState(n, params, opt_state, averaged, rounded), metrics

    return train_step


def make_eval_step(
    model: GPT2, unshard: Callable = lambda params: params, chunk_targets: int = 0
) -> Callable:
    """The function eval_step(params, batch) -> nats_B: each row's loss, summed where mask is 1.

    `unshard` and `chunk_targets` are as in `make_token_losses`.
    """
    losses = make_token_losses(model, unshard, chunk_targets)
    return lambda params, batch: (losses(params, batch) * batch['mask']).sum(-1)
