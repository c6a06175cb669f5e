"""The explicit optimizer equals optax's: the same updates, layout and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import flat, rough_params, shapes, tiny

from gpt2_jax.parallel import partition
from gpt2_jax.parallel.mesh import make_mesh
from gpt2_jax.training.optim import AdamW, make_optimizer, make_schedule

IMPLEMENTATIONS = ('optax', 'explicit')


def make(implementation, steps=100, **changes):
    settings = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0) | changes
    schedule = make_schedule(
        implementation=implementation,
        learning_rate=1e-2,
        end_learning_rate=1e-3,
        warmup_steps=10,
        steps=steps,
    )
    return make_optimizer(AdamW(schedule, **settings), implementation)


def test_equal_updates_over_100_steps():
    """From the same gradients, about half of them clipped, through warmup and cosine."""
    start = rough_params(tiny(n_layer=1))
    optimizers = [make(implementation) for implementation in IMPLEMENTATIONS]
    both = [(start, optimizer.init(start)) for optimizer in optimizers]

    @jax.jit
    def update(both, grads):
        both = [
            (params, *optimizer.update(grads, state, params))
            for (params, state), optimizer in zip(both, optimizers, strict=True)
        ]
        return [(optax.apply_updates(params, updates), state) for params, updates, state in both], [
            updates for _, updates, _ in both
        ]

    rng, clipped = np.random.default_rng(0), 0
    for step in range(100):
        spread = 10 ** rng.uniform(-4, 0)
        grads = jax.tree.map(
            lambda leaf, std=spread: np.float32(rng.normal(0, std, leaf.shape)), start
        )
        clipped += sum(np.square(leaf).sum() for leaf in flat(grads).values()) > 1
        both, updates = update(both, grads)
        for trees in (updates, [params for params, _ in both]):
            theirs, ours = map(flat, trees)
            for name, leaf in ours.items():
                assert np.linalg.norm(leaf - theirs[name]) < 1e-6 * np.linalg.norm(leaf), (
                    f'{name}, step {step}'
                )
    assert 30 < clipped < 70


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_moments_are_sharded_like_their_parameters(implementation):
    """One table of shardings serves both, because a moment's path ends in its parameter's."""
    params = shapes(tiny())
    state = jax.eval_shape(make(implementation).init, params)
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    layout, state_layout, state = (
        flat(tree)
        for tree in (partition.shardings(mesh, params), partition.shardings(mesh, state), state)
    )
    for name, leaf in flat(params).items():
        moments = [path for path in state if path.endswith('/' + name)]
        assert [(state[path].shape, state_layout[path]) for path in moments] == [
            (leaf.shape, layout[name])
        ] * 2
    counters = sum(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in state.values())
    assert counters == {'optax': 2, 'explicit': 1}[implementation]


def test_the_explicit_optimizer_keeps_its_dtypes_in_64_bit_mode():
    """JAX_ENABLE_X64=1 makes Python numbers fp64; parameters and moments must stay fp32."""
    params = {'c_fc': {'kernel': np.ones((2, 3), np.float32), 'bias': np.ones(3, np.float32)}}
    with jax.enable_x64():
        optimizer = make('explicit')
        updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    *_, (count, m, v) = state
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, m, v))} == {np.dtype('float32')}
    assert count.dtype == np.int32
