"""The loss over chunks of targets = the loss of all logits at once, and so are its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import rough_params, tiny, tokens

from gpt2_jax.model.loss import chunk_length, map_logits, summed_loss, token_losses
from gpt2_jax.training import programs
from gpt2_jax.training.step import make_eval_step, plain_value_and_grad

B, T, D, V = 2, 6, 8, 43


def arrays(dtype, scale=1.0):
    """x_BTD, wte_VD and targets_BT, some of which occur several times."""
    rng = np.random.default_rng(0)
    x_BTD, wte_VD = rng.normal(0, scale, (B, T, D)), rng.normal(0, 1, (V, D))
    targets_BT = rng.integers(0, V, (B, T))
    targets_BT[:, :3] = V - 1
    return jnp.asarray(x_BTD, dtype), jnp.asarray(wte_VD, dtype), targets_BT


def whole(x_BTD, wte_VD, targets_BT, precision):
    logits_BTV = jnp.einsum(
        'BTD,VD->BTV', x_BTD, wte_VD, precision=precision, preferred_element_type=jnp.float32
    )
    return token_losses(logits_BTV, targets_BT)


@functools.partial(jax.jit, static_argnums=3)
def in_chunks(x_BTD, wte_VD, targets_BT, chunk_targets):
    """Losses, a tenth of their sum and its gradients."""

    def summed(x_BTD, wte_VD):
        return 0.1 * summed_loss(x_BTD, wte_VD, targets_BT, 'highest', chunk_targets)

    nats_BT = map_logits(token_losses, x_BTD, wte_VD, targets_BT, 'highest', chunk_targets)
    return nats_BT, *jax.value_and_grad(summed, argnums=(0, 1))(x_BTD, wte_VD)


@jax.jit
def at_once(x_BTD, wte_VD, targets_BT):
    def summed(x_BTD, wte_VD):
        nats_BT = whole(x_BTD, wte_VD, targets_BT, 'highest')
        return 0.1 * nats_BT.sum(), nats_BT

    run = jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)
    (total, nats_BT), gradients = run(x_BTD, wte_VD)
    return nats_BT, total, gradients


@pytest.mark.parametrize('chunk_targets', [1, 2, 4, 5, 6, 12, 100])
@pytest.mark.parametrize('scale', [0.1, 1.0, 100.0])
def test_chunks_equal_all_logits_at_once(chunk_targets, scale):
    x_BTD, wte_VD, targets_BT = arrays(jnp.float32, scale)

    got_BT, *got = in_chunks(x_BTD, wte_VD, targets_BT, chunk_targets)
    expected_BT, *expected = at_once(x_BTD, wte_VD, targets_BT)
    np.testing.assert_allclose(got_BT, expected_BT, rtol=1e-6, atol=1e-6 * scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize('precision', ['default', 'high'])
def test_padding_of_the_table_changes_nothing(precision):
    """Logits of padding are -inf, and gradients have no rows for it."""
    x_BTD, wte_VD, targets_BT = arrays(jnp.bfloat16)

    def summed(x_BTD, wte_VD):
        return summed_loss(x_BTD, wte_VD, targets_BT, precision, 4)

    def expected_sum(x_BTD, wte_VD):
        return whole(x_BTD, wte_VD, targets_BT, precision).sum()

    (got, (dx_BTD, dwte_VD)), (expected, (x_grad, wte_grad)) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x_BTD, wte_VD)
        for f in (summed, expected_sum)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (dx_BTD.dtype, dwte_VD.dtype, dwte_VD.shape) == (jnp.bfloat16, jnp.bfloat16, (V, D))
    for a, b in ((dx_BTD, x_grad), (dwte_VD, wte_grad)):
        b = np.float32(b)
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=1e-2 * np.abs(b).max())
    likeliest_BT = map_logits(
        lambda logits, targets: logits.argmax(-1), x_BTD, -wte_VD - 1, targets_BT, precision, 4
    )
    assert likeliest_BT.max() < V


def test_the_length_of_a_chunk():
    """It divides T; each of the B rows has as many targets in a chunk."""
    assert [chunk_length((2, 6), n) for n in (1, 2, 3, 4, 6, 8, 11, 12, 99)] == [
        *(1, 1, 1, 2, 3, 3, 3, 6, 6)
    ]
    assert chunk_length((8, 128), 128) == 16
    assert chunk_length((1, 7), 5) == 1


@pytest.mark.parametrize('chunk_targets', [pytest.param(6, marks=pytest.mark.long), 36])
def test_chunks_of_the_model_change_no_value(chunk_targets):
    """With dropout, whose masks do not depend on the chunks."""
    model = tiny(vocab_size=150, n_layer=1, bias=False, resid_pdrop=0.2)
    params, ids_BT = rough_params(model), tokens(model, batch=3)
    batch = {'inputs': ids_BT, 'targets': np.roll(ids_BT, -1, 1)}
    key = jax.random.key(3)

    def run(n):
        return jax.jit(plain_value_and_grad(model, chunk_targets=n))(params, batch, key, 36)

    for got, expected in zip(*map(jax.tree.leaves, (run(chunk_targets), run(0))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6 * np.abs(expected).max())
    batch['mask'] = np.float32(np.random.default_rng(0).random((3, 12)) < 0.5)
    got_B, expected_B = (
        jax.jit(make_eval_step(model, chunk_targets=n))(params, batch) for n in (chunk_targets, 0)
    )
    np.testing.assert_allclose(got_B, expected_B, rtol=1e-6)


class Setup:
    """The parts of a setup that decide on chunks."""

    def __init__(self, vocab_size, platform, size):
        self.model = tiny(vocab_size=vocab_size)
        self.device = type('Device', (), {'platform': platform})
        self.mesh = type('Mesh', (), {'size': size})


def test_only_large_vocabularies_are_chunked():
    for training in (True, False):
        assert programs.targets_at_once(Setup(256, 'cpu', 1), training) == 0
        assert programs.targets_at_once(Setup(50257, 'cpu', 1), training) > 0
    assert programs.targets_at_once(Setup(50257, 'cpu', 2), training=True) == 0
    assert programs.targets_at_once(Setup(50257, 'gpu', 1), training=True) == 0
    assert programs.targets_at_once(Setup(50257, 'gpu', 2), training=False) > 0
