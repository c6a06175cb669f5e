"""Both implementations of the optimizer against its equations, written out in numpy (fp64)."""

import math

import jax
import numpy as np
import pytest
from tiny import flat, shapes, tiny

from gpt2_jax.training.optim import (
    AdamW,
    bias_correction,
    decay_mask,
    make_optimizer,
    make_schedule,
)

IMPLEMENTATIONS = pytest.mark.parametrize('implementation', ['optax', 'explicit'])


@IMPLEMENTATIONS
@pytest.mark.parametrize('decay', ['cosine', 'linear'])
@pytest.mark.parametrize(
    ('steps', 'w', 'hold'),
    [
        *((50, 10, 0.0), (50, 0, 0.0), (11, 10, 0.0), (10, 10, 0.0), (5, 10, 0.0), (1, 0, 0.0)),
        *((1, 100, 0.0), (50, 10, 0.25), (50, 0, 0.5), (11, 10, 0.9)),
    ],
)
def test_a_schedule_equals_its_formula(implementation, decay, steps, w, hold):
    """A run of up to w steps ends during the warmup."""
    peak, end = 3e-3, 2e-4
    schedule = make_schedule(
        implementation=implementation,
        learning_rate=peak,
        end_learning_rate=end,
        warmup_steps=w,
        steps=steps,
        decay=decay,
        hold=hold,
    )
    steps = max(steps, w + 1)
    h = min(w + round(hold * (steps - w)), steps - 1)
    expected = []
    for s in range(steps + 3):
        part = min((s - h) / (steps - h), 1)
        left = (1 + math.cos(math.pi * part)) / 2 if decay == 'cosine' else 1 - part
        rate = peak * (s + 1) / (w + 1) if s < w else peak
        expected.append(rate if s < h else end + (peak - end) * left)
    assert expected[h] == peak
    rates = jax.jit(jax.vmap(schedule))(np.arange(steps + 3))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_only_matrices_decay():
    mask = flat(decay_mask(shapes(tiny())))
    matrices = {'wte/embedding', 'wpe/embedding'} | {
        f'h_{i}/{part}/kernel'
        for i in range(2)
        for part in ('attn/c_attn', 'attn/c_proj', 'mlp/c_fc', 'mlp/c_proj')
    }
    assert {name for name, decays in mask.items() if decays} == matrices
    assert len(mask) - len(matrices) == 2 * 8 + 2  # biases and scales of any rank


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ('clip_norm', 'clips'), [(0.5, [True, True, False]), (1e3, [False] * 3), (0.0, [False] * 3)]
)
def test_updates_equal_their_equations(implementation, clip_norm, clips):
    beta1, beta2, eps, decay = 0.8, 0.9, 1e-3, 0.3  # large enough to matter
    schedule = make_schedule(
        implementation=implementation,
        learning_rate=0.1,
        end_learning_rate=0.01,
        warmup_steps=1,
        steps=3,
    )
    optimizer = make_optimizer(AdamW(schedule, beta1, beta2, eps, decay, clip_norm), implementation)
    rng = np.random.default_rng(0)
    sizes = {
        'c_attn': {'kernel': (3, 2), 'bias': (3, 1, 2)},
        'ln': {'scale': (3,)},
        'wte': {'embedding': (4, 3)},
    }

    def draw(std):
        return {
            part: {name: np.float32(rng.normal(0, std, size)) for name, size in leaves.items()}
            for part, leaves in sizes.items()
        }

    params = draw(1)
    expected = {name: np.float64(leaf) for name, leaf in flat(params).items()}
    m, v = ({name: 0.0 for name in expected} for _ in range(2))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for s, std in enumerate((1, 3, 0.01), 1):
        gradients = draw(std)
        updates, state = update(gradients, state, params)
        params = jax.tree.map(np.add, params, updates)

        g = {name: np.float64(leaf) for name, leaf in flat(gradients).items()}
        norm = math.sqrt(sum(np.square(leaf).sum() for leaf in g.values()))
        assert (0 < clip_norm < norm) == clips[s - 1]
        lr = float(schedule(s - 1))
        for name, p in expected.items():
            g[name] *= min(1, clip_norm / norm) if clip_norm else 1
            m[name] = beta1 * m[name] + (1 - beta1) * g[name]
            v[name] = beta2 * v[name] + (1 - beta2) * g[name] ** 2
            step = m[name] / (1 - beta1**s) / (np.sqrt(v[name] / (1 - beta2**s)) + eps)
            decays = name.endswith(('kernel', 'embedding'))
            expected[name] = p - lr * (step + (decay * p if decays else 0))
        for name, leaf in flat(params).items():
            np.testing.assert_allclose(
                leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=f'{name}, update {s}'
            )


@pytest.mark.parametrize('beta', [0.0, 0.9, 0.95, 0.999, 1 - 1e-6])
def test_bias_correction_keeps_its_digits(beta):
    s = np.arange(1, 2000)
    expected = -np.expm1(s * np.log1p(beta - 1)) if beta else np.ones_like(s)
    got = jax.jit(jax.vmap(lambda s: bias_correction(beta, s)))(s)
    np.testing.assert_allclose(got, expected, rtol=5e-7)
