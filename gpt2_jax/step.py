"""One update and one evaluation step: pure functions, no input and no output.

    train_step(state, batch) -> (state, metrics)        eval_step(params, batch) -> nats_B
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model import GPT2

# A batch: 'inputs' and 'targets', int32 (B, T), where targets are the inputs one place later in the text; for
# evaluation also 'mask' (B, T), 1.0 where the target counts.
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes. `step` counts the updates done."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def token_losses(logits_BTV, targets_BT):
    """Cross-entropy of each target in nats, -log softmax(logits)[target], in fp32: (B, T, V), (B, T) -> (B, T)."""
    # A comparison and not a look-up: it fuses with the sum over V, and its gradient is no scatter into (B, T, V).
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)


def make_train_step(model: GPT2, optimizer: optax.GradientTransformation, schedule: optax.Schedule, *, seed: int,
                    accumulate: int, gather: Callable = lambda params: params):
    """The function train_step(state, batch) -> (state, metrics), to be jitted with the state donated.

    The batch's B rows are worked off in `accumulate` equal micro-batches inside the step (one lax.scan); the
    gradient is that of the mean loss over all B T targets. Dropout keys are a function of (seed, step,
    micro-batch) alone, so a restart draws the same ones. `gather` is applied to the parameters before use: where
    they are stored in pieces, it says how they are to lie for the matrix products.

    Metrics (fp32 scalars): loss in nats per token, learning_rate, and the global norms grad_norm (before
    clipping), update_norm and param_norm (after the update).
    """

    def micro_loss(params, batch, key):
        if model.cfg.kernels == 'fused':
            from gpt2_jax import fused
            return fused.train_losses(model.cfg, gather(params), batch['inputs'], batch['targets'], key).sum()
        logits_BTV = model.apply({'params': gather(params)}, batch['inputs'], key)
        return token_losses(logits_BTV, batch['targets']).sum()

    def train_step(state: TrainState, batch: Batch):
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def accumulate_one(total, micro):
            index, micro_batch = micro
            value = jax.value_and_grad(micro_loss)(state.params, micro_batch, jax.random.fold_in(step_key, index))
            return jax.tree.map(jnp.add, total, value), None

        # Micro-batch m is the rows m, m + k, ..: each device, which holds consecutive rows, has its share of every one.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        if accumulate == 1:
            total, _ = accumulate_one((0.0, jax.tree.map(jnp.zeros_like, state.params)),
                                      (0, jax.tree.map(lambda x: x[0], micro_batches)))
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            total, _ = jax.lax.scan(accumulate_one, zero, (jnp.arange(accumulate), micro_batches))
        loss, grads = jax.tree.map(lambda x: x / batch['targets'].size, total)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        import os
        V = os.environ.get('OPT', '0')
        if V in '123':
            updates = jax.lax.optimization_barrier(updates)
        params = optax.apply_updates(state.params, updates)
        if V == '9':
            return TrainState(state.step + 1, params, opt_state), {'loss': loss}
        if V == '2':
            params = jax.lax.optimization_barrier(params)
        if V != '0':
            def norm(tree):
                return jnp.sqrt(jnp.concatenate([jnp.square(l).sum(-1).ravel() for l in jax.tree.leaves(tree)]).sum())
            metrics = {'loss': loss, 'grad_norm': norm(grads), 'update_norm': norm(updates), 'param_norm': norm(params)}
            return TrainState(state.step + 1, params, opt_state), metrics
        metrics = {
            'loss': loss,
            'learning_rate': jnp.float32(schedule(state.step)),
            'grad_norm': optax.tree.norm(grads),
            'update_norm': optax.tree.norm(updates),
            'param_norm': optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: GPT2, gather: Callable = lambda params: params):
    """The function eval_step(params, batch) -> nats_B: each row's summed loss over its unmasked targets."""

    def eval_step(params, batch: Batch):
        logits_BTV = model.apply({'params': gather(params)}, batch['inputs'])
        return (token_losses(logits_BTV, batch['targets']) * batch['mask']).sum(-1)

    return eval_step
