"""Probes: they change nothing, survive a kill, and say what the lens and the replay say."""

import io
import json
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from gpt2_jax import lens
from gpt2_jax.config import resolve
from gpt2_jax.diagnostics import probes
from gpt2_jax.errors import UserError
from gpt2_jax.lens.readings import residual_stream as streams
from gpt2_jax.lens.readings import unembed
from gpt2_jax.training.setup import build
from gpt2_jax.workdir.checksums import FOLDER, committed_steps
from gpt2_jax.workdir.history import read_probes
from gpt2_jax.workdir.restore import load

PROBED = {'train__probe': 6, 'eval__every': 100}
STEPS = [0, 1, 2, 4, 8, 16]

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def probed(text, tmp_path_factory):
    """A run with probes whose every checkpoint is kept, and what it printed."""
    run = tmp_path_factory.mktemp('probed') / 'run'
    config = runs.make_config(text, **PROBED, checkpoint__keep='log')
    code, printed = runs.quiet_train(config, run)
    assert code == 0
    return run, printed


@pytest.mark.parametrize(('count', 'words'), [(1, '1 probe took 0.4 s, 5.0 %'), (2, '2 probes ')])
def test_the_cost_of_probes_in_words(tmp_path, count, words):
    counted = SimpleNamespace(count=count, seconds=0.4, workdir=tmp_path)
    assert probes.Probe.cost(counted, 8.0).startswith(words)


@pytest.fixture(scope='module')
def at_eight(probed):
    """The probe of step 8, the model of that step, its activations, and all arrays."""
    run, _ = probed
    arrays, restored = read_probes(run), load(run, '8')
    model = restored.model, restored.params
    constants = ('tensors', 'sizes', 'activations', 'edges', 'tokens')
    probe = {name: value[4] for name, value in arrays.items() if name not in constants}
    names = [*arrays['activations'].tolist(), 'pattern', 'mlp_pre', *streams(restored.model.cfg)]
    return probe, model, lens.capture(model, arrays['tokens'], names), arrays


def test_a_run_with_probes_is_the_run_without(probed, text, tmp_path):
    """Every bit of the parameters and the optimizer, every recorded metric, every sample."""
    run, printed = probed
    assert read_probes(run)['steps'].tolist() == STEPS
    assert f'{len(STEPS)} probes took ' in printed
    assert ' % of the time of this process' in printed
    config = runs.make_config(text, eval__every=100)
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
    run, config = tmp_path / 'run', runs.make_config(text, **PROBED)
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
    assert len(read_probes(run)['weight']) == 4
    assert len(read_probes(run)['tensors']) == len(read_probes(probed[0])['tensors'])
    probes.cut_back(run, 0)
    assert not (run / 'probes.npz').exists()


def gradient_text(arrays):
    """The first 64 tokens of the probe text: its rows have 16."""
    return arrays['tokens'][:4]


def test_losses_and_ranks_are_those_of_the_lens(at_eight):
    probe, model, taken, arrays = at_eight
    tokens = arrays['tokens']
    np.testing.assert_allclose(probe['loss'], lens.token_losses(model, tokens), atol=2e-5)
    assert probe['rank'].shape == (2, *probe['loss'].shape)
    for name, rank in zip(streams(model[0].cfg), probe['rank'], strict=True):
        logits = unembed(model, taken[name])[:, :-1]
        right = np.take_along_axis(logits, tokens[:, 1:, None], -1)
        # An almost equal logit may fall on either side.
        above, near = (logits > right + 1e-4).sum(-1), (logits > right - 1e-4).sum(-1)
        assert (above <= rank).all()
        assert (rank < near).all()


def test_heads_are_those_of_the_lens(at_eight):
    probe, model, taken, _ = at_eight
    scores = lens.head_scores(model, rows=probes.ROWS)
    for name in probes.SCORES:
        np.testing.assert_allclose(probe[name], getattr(scores, name), atol=1e-5)
    p_RHTS = taken['h_0.pattern']
    entropy = -(p_RHTS * np.log(np.where(p_RHTS > 0, p_RHTS, 1))).sum(-1).mean((0, 2))
    np.testing.assert_allclose(probe['entropy'][0], entropy, rtol=1e-4)


