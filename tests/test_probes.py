"""Probes: they change nothing, survive a kill, and say what the lens and the replay say."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import runs

from gpt2_jax import lens
from gpt2_jax.config import resolve
from gpt2_jax.diagnostics import probes
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.errors import UserError
from gpt2_jax.training.programs import new_state
from gpt2_jax.training.setup import build
from gpt2_jax.workdir.checksums import FOLDER, committed_steps
from gpt2_jax.workdir.history import read_probes
from gpt2_jax.workdir.restore import load

PROBED = {'train__probe': 6, 'model__n_layer': 2}
STEPS = [0, 1, 2, 4, 8, 16]


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    with runs.compile_once():
        yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt')


@pytest.fixture(scope='module')
def probed(text, tmp_path_factory):
    """A run with probes whose every checkpoint is kept, and what it printed."""
    run = tmp_path_factory.mktemp('probed') / 'run'
    settings = PROBED | {'checkpoint__keep': 'log', 'eval__every': 100}
    code, printed = runs.quiet_train(runs.make_config(text, **settings), run)
    assert code == 0
    return run, printed


@pytest.fixture(scope='module')
def at_eight(probed):
    """The probe of step 8, the model of that step, and the probe text."""
    run, _ = probed
    arrays = read_probes(run)
    restored = load(run, '8')
    return (
        {name: value[4] for name, value in arrays.items() if len(value) == 6 and name != 'tensors'},
        (restored.model, restored.params),
        arrays,
    )


def test_a_run_with_probes_is_the_run_without(probed, text, tmp_path):
    """Every bit of the parameters and the optimizer, every recorded metric, every sample."""
    run, printed = probed
    assert read_probes(run)['steps'].tolist() == STEPS
    assert f'{len(STEPS)} probes took ' in printed
    assert ' % of the time of this process' in printed
    config = runs.make_config(text, eval__every=100, model__n_layer=2)
    code, printed = runs.quiet_train(config, tmp_path / 'run')
    assert code == 0
    assert 'probes took' not in printed
    assert not (tmp_path / 'run' / 'probes.npz').exists()
    assert runs.different_states(run, tmp_path / 'run') == []
    assert runs.metrics(run) == runs.metrics(tmp_path / 'run')
    samples = [(folder / 'samples.txt').read_bytes() for folder in (run, tmp_path / 'run')]
    assert samples[0] == samples[1]


def test_probes_of_a_killed_run_are_those_of_an_undisturbed_one(probed, text, tmp_path):
    """Killed after a probe that no checkpoint covers, then stopped just before one."""
    run, config = tmp_path / 'run', runs.make_config(text, **PROBED, eval__every=100)
    with pytest.MonkeyPatch.context() as patch:

        def fail(state):
            if state.step == 9:
                raise RuntimeError('killed')
            return state

        runs.before_updates(patch, fail)
        with pytest.raises(RuntimeError, match='killed'):
            runs.quiet_train(config, run)
    assert committed_steps(run / FOLDER) == [5]
    assert read_probes(run)['steps'].tolist() == STEPS[:5]
    with pytest.MonkeyPatch.context() as patch:

        def stop(state):
            if state.step == 14:
                signal.raise_signal(signal.SIGTERM)
            return state

        runs.before_updates(patch, stop)
        code, printed = runs.quiet_train(config, run)
    assert code == 128 + signal.SIGTERM
    assert 'resuming from checkpoint 5 ' in printed
    assert read_probes(run)['steps'].tolist() == STEPS[:5]  # 8 was cut off, and probed again
    code, printed = runs.quiet_train(config, run)
    assert code == 0
    assert 'resuming from checkpoint 15 ' in printed
    assert runs.different_probes(run, probed[0]) == []
    assert runs.different_states(run, probed[0]) == []


def test_a_run_that_begins_again_has_no_old_probes(probed, tmp_path):
    run = shutil.copytree(probed[0], tmp_path / 'run')
    probes.cut_back(run, 4)
    assert read_probes(run)['steps'].tolist() == [0, 1, 2, 4]
    assert read_probes(run)['weight'].shape[0] == 4
    assert len(read_probes(run)['tensors']) == len(read_probes(probed[0])['tensors'])
    probes.cut_back(run, 0)
    assert not (run / 'probes.npz').exists()


def test_losses_and_ranks_are_those_of_the_lens(at_eight):
    probe, model, arrays = at_eight
    tokens = arrays['tokens']
    np.testing.assert_allclose(probe['loss'], lens.token_losses(model, tokens), atol=2e-5)
    logits = lens.logit_lens(model, tokens)[:, :, :-1]
    right = np.take_along_axis(logits, tokens[None, :, 1:, None], -1)
    # An almost equal logit may fall on either side.
    above, near = (logits > right + 1e-4).sum(-1), (logits > right - 1e-4).sum(-1)
    assert (above <= probe['rank']).all()
    assert (probe['rank'] < near).all()
    assert probe['rank'].shape == (3, *probe['loss'].shape)


def test_heads_are_those_of_the_lens(at_eight):
    probe, model, arrays = at_eight
    scores = lens.head_scores(model, rows=probes.ROWS)
    for name in ('previous', 'duplicate', 'induction'):
        np.testing.assert_allclose(probe[name], getattr(scores, name), atol=1e-5)
    patterns = lens.capture(model, arrays['tokens'], 'pattern')
    for i in range(2):
        p_RHTS = patterns[f'h_{i}.pattern']
        entropy = -(p_RHTS * np.log(np.where(p_RHTS > 0, p_RHTS, 1))).sum(-1).mean((0, 2))
        np.testing.assert_allclose(probe['entropy'][i], entropy, rtol=1e-4)


def test_norms_are_those_of_the_lens_and_of_the_replay(at_eight, probed):
    probe, model, arrays = at_eight
    names = arrays['tensors'].tolist()
    gradients = lens.gradients(model, arrays['tokens'], '*/*')
    gradients = [np.linalg.norm(gradients[name].ravel()) for name in names]
    np.testing.assert_allclose(probe['gradient'], gradients, rtol=1e-3, atol=1e-6)
    tensors = {tensor.name: tensor for tensor in Replay(probed[0]).open(8).tensors}
    updates = [tensors[name].update for name in names]
    np.testing.assert_allclose(probe['update'], updates, rtol=1e-5)
    weights = [np.linalg.norm(np.asarray(leaf).ravel()) for leaf in jax.tree.leaves(model[1])]
    np.testing.assert_allclose(probe['weight'], weights, rtol=1e-5)
    np.testing.assert_allclose(probe['ratio'], np.array(updates) / weights, rtol=1e-4)
    assert np.isnan(read_probes(probed[0])['update'][0]).all()


def test_activations_are_those_of_the_lens(at_eight):
    probe, model, arrays = at_eight
    taken = lens.capture(model, arrays['tokens'], arrays['activations'].tolist())
    for i, name in enumerate(arrays['activations']):
        x = taken[name].astype(np.float64)
        assert probe['rms'][i] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-4)
        centred = x - x.mean()
        expected = (centred**4).mean() / (centred**2).mean() ** 2
        assert probe['kurtosis'][i] == pytest.approx(expected, rel=1e-3)
        counts = probe['activation_bins'][i]
        assert counts.sum() == x.size
        scaled = x.ravel() / np.sqrt((x**2).mean())
        inner, _ = np.histogram(scaled, arrays['edges'])
        assert np.abs(counts[1:-1] - inner).sum() <= 0.01 * x.size  # rounding at an edge
        assert counts[0] == pytest.approx((scaled < -5).sum(), abs=2)
    before = lens.capture(model, arrays['tokens'], 'mlp_pre')
    dead = [(x.max((0, 1)) <= 0).mean() for x in before.values()]
    np.testing.assert_allclose(probe['dead'], dead)


def test_curvature_is_near_the_largest_eigenvalue(text):
    """On a model of a few thousand parameters; a few steps of Lanczos' method stay below it."""
    config = runs.make_config(text, model__n_embd=8, model__n_positions=8, train__seed=3)
    setup = build(resolve(config))
    measure, params = probes.Measure(setup), new_state(setup).params
    found = measure.curvature(params)
    top = lens.curvature(
        (setup.model, params), measure.curvature_tokens, by_layer=False, most=60, tolerance=1e-4
    )['all'].top
    assert 0.85 * top <= found <= 1.03 * top


