"""One update and one evaluation step, as pure functions.

    train_step(state, batch) -> (state, metrics)        eval_step(params, batch) -> nats_B

A batch holds `inputs` and `targets`, int (B, T), and in evaluation a `mask` (B, T).
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
    model: GPT2, unshard: Callable = lambda params: params, max_targets: int = 0
) -> Callable:
    """value_and_grad(params, batch, dropout_key, n_targets) -> (loss, grads): JAX differentiates.

    The loss is the sum over the targets of `batch`, a micro-batch, divided by `n_targets`, the
    number of targets in all micro-batches. `unshard` gathers stored parameters as the matrix
    products need them (see partition.make_unshard). With `max_targets`, the loss is computed over
    chunks of so many targets (see model/loss.py).
    """

    def loss(params, batch: Batch, dropout_key, n_targets):
        if max_targets:
            x_BTD, wte_VD = features(model, unshard(params), batch['inputs'], dropout_key)
            precision = model.cfg.precision
            return summed_loss(x_BTD, wte_VD, batch['targets'], precision, max_targets) / n_targets
        logits_BTV = model.apply({'params': unshard(params)}, batch['inputs'], dropout_key)
        return token_losses(logits_BTV, batch['targets']).sum() / n_targets

    return jax.value_and_grad(loss)


def make_train_step(
    value_and_grad: Callable,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    *,
    seed: int,
    grad_accum_steps: int,
) -> Callable:
    """The function train_step(state, batch) -> (state, metrics). Jit it with the state donated.

    The B rows of the batch are processed in `grad_accum_steps` equal micro-batches by one lax.scan,
    and their gradients add up to the gradient of the mean loss over all B T targets. Dropout keys
    are a function of (seed, step, micro-batch) alone, so a restarted run draws the same masks.
    `value_and_grad` has the signature of `plain_value_and_grad`'s.

    Metrics (fp32 scalars): loss in nats per token, learning_rate, and the global norms grad_norm of
    the gradient before clipping, update_norm of what is added to the parameters, and param_norm of
    the new parameters. `schedule` is for the metric only; the optimizer has its own.
    """

    def train_step(state: TrainState, batch: Batch):
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        n_targets = batch['targets'].size

        def micro_step(index, micro_batch):
            dropout_key = jax.random.fold_in(step_key, index)
            return value_and_grad(state.params, micro_batch, dropout_key, n_targets)

        def add_micro_step(total, micro):
            loss, grads = micro_step(*micro)
            return jax.tree.map(jnp.add, total, (loss, as_parameters(grads, state.params))), None

        if grad_accum_steps == 1:
            loss, grads = micro_step(0, batch)
        else:
            micro_batches = jax.tree.map(lambda x: split_rows(x, grad_accum_steps), batch)
            zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
            numbered = jnp.arange(grad_accum_steps), micro_batches
            (loss, grads), _ = jax.lax.scan(add_micro_step, zero, numbered)
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
    model: GPT2, unshard: Callable = lambda params: params, max_targets: int = 0
) -> Callable:
    """The function losses(params, batch, dropout_key=None) -> losses_BT, in nats per target.

    `unshard` and `max_targets` are as in `plain_value_and_grad`.
    """

    def losses(params, batch: Batch, dropout_key=None):
        if max_targets:
            x_BTD, wte_VD = features(model, unshard(params), batch['inputs'], dropout_key)
            precision = model.cfg.precision
            return map_logits(token_losses, x_BTD, wte_VD, batch['targets'], precision, max_targets)
        logits_BTV = model.apply({'params': unshard(params)}, batch['inputs'], dropout_key)
        return token_losses(logits_BTV, batch['targets'])

    return losses


def make_eval_step(
    model: GPT2, unshard: Callable = lambda params: params, max_targets: int = 0
) -> Callable:
    """The function eval_step(params, batch) -> nats_B: each row's loss, summed where mask is 1.

    `unshard` and `max_targets` are as in `plain_value_and_grad`.
    """
    losses = make_token_losses(model, unshard, max_targets)
    return lambda params, batch: (losses(params, batch) * batch['mask']).sum(-1)


def features(model: GPT2, params, tokens_BT, dropout_key=None):
    """The final hidden states x_BTD, and the token embedding wte_VD, in the dtype of the head."""
    x_BTD, _ = model.apply(
        {'params': params}, tokens_BT, dropout_key=dropout_key, method='features'
    )
    return x_BTD, params['wte']['embedding'].astype(model.cfg.compute_dtype)
