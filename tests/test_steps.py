"""One update, opened: the replay equals the run to the digit, and a hand computation."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from tiny import flat

from gpt2_jax.diagnostics import replay
from gpt2_jax.diagnostics.replay import METRICS, Replay
from gpt2_jax.errors import UserError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.workdir import history
from gpt2_jax.workdir.checksums import FOLDER
from gpt2_jax.workdir.restore import load


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    with runs.compile_once():
        yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt')


@pytest.fixture(scope='module')
def logged(text, tmp_path_factory):
    """A run with dropout and micro-batches, extended once, that recorded every step."""
    run = tmp_path_factory.mktemp('logged') / 'run'
    settings = {'log__every': 1, 'checkpoint__keep': 'log', 'checkpoint__keep_every': 100}
    settings |= {'train__grad_accum_steps': 2, 'eval__every': 40, 'checkpoint__every': 40}
    assert runs.quiet_train(runs.make_config(text, train__steps=40, **settings), run)[0] == 0
    longer = runs.make_config(text, train__steps=80, **settings)
    assert runs.quiet_train(longer, run, extend=True)[0] == 0
    return run


@pytest.fixture(scope='module')
def saved(text, tmp_path_factory):
    """A run without dropout whose every checkpoint is kept."""
    run = tmp_path_factory.mktemp('saved') / 'run'
    settings = {'checkpoint__keep': 'all', 'checkpoint__every': 1, 'log__every': 2}
    settings |= {'model__embd_pdrop': 0.0, 'model__resid_pdrop': 0.0, 'optim__clip_norm': 0.1}
    assert runs.quiet_train(runs.make_config(text, train__steps=6, **settings), run)[0] == 0
    return run


@pytest.fixture(scope='module')
def fifty(logged):
    """Fifty random steps, opened in ascending order."""
    steps = Replay(logged)
    return {step: steps.open(step) for step in sorted(random.Random(0).sample(range(1, 81), 50))}


def test_fifty_random_steps_equal_the_recorded_ones_to_the_digit(fifty):
    for opened in fifty.values():
        assert opened.recorded == opened.replayed
        assert opened.verdict == 'the replayed metrics equal the recorded ones to the last digit'
        assert opened.before_BT.mean() == pytest.approx(opened.recorded['loss'], rel=1e-6)
        norms = np.array([tensor.gradient for tensor in opened.tensors])
        assert np.sqrt((norms**2).sum()) == pytest.approx(opened.recorded['grad_norm'], rel=1e-5)
        norms = np.array([tensor.update for tensor in opened.tensors])
        assert np.sqrt((norms**2).sum()) == pytest.approx(opened.recorded['update_norm'], rel=1e-3)


def test_steps_in_any_order_are_the_same(logged, fifty):
    steps, order = Replay(logged), list(fifty)
    for step in (order[-1], order[1], order[2], order[20]):
        opened = steps.open(step)
        assert opened.replayed == fifty[step].replayed
        assert opened.checkpoint == fifty[step].checkpoint
        assert np.array_equal(opened.after_BT, fifty[step].after_BT)


def test_numbers_equal_a_hand_computation(saved):
    """From the saved parameters of each step, with the plain model and no code of replay.py."""
    steps = Replay(saved)
    for step in (1, 4):
        opened = steps.open(step)
        assert opened.checkpoint == step - 1
        old, new = (load(saved, str(at)) for at in (step - 1, step))
        model = GPT2(old.model.cfg)
        inputs, targets = opened.tokens_BT1[:, :-1], opened.tokens_BT1[:, 1:]

        @jax.jit
        def losses(params, model=model, inputs=inputs, targets=targets):
            log_probs_BTV = jax.nn.log_softmax(model.apply({'params': params}, inputs))
            return -jnp.take_along_axis(log_probs_BTV, targets[..., None], -1)[..., 0]

        np.testing.assert_allclose(opened.before_BT, losses(old.params), atol=2e-6)
        np.testing.assert_allclose(opened.after_BT, losses(new.params), atol=2e-6)
        grads = flat(
            jax.jit(jax.grad(lambda params, losses=losses: losses(params).mean()))(old.params)
        )
        for name, shape, weight, gradient, update, ratio in opened.tensors:
            before, after = flat(old.params)[name], flat(new.params)[name]
            assert shape == before.shape
            assert weight == pytest.approx(np.linalg.norm(before), rel=1e-5)
            assert gradient == pytest.approx(np.linalg.norm(grads[name]), rel=1e-4, abs=1e-7)
            assert update == pytest.approx(np.linalg.norm(after - before), rel=1e-5)
            assert ratio == (pytest.approx(update / weight) if weight else None)


def test_rows_are_the_text_at_their_place(saved, text):
    steps = Replay(saved)
    opened = steps.open(3)
    found = replay.to_json(steps.run, opened)
    data = text.read_bytes()
    means = [row['before_mean'] for row in found['rows']]
    assert means == sorted(means, reverse=True)
    for row in found['rows']:
        held = ''.join(row['tokens']).encode()
        assert data[row['byte'] : row['byte'] + len(held)] == held
        assert data[: row['byte']].count(b'\n') + 1 == row['line']
        assert row['before'] == pytest.approx(opened.before_BT[row['row']], abs=1e-5)


def test_a_replay_that_differs_says_so(logged, tmp_path):
    run = shutil.copytree(logged, tmp_path / 'run')
    records = (run / 'metrics.jsonl').read_text()
    value = history.read_records(run, 'train')[11]['grad_norm']
    (run / 'metrics.jsonl').write_text(records.replace(str(value), str(value * 1.01)))
    assert Replay(run).open(12).verdict.startswith('THE REPLAY DIFFERS: by 9.9e-03, relative.')
    (run / 'metrics.jsonl').write_text(records.replace(str(value), str(value * (1 + 1e-6))))
    assert 'to 1.0e-06, relative: rounding' in Replay(run).open(12).verdict


def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / 'run')
    (run / FOLDER / '3' / 'params' / 'manifest.ocdbt').write_bytes(b'')
    opened = Replay(run).open(4)
    assert opened.checkpoint == 2
    assert opened.replayed == Replay(saved).open(4).replayed
    shutil.rmtree(run / FOLDER)
    assert Replay(run).open(4).replayed == opened.replayed  # from the initial state


def test_what_cannot_be_replayed_is_one_line(saved, text, tmp_path):
    with pytest.raises(UserError, match='has no update 7: it has done 6, counted from 1'):
        Replay(saved).open(7)
    run = shutil.copytree(saved, tmp_path / 'run')
    other = tmp_path / 'other.txt'
    other.write_text(text.read_text() + '!')
    config = (run / 'config.json').read_text()
    (run / 'config.json').write_text(config.replace(str(text), str(other)))
    with pytest.raises(UserError, match=r'has changed: .* restore the text'):
        Replay(run)


def test_the_configuration_of_each_part_of_an_extended_run(logged):
    planned = [history.config_at(logged, step).train.steps for step in (1, 40, 41, 80)]
    assert planned == [40, 40, 80, 80]


def test_show_prints_text_and_json(saved):
    arguments = ('steps', 'show', f'--workdir={saved}', '--step=4')
    code, out, err = runs.script(*arguments, '--format=json')
    assert (code, err) == (0, '')
    found = json.loads(out)
    assert found['difference'] == 0
    assert list(found['replayed']) == list(METRICS)
    code, out, _ = runs.script(*arguments, '--limit=2')
    assert code == 0
    assert 'equal the recorded ones to the last digit' in out
    assert out.count('text.txt:') == 2
    for tensor in found['tensors']:
        assert tensor['name'] in out
    code, _, err = runs.script('steps', 'show', f'--workdir={saved}')
    assert code == 2
    assert 'show needs --step' in err


def test_opening_a_step_changes_nothing_in_the_folder(saved):
    before = {path: path.stat().st_mtime_ns for path in sorted(saved.rglob('*'))}
    Replay(saved).open(2)
    assert {path: path.stat().st_mtime_ns for path in sorted(saved.rglob('*'))} == before
