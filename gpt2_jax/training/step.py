"""One update and one evaluation step, as pure functions.

    train_step(state, batch) -> (state, metrics)        eval_step(params, batch) -> nats_B

A batch holds `inputs` and `targets`, int32 (B, T), and in evaluation a `mask`, float32 (B, T).
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.loss import map_logits, summed_loss, token_losses
from gpt2_jax.parallel.feed import Batch
from gpt2_jax.training.optim import Optimizer, apply_update, as_parameters


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes. `step` counts the updates done."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(params, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def plain_value_and_grad(
    model: GPT2, unshard: Callable = lambda params: params, chunk_targets: int = 0
) -> Callable:
    """value_and_grad(params, batch, dropout_key, n_targets) -> (loss, grads): JAX differentiates.

    `batch` is one micro-batch; B is its number of rows here. The loss is the sum of the losses of
    its targets, divided by `n_targets`, the number of targets of all micro-batches together.
    `unshard` gathers the stored parameters into the form in which the model multiplies by them (see
    partition.make_unshard). If `chunk_targets` is not 0, the loss is computed over chunks of at
    most `chunk_targets` targets (see model/loss.py).
    """

    def mean_loss(params, batch: Batch, dropout_key, n_targets):
        if chunk_targets:
            x_BTD, wte_VD = head_inputs(model, unshard(params), batch['inputs'], dropout_key)
            precision = model.cfg.precision
            loss = summed_loss(x_BTD, wte_VD, batch['targets'], precision, chunk_targets)
            return loss / n_targets
        logits_BTV = model.apply({'params': unshard(params)}, batch['inputs'], dropout_key)
        return token_losses(logits_BTV, batch['targets']).sum() / n_targets

    return jax.value_and_grad(mean_loss)


def make_train_step(
    value_and_grad: Callable,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    *,
    seed: int,
    grad_accum_steps: int,
) -> Callable:
    """The function train_step(state, batch) -> (state, metrics). Donate the state to jit.

    The B rows of the batch are processed in `grad_accum_steps` equal micro-batches by one lax.scan,
    and their gradients add up to the gradient of the mean loss over all B T targets. Dropout keys
    are a function of (seed, step, micro-batch) alone, so a restarted run draws the same masks.
    `value_and_grad` has the signature of `plain_value_and_grad`'s.

    The metrics are fp32 scalars: the loss in nats per token, the learning_rate of this update, and
    three global norms: grad_norm (the gradient before clipping), update_norm (the change of the
    parameters) and param_norm (the new parameters). `schedule` only reports the learning rate; the
    optimizer was built with the same schedule and counts its own updates.
    """

    def train_step(state: TrainState, batch: Batch):
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        n_targets = batch['targets'].size

        def micro_step(index, micro_batch):
            dropout_key = jax.random.fold_in(step_key, index)
            return value_and_grad(state.params, micro_batch, dropout_key, n_targets)

        def add_micro_step(total, indexed):
            loss, grads = micro_step(*indexed)
            grads = as_parameters(grads, state.params)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        if grad_accum_steps == 1:
            loss, grads = micro_step(0, batch)
        else:
            micro_batches = jax.tree.map(lambda x: split_rows(x, grad_accum_steps), batch)
            zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
            indexed = jnp.arange(grad_accum_steps), micro_batches
            (loss, grads), _ = jax.lax.scan(add_micro_step, zero, indexed)
        params, opt_state, norms = apply_update(optimizer, grads, state.opt_state, state.params)
        metrics = {'loss': loss, 'learning_rate': jnp.float32(schedule(state.step)), **norms}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def split_rows(x, n: int):
    """(B, ..) -> (n, B / n, ..): micro-batch m has the rows m, m + n, m + 2 n, ..

    A device holds consecutive rows, so it holds an equal share of each micro-batch.
    """
    return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def make_token_losses(
    model: GPT2, unshard: Callable = lambda params: params, chunk_targets: int = 0
) -> Callable:
    """The function losses(params, batch, dropout_key=None) -> losses_BT, in nats per target.

    `unshard` and `chunk_targets` are as in `plain_value_and_grad`.
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


def make_eval_step(
    model: GPT2, unshard: Callable = lambda params: params, chunk_targets: int = 0
) -> Callable:
    """The function eval_step(params, batch) -> nats_B: each row's loss, summed where mask is 1.

    `unshard` and `chunk_targets` are as in `plain_value_and_grad`.
    """
    losses = make_token_losses(model, unshard, chunk_targets)
    return lambda params, batch: (losses(params, batch) * batch['mask']).sum(-1)


def head_inputs(model: GPT2, params, tokens_BT, dropout_key=None):
    """The operands of the head, in its dtype: final hidden states x_BTD and embedding wte_VD."""
    x_BTD, _ = model.apply(
        {'params': params}, tokens_BT, dropout_key=dropout_key, method='features'
    )
    return x_BTD, params['wte']['embedding'].astype(model.cfg.compute_dtype)