def test_an_activation_that_never_varies_has_no_distribution():
    assert np.isnan(probes.kurtosis(np.ones((3, 4))))
    assert probes.bins(np.zeros(9)).sum() == 0
    assert probes.bins(np.array([np.nan, 1.0])).sum() == 0
    draw = np.random.default_rng(0).normal(size=200_000)
    assert probes.bins(draw).sum() == probes.BIN_ELEMENTS
    assert probes.kurtosis(draw) == pytest.approx(3, abs=0.1)


def test_probes_are_in_tensorboard(probed):
    counted = runs.events(probed[0])
    for step in STEPS:
        for tag in ('loss', 'curvature', 'induction/h_1.attn.1', 'dead/h_0.mlp', 'rank/embed'):
            assert counted[f'probe/{tag}', step] == 1
    assert counted['probe/update/wte/embedding', 8] == 1


def test_a_damaged_file_is_named(probed, tmp_path):
    run = shutil.copytree(probed[0], tmp_path / 'run')
    (run / 'probes.npz').write_bytes((run / 'probes.npz').read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r'probes\.npz cannot be read as the probes of a run: .*move it away'
    ):
        read_probes(run)


def test_every_array_is_documented(probed):
    """The head of probes.py names each array of the file."""
    assert all(re.search(rf'\b{name}\b', probes.__doc__) for name in read_probes(probed[0]))
    assert json.loads((probed[0] / 'config.json').read_text())['train']['probe'] == 6
