"""Muon and the average of the parameters: their equations, optax's Muon, and whole runs."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import kill_runs
import numpy as np
import optax
import pytest
import runs
from optax.contrib import MuonDimensionNumbers
from tiny import flat, rough_params, shapes, tiny

from gpt2_jax.config import resolve
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.parallel import feed, partition
from gpt2_jax.parallel.mesh import make_mesh
from gpt2_jax.training import programs
from gpt2_jax.training.muon import (
    make_muon,
    matrix_axes,
    muon_leaves,
    orthogonalize,
    stack_matrices,
    unstack_matrices,
)
from gpt2_jax.training.optim import AdamW, decay_mask
from gpt2_jax.training.setup import build
from gpt2_jax.training.start import initial_state
from gpt2_jax.training.step import init_state, make_train_step
from gpt2_jax.workdir import restore
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

SCHEDULE = optax.linear_schedule(0.1, 0.02, 3)
SETTINGS = AdamW(SCHEDULE, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3, clip_norm=1.0)
OPTIONS = {'muon_schedule': lambda step: 0.5 * SCHEDULE(step), 'muon_beta': 0.9}


def draw(rng, like, std):
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, std, leaf.shape)), like)


def newton_schulz(d):
    """The same polynomial of the singular values, by the singular value decomposition, in fp64."""
    U, S, Vt = np.linalg.svd(d, full_matrices=False)
    S /= np.sqrt(np.square(S).sum())
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U * S @ Vt


@pytest.mark.parametrize('shape', [(4, 6), (6, 4)])
def test_one_matrix_by_hand(shape):
    """Three updates, the middle one clipped, of one matrix with more outputs or inputs."""
    rng = np.random.default_rng(0)
    params = {'h_0': {'mlp': {'c_fc': {'kernel': np.float32(rng.normal(size=shape))}}}}
    optimizer = make_muon(SETTINGS, **OPTIONS)
    state, p, m = optimizer.init(params), np.float64(flat(params)['h_0/mlp/c_fc/kernel']), 0.0
    update = jax.jit(optimizer.update)
    for n, std in enumerate((0.1, 3, 0.1), 1):
        grads = draw(rng, params, std)
        before = p.copy()
        params, state, _, norms = update(grads, state, params)
        g = np.float64(flat(grads)['h_0/mlp/c_fc/kernel'])
        norm = np.linalg.norm(g)
        assert (norm > 1) == (n == 2)
        g *= min(1, 1 / norm)
        m = 0.9 * m + 0.1 * g
        d = 0.9 * m / (1 - 0.9 ** (n + 1)) + 0.1 * g / (1 - 0.9**n)
        lr = 0.5 * float(SCHEDULE(n - 1))
        p = p - lr * (0.2 * np.sqrt(6) * newton_schulz(d) + 0.3 * p)
        np.testing.assert_allclose(flat(params)['h_0/mlp/c_fc/kernel'], p, rtol=1e-4, atol=1e-5)
        expected = {'grad_norm': norm, 'update_norm': np.linalg.norm(p - before)}
        expected['param_norm'] = np.linalg.norm(p)
        assert {name: float(x) for name, x in norms.items()} == pytest.approx(expected, rel=1e-4)


def test_updates_equal_those_of_optax():
    """optax.contrib.muon leaf by leaf, and AdamW on all other leaves, in one chain with clipping.

    q, k and v are matrices of their own; the heads of a projection are rows or columns.
    """
    numbers = {
        'attn/c_attn/kernel': MuonDimensionNumbers(0, (2, 3)),
        'attn/c_proj/kernel': MuonDimensionNumbers((0, 1), 2),
        'mlp/c_fc/kernel': MuonDimensionNumbers(0, 1),
        'mlp/c_proj/kernel': MuonDimensionNumbers(0, 1),
    }

    def numbers_of(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: numbers['/'.join(key.key for key in path[-3:])], tree
        )

    params = rough_params(tiny(n_layer=1))
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: 'muon' if '/'.join(k.key for k in path[-3:]) in numbers else 'adamw', params
    )
    assert sum(label == 'muon' for label in jax.tree.leaves(labels)) == 4
    muon = optax.contrib.muon(
        OPTIONS['muon_schedule'],
        beta=0.9,
        weight_decay=0.3,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers_of,
    )
    adamw = optax.adamw(SCHEDULE, 0.8, 0.95, 1e-3, weight_decay=0.3, mask=decay_mask)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition({'muon': muon, 'adamw': adamw}, labels)
    )
    ours = make_muon(SETTINGS, **OPTIONS)

    @jax.jit
    def update(grads, ours_params, state, params, their_state):
        updates, their_state = theirs.update(grads, their_state, params)
        ours_params, state, *_ = ours.update(grads, state, ours_params)
        return ours_params, state, optax.apply_updates(params, updates), their_state

    rng, both = np.random.default_rng(0), (params, ours.init(params), params, theirs.init(params))
    for step, std in enumerate((0.01, 1, 0.01, 0.1)):
        both = update(draw(rng, params, std), *both)
        expected = flat(both[2])
        for name, leaf in flat(both[0]).items():
            error = np.linalg.norm(leaf - expected[name])
            assert error < 1e-5 * np.linalg.norm(leaf), f'{name}, step {step}'


def test_products_in_bfloat16_bring_singular_values_near_1():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24, 40)), jnp.float32)
    for dtype in ('float32', 'bfloat16'):
        near = jax.jit(orthogonalize, static_argnums=(1, 2))(x, dtype, 'highest')
        values = np.linalg.svd(near, compute_uv=False)
        assert 0.65 < values.min() < values.max() < 1.25


def test_stacked_matrices_come_back():
    tree = stack_matrices(part := muon_leaves(rough_params(tiny())))
    assert {shape: len(stack) for shape, stack in tree.items()} == {(16, 16): 8, (16, 64): 4}
    back = flat(unstack_matrices(tree, part))
    assert all(np.array_equal(leaf, back[name]) for name, leaf in flat(part).items())


def test_the_mean_gradient_and_the_average_are_sharded_like_the_parameters():
    optimizer = make_muon(SETTINGS, **OPTIONS)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, True), shapes(tiny()))
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    layout, leaves = flat(partition.shardings(mesh, state)), flat(state)
    for name, leaf in flat(state.params).items():
        copies = [path for path in leaves if path.endswith('/' + name)]
        assert len(copies) == 2 + (1 if matrix_axes(name) else 2)
        assert {(leaves[path].shape, layout[path]) for path in copies} == {
            (leaf.shape, layout[f'params/{name}'])
        }


def test_the_average_is_the_weighted_mean_of_the_parameters():
    """By weights, from the parameters after each update; with decay 0 there is no average."""
    rng, params = np.random.default_rng(0), [1.0]
    optimizer = optax.sgd(0.1)

    def loss_and_grads(params, batch, key, n):
        return params['w'][0], {'w': batch['targets'].astype(jnp.float32)}

    step = jax.jit(make_train_step(loss_and_grads, optimizer, SCHEDULE, seed=0, average=0.8))
    state = init_state({'w': jnp.ones(1)}, optimizer, True)
    assert state.evaluated is state.average
    for _ in range(60):
        state, _ = step(state, {'targets': rng.integers(-9, 9, 1)})
        params.append(float(state.params['w'][0]))
    weights, left = np.zeros(61), 1.0
    for n in range(60, -1, -1):
        weight = max(0.2, 10 / (n + 9)) if n > 1 else 1.0 if n else 0.0
        weights[n], left = left * weight, left * (1 - weight)
    assert weights.sum() == pytest.approx(1)
    assert float(state.evaluated['w'][0]) == pytest.approx(weights @ params, rel=1e-5)
    plain = init_state({'w': jnp.ones(1)}, optimizer)
    assert plain.average is None
    assert plain.evaluated is plain.params


# -- whole runs

MUON = {
    'optim__algorithm': 'muon',
    'optim__muon_learning_rate': 1e-2,
    'optim__average': 0.7,
    'optim__decay': 'linear',
    'optim__hold': 0.3,
}


EVERY = {'checkpoint__keep': 'all', 'checkpoint__every': 1, 'log__every': 1}
SHORT = {'train__steps': 8, 'eval__every': 3, 'eval__sample_tokens': 5}

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
    """A run with Muon, an average and every checkpoint."""
    folder = tmp_path_factory.mktemp('muon') / 'run'
    config = runs.make_config(text, **MUON, **EVERY, **SHORT)
    code, out = runs.quiet_train(config, folder)
    assert code == 0
    assert 'optimizer  Muon on 6 matrices' in out
    return folder


@pytest.mark.long
def test_a_run_resumes_bit_for_bit(finished, text, tmp_path):
    """From the middle: as if it had been killed after the checkpoint of step 4."""
    copy = tmp_path / 'run'
    shutil.copytree(finished, copy)
    (copy / 'summary.json').unlink()
    for step in committed_steps(copy / FOLDER):
        if step > 4:
            shutil.rmtree(copy / FOLDER / str(step))
    config = runs.make_config(text, **MUON, **EVERY, **SHORT)
    code, out = runs.quiet_train(config, copy)
    assert code == 0
    assert 'resuming from checkpoint 4' in out
    assert runs.differences(copy, finished) == []


@pytest.mark.long
def test_a_run_that_is_killed_resumes_bit_for_bit(finished, text, tmp_path):
    """kill -9 in the middle of saves, in processes of their own."""
    draw, run = random.Random(0), tmp_path / 'run'
    changes = {key.replace('__', '.'): value for key, value in (MUON | EVERY | SHORT).items()}

    def start():
        return kill_runs.start(run, text, runs.compile_cache(), runs.SMALL | changes)

    for _ in range(3):
        kill_runs.kill(start(), run, draw, in_save=True, delay=0)
    kill_runs.finish(start())
    assert runs.differences(run, finished) == []


@pytest.mark.long
def test_a_step_of_it_is_replayed_to_the_digit(finished):
    found = Replay(finished).open(7)
    assert found.checkpoint == 6
    assert found.recorded == found.replayed


@pytest.mark.long
def test_a_run_starts_from_its_average_and_its_moments(finished, text):
    """The moments continue, the average begins at the parameters, and an update can run."""
    origin = dict(
        train__init_from=str(finished), train__init_step='latest', train__init_optimizer=True
    )
    setup = build(resolve(runs.make_config(text, **MUON | origin)))
    old = flat(runs.state_at(finished, setup, 8))
    state = initial_state(setup)
    for name, leaf in flat(state).items():
        if name.startswith(('params/', 'average/')):
            assert np.array_equal(leaf, old['average/' + name.partition('/')[2]]), name
        elif '/m/' in name or '/mu/' in name:
            assert np.asarray(leaf).any(), name
            assert np.array_equal(leaf, old[name]), name
    batch = feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)
    state, metrics = programs.compile_train_step(setup)(state, batch)
    assert float(metrics['learning_rate']) == pytest.approx(3e-3 / 11)


@pytest.mark.long
def test_checkpoints_hold_the_average_that_was_evaluated(finished):
    """The saved average is that of the parameters saved for training at each step.

    Its loss is the one recorded, and the best of the run.
    """
    config = restore.load(finished, 'latest').config
    setup = build(config)
    evaluate, average, losses = make_evaluate(setup), None, {}
    for record in runs.metrics(finished):
        if record['split'] == 'val':
            losses[record['step']] = record['loss']
    steps = committed_steps(finished / FOLDER)
    assert steps == list(range(9))
    for step in steps:
        state = runs.state_at(finished, setup, step)
        trained, saved = flat(state.params), flat(restore.load(finished, str(step)).params)
        if step == 0:
            average = trained
        else:
            weight = np.float32(max(1 - 0.7, 10 / (step + 9)))
            average = {
                name: average[name] + weight * (p - average[name]) for name, p in trained.items()
            }
        for name, leaf in saved.items():
            assert np.array_equal(leaf, flat(state.average)[name])
            np.testing.assert_allclose(leaf, average[name], rtol=1e-4, atol=1e-6)
        if step in losses:
            assert evaluate(state.average).loss == pytest.approx(losses[step], rel=1e-6)
            assert evaluate(state.params).loss != pytest.approx(losses[step], rel=1e-5)
    summary = json.loads((finished / 'summary.json').read_text('utf-8'))
    assert restore.choose_step(finished, 'best') == min(losses, key=losses.get)
    assert summary['best_val_loss'] == min(losses.values())
