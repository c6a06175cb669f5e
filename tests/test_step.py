"""One update and one evaluation step: accumulation, metrics, dropout keys, masks, learning."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import flat, rough_params, tiny, tokens

from gpt2_jax.config import default_config, resolve
from gpt2_jax.kernels.choose import FUSED, XLA
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.params import init_params
from gpt2_jax.parallel import feed
from gpt2_jax.training import programs
from gpt2_jax.training.optim import make_schedule
from gpt2_jax.training.programs import make_value_and_grad
from gpt2_jax.training.setup import build
from gpt2_jax.training.step import (
    TrainState,
    accumulate,
    init_state,
    make_eval_step,
    make_train_step,
)

SCHEDULE = make_schedule(learning_rate=1.0, end_learning_rate=0.1, warmup_steps=2, steps=10)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(SCHEDULE))  # AdamW: test_optim
SMALL = dict(n_layer=1, bias=False)  # compiles faster
MODEL, DROPPING = tiny(**SMALL), tiny(**SMALL, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)


def text_batch(seed=1):
    text_BT = tokens(MODEL, batch=8, length=9, seed=seed)
    return {'inputs': text_BT[:, :-1], 'targets': text_BT[:, 1:]}


def fresh_state(step=0) -> TrainState:
    return init_state(rough_params(MODEL), OPTIMIZER).replace(step=jnp.int32(step))


def compiled(model, grad_accum_steps, seed=0):
    return jax.jit(
        make_train_step(
            accumulate(make_value_and_grad(model), grad_accum_steps), OPTIMIZER, SCHEDULE, seed=seed
        )
    )


@pytest.fixture(scope='module')
def one_batch():
    """An update by one whole batch: state before, batch, state after, metrics."""
    before, batch = fresh_state(step=5), text_batch()
    return before, batch, *compiled(MODEL, 1)(before, batch)


def numpy_token_losses(logits_BTV, targets_BT):
    logits_BTV = np.asarray(logits_BTV, np.float64)
    logits_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    log_softmax_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    return np.take_along_axis(log_softmax_BTV, targets_BT[..., None], -1)[..., 0] * -1


def test_token_losses_equal_log_softmax():
    rng = np.random.default_rng(0)
    for scale in (1, 30, 1e4):  # far beyond what exp can hold
        logits_BTV = np.float32(rng.normal(0, scale, (3, 4, 11)))
        targets_BT = rng.integers(0, 11, (3, 4))
        expected_BT = numpy_token_losses(logits_BTV, targets_BT)
        np.testing.assert_allclose(
            token_losses(logits_BTV, targets_BT), expected_BT, rtol=1e-6, atol=1e-6 * scale
        )


@pytest.mark.parametrize('k', [2, pytest.param(4, marks=pytest.mark.long)])
def test_micro_batches_equal_one_batch(one_batch, k):
    before, batch, after, metrics = one_batch
    again, metrics_again = compiled(MODEL, k)(before, batch)
    for name, leaf in flat(again).items():
        np.testing.assert_allclose(leaf, flat(after)[name], rtol=1e-5, atol=1e-7, err_msg=name)
    for name, value in metrics_again.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5, err_msg=name)


def norm(tree) -> float:
    return math.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree)))


def test_metrics_equal_numpy(one_batch):
    before, batch, after, metrics = one_batch
    assert int(after.step) == 6
    logits_BTV = jax.jit(MODEL.apply)({'params': before.params}, batch['inputs'])
    update = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), after.params, before.params)

    def mean_loss(params):
        logits_BTV = MODEL.apply({'params': params}, batch['inputs'])
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits_BTV), batch['targets'][..., None], -1
        ).mean()

    expected = {
        'loss': numpy_token_losses(logits_BTV, batch['targets']).mean(),
        'learning_rate': float(SCHEDULE(5)),
        'grad_norm': norm(jax.jit(jax.grad(mean_loss))(before.params)),
        'update_norm': norm(update),
        'param_norm': norm(after.params),
    }
    assert expected['grad_norm'] > 0.2  # more than clipping allows
    assert set(metrics) == set(expected)
    for name, value in metrics.items():
        assert value.dtype == jnp.float32
        assert value.shape == ()
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize('k', [pytest.param(1, marks=pytest.mark.long), 2])
@jax.default_prng_impl('rbg')  # compiles faster
def test_dropout_keys_are_a_function_of_seed_step_and_micro_batch(k):
    batch, seed = text_batch(), 3
    update = compiled(DROPPING, k, seed)

    @jax.jit
    def loss_by_hand(step, micro, inputs_BT, targets_BT):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), micro)
        logits_BTV = DROPPING.apply({'params': rough_params(MODEL)}, inputs_BT, key)
        return token_losses(logits_BTV, targets_BT).mean()

    # Each row k times, so that all micro-batches (rows m, m + k, ..) are equal: only keys differ.
    repeated = {name: np.repeat(rows[:4], k, axis=0) for name, rows in batch.items()}
    losses = []
    for step in (0, 1, 7):
        after, metrics = update(fresh_state(step), repeated)
        again, _ = update(fresh_state(step), repeated)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True)
        )
        by_hand = [
            loss_by_hand(step, micro, batch['inputs'][:4], batch['targets'][:4])
            for micro in range(k)
        ]
        np.testing.assert_allclose(metrics['loss'], np.mean(by_hand), rtol=1e-5)
        losses += by_hand
    assert len({round(float(loss), 4) for loss in losses}) == 3 * k


def test_eval_step_masks():
    eval_step = jax.jit(make_eval_step(DROPPING))  # evaluation has no dropout
    batch, params = text_batch(), rough_params(MODEL)
    mask = np.float32(np.random.default_rng(0).random((8, 8)) < 0.5)
    mask[0], mask[1] = 0, 1
    nats_B = eval_step(params, batch | {'mask': mask})
    logits_BTV = jax.jit(MODEL.apply)({'params': params}, batch['inputs'])
    expected_B = (numpy_token_losses(logits_BTV, batch['targets']) * mask).sum(-1)
    np.testing.assert_allclose(nats_B, expected_B, rtol=2e-5)
    assert nats_B[0] == 0
    other = np.where(mask == 1, batch['targets'], (batch['targets'] + 1) % 11)
    assert np.array_equal(eval_step(params, batch | {'mask': mask, 'targets': other}), nats_B)


def small_config(tmp_path, **train):
    """A run on random letters."""
    letters = np.random.default_rng(0).choice(list('abcdefgh'), 400)
    (tmp_path / 'text.txt').write_text(''.join(letters))
    config = default_config()
    config.model.update(SMALL, n_head=2, n_embd=32, n_positions=8)
    config.data.corpus = str(tmp_path / 'text.txt')
    config.train.update(steps=200, batch_size=4, **train)
    config.optim.update(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=5)
    return config


def test_train_seed_reaches_parameters_batches_and_dropout(tmp_path):
    setup = build(resolve(small_config(tmp_path, seed=7)))
    cfg, state = setup.model.cfg, programs.new_state(setup)
    options = programs.DRAW_OPTIONS['cpu']
    expected = jax.jit(lambda: init_params(cfg, 7), compiler_options=options)()
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, expected))

    train = setup.dataset.train
    batch = feed.train_batch(setup.mesh, train, step=0, **setup.batch_options)
    sizes = {'order': 'keyed', 'batch_size': 4, 'seq_len': 8}
    assert np.array_equal(
        batch['inputs'], feed.train_batch(setup.mesh, train, step=0, seed=7, **sizes)['inputs']
    )

    _, metrics = programs.compile_train_step(setup)(state, batch)

    @jax.jit
    def loss_by_hand(params, batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 0)
        logits_BTV = setup.model.apply({'params': params}, batch['inputs'], key)
        return token_losses(logits_BTV, batch['targets']).mean()

    loss = loss_by_hand(expected, batch)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)


@pytest.mark.parametrize('kernels', [FUSED, XLA])
def test_xla_knows_the_options_of_a_gpu(kernels):
    """An option that a version of XLA does not know would end a run on a GPU."""
    setup = SimpleNamespace(
        kernels=kernels,
        config=SimpleNamespace(train=SimpleNamespace(deterministic=True)),
        device=SimpleNamespace(platform='gpu'),
    )
    options = programs.DRAW_OPTIONS['gpu'] | programs.compiler_options(setup, training=True)
    assert jax.jit(lambda x: -x, compiler_options=options)(1) == -1


def test_the_state_is_donated_and_one_batch_is_memorised(tmp_path):
    config = small_config(tmp_path)
    config.model.update(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    setup = build(resolve(config))
    state, train_step, batch = (
        programs.new_state(setup),
        programs.compile_train_step(setup),
        feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options),
    )
    losses = []
    for _ in range(config.train.steps):
        old = state
        state, metrics = train_step(state, batch)
        losses.append(float(metrics['loss']))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert abs(losses[0] - math.log(8)) < 0.1
    assert losses[-1] < 0.1  # the letters are random: only memory reaches this
