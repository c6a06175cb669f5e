"""One update and one evaluation step: pure functions, no input and no output.

    train_step(state, batch) -> (state, metrics)        eval_step(params, batch) -> nats_B
"""

import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.training.optim import Optimizer, apply_update, as_parameters

# A batch: 'inputs' and 'targets', int32 (B, T), where targets are the inputs one place later in the text; for
# evaluation also 'mask' (B, T), 1.0 where the target counts.
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes. `step` counts the updates done."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(params, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def token_losses(logits_BTV, targets_BT):
    """Cross-entropy of each target in nats, -log softmax(logits)[target], in fp32: (B, T, V), (B, T) -> (B, T)."""
    # A comparison and not a look-up: it fuses with the sum over V, and its gradient is no scatter into (B, T, V).
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)


def make_train_step(model: GPT2, optimizer: Optimizer, schedule: optax.Schedule, *, seed: int,
                    accumulate: int, gather: Callable = lambda params: params):
    """The function train_step(state, batch) -> (state, metrics), to be jitted with the state donated.

    The batch's B rows are worked off in `accumulate` equal micro-batches inside the step (one lax.scan); the
    gradient is that of the mean loss over all B T targets. Dropout keys are a function of (seed, step,
    micro-batch) alone, so a restart draws the same ones. `gather` is applied to the parameters before use: where
    they are stored in pieces, it says how they are to lie for the matrix products.

    Metrics (fp32 scalars): loss in nats per token, learning_rate, and the global norms grad_norm (before
    clipping), update_norm and param_norm (after the update).
    """

    def open_loss(params, batch, dropout_key, n_targets):
        logits_BTV = model.apply({'params': gather(params)}, batch['inputs'], dropout_key)
        return token_losses(logits_BTV, batch['targets']).sum() / n_targets

    if model.cfg.kernels == 'fused':
        from gpt2_jax.training import fused_step
        value_and_grad = functools.partial(fused_step.value_and_grad, model.cfg)
    else:
        value_and_grad = jax.value_and_grad(open_loss)

    def train_step(state: TrainState, batch: Batch):
        step_key, n_targets = jax.random.fold_in(jax.random.key(seed), state.step), batch['targets'].size

        def add_one(total, micro):
            index, micro_batch = micro
            loss, grads = value_and_grad(state.params, micro_batch, jax.random.fold_in(step_key, index), n_targets)
            return jax.tree.map(jnp.add, total, (loss, as_parameters(grads, state.params))), None

        if accumulate == 1:
            loss, grads = value_and_grad(state.params, batch, jax.random.fold_in(step_key, 0), n_targets)
        else:
            # Micro-batch m is the rows m, m + k, ..: each device, which holds consecutive rows, has its share of each.
            micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(add_one, zero, (jnp.arange(accumulate), micro_batches))
        params, opt_state, norms = apply_update(optimizer, grads, state.opt_state, state.params)
        metrics = {'loss': loss, 'learning_rate': jnp.float32(schedule(state.step)), **norms}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: GPT2, gather: Callable = lambda params: params):
    """The function eval_step(params, batch) -> nats_B: each row's summed loss over its unmasked targets."""

    def eval_step(params, batch: Batch):
        logits_BTV = model.apply({'params': gather(params)}, batch['inputs'])
        return (token_losses(logits_BTV, batch['targets']) * batch['mask']).sum(-1)

    return eval_step