def test_norms_are_those_of_the_lens_and_of_the_checkpoints(at_eight, probed):
    probe, model, _, arrays = at_eight
    gradients = lens.gradients(model, gradient_text(arrays), '*/*')
    gradients = [np.linalg.norm(gradients[name].ravel()) for name in arrays['tensors']]
    np.testing.assert_allclose(probe['gradient'], gradients, rtol=1e-3, atol=1e-6)
    weights = [np.linalg.norm(np.asarray(leaf).ravel()) for leaf in jax.tree.leaves(model[1])]
    np.testing.assert_allclose(probe['weight'], weights, rtol=1e-5)
    one, two = (jax.tree.leaves(load(probed[0], step).params) for step in ('1', '2'))
    changes = zip(two, one, strict=True)
    updates = [np.linalg.norm(np.ravel(after) - np.ravel(before)) for after, before in changes]
    np.testing.assert_allclose(arrays['update'][2], updates, rtol=1e-5)
    np.testing.assert_allclose(arrays['ratio'][2], updates / arrays['weight'][2], rtol=1e-6)
    assert np.isnan(arrays['update'][0]).all()


def test_activations_are_those_of_the_lens(at_eight):
    probe, _, taken, arrays = at_eight
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
    dead = (taken['h_0.mlp_pre'].max((0, 1)) <= 0).mean()
    np.testing.assert_allclose(probe['dead'], [dead])


def test_curvature_is_near_the_largest_eigenvalue(at_eight):
    """A few steps of Lanczos' method stay below it."""
    probe, model, _, arrays = at_eight
    found = lens.curvature(model, gradient_text(arrays), by_layer=False, most=30)
    assert 0.7 * found['all'].top <= probe['curvature'] <= 1.03 * found['all'].top


def test_the_curvature_may_have_any_size():
    measure = SimpleNamespace(
        gradient_tokens=None, _gradient_at=lambda params, tokens: params * np.float32(1e25)
    )
    params = np.ones(3, np.float32)
    found = probes.Measure.curvature(measure, params, measure._gradient_at(params, None))
    assert found == pytest.approx(1e25, rel=1e-3)


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
        for tag in ('loss', 'curvature', 'induction/h_0.attn.1', 'dead/h_0.mlp', 'rank/embed'):
            assert counted[f'probe/{tag}', step] == 1
    assert counted['probe/update/wte/embedding', 8] == 1


def test_a_damaged_file_is_named(probed, tmp_path):
    data, array, objects = (probed[0] / 'probes.npz').read_bytes(), io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(objects, steps=np.array([{}], object))
    for damaged, reason in (
        (data[:-100], 'File is not a zip file'),
        (b'no zip file', 'it is damaged, or another file'),
        (array.getvalue(), 'it is damaged, or another file'),
        (objects.getvalue(), 'it is damaged, or another file'),
    ):
        (tmp_path / 'probes.npz').write_bytes(damaged)
        with pytest.raises(UserError) as error:
            read_probes(tmp_path)
        assert str(error.value).endswith(
            f'/probes.npz cannot be read as the probes of a run: {reason}; move it away, and the '
            'run records its probes from here on'
        )


def test_every_array_is_documented(probed):
    """The head of probes.py names each array of the file."""
    assert all(re.search(rf'\b{name}\b', probes.__doc__) for name in read_probes(probed[0]))
    assert json.loads((probed[0] / 'config.json').read_text())['train']['probe'] == 6


def test_windows_of_one_token_have_no_loss(probed):
    """And no warning of an empty mean."""
    arrays = read_probes(probed[0])
    probe = {name: value[0] for name, value in arrays.items()}
    empty = {name: probe[name][..., :0] for name in ('loss', 'rank')}
    names = probes.figures(probe, arrays).keys() - probes.figures(probe | empty, arrays).keys()
    assert names == {'loss', 'rank/embed', 'rank/h_0'}


def test_programs_are_compiled_for_the_device_of_the_mesh(text, monkeypatch):
    """Whatever jax.default_device is: compiled for that device, they refused the parameters."""
    monkeypatch.setattr(probes, 'compile_in_background', lambda pool, jitted, arguments: arguments)
    setup = build(resolve(runs.make_config(text)))
    params, _ = probes.Measure(setup)._looking()
    devices = {device for leaf in jax.tree.leaves(params) for device in leaf.sharding.device_set}
    assert devices == {setup.mesh.local_devices[0]}
