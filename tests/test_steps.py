"""One update, opened: the replay equals the run to the digit, and a hand computation."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from tiny import flat

from gpt2_jax.diagnostics.replay import METRICS, Replay, complete_records
from gpt2_jax.errors import UserError
from gpt2_jax.inference.score import score_corpus
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.reports import step as step_report
from gpt2_jax.workdir import history
from gpt2_jax.workdir.checksums import FOLDER
from gpt2_jax.workdir.restore import load

# With dropout and micro-batches. Every step is recorded, and every checkpoint kept.
SETTINGS = {
    'train__grad_accum_steps': 2,
    'eval__every': 100,
    'eval__sample_tokens': 0,
    'log__every': 1,
    'checkpoint__every': 1,
    'checkpoint__keep': 'all',
    'optim__clip_norm': 0.1,
}
STEPS, LONGER = 6, 10

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    """A run that was extended once."""
    run = tmp_path_factory.mktemp('run') / 'run'
    config = runs.make_config(text, train__steps=STEPS, **SETTINGS)
    assert runs.quiet_train(config, run)[0] == 0
    longer = runs.make_config(text, train__steps=LONGER, **SETTINGS)
    assert runs.quiet_train(longer, run, extend=True)[0] == 0
    return run


@pytest.fixture(scope='module')
def replay(run):
    """Compiles once."""
    return Replay(run)


@pytest.fixture(scope='module')
def opened(replay):
    """A step, opened when it is first asked for."""
    return functools.cache(replay.open)


@pytest.mark.long
def test_every_step_equals_the_recorded_one_to_the_digit(opened):
    for step in range(1, LONGER + 1):
        found = opened(step)
        assert found.checkpoint == step - 1
        assert found.recorded == found.replayed
        assert found.verdict == 'the replayed metrics equal the recorded ones to the last digit'
        assert found.before_BT.mean() == pytest.approx(found.recorded['loss'], rel=1e-6)
        norms = np.array([tensor.gradient for tensor in found.tensors])
        assert np.sqrt((norms**2).sum()) == pytest.approx(found.recorded['grad_norm'], rel=1e-5)
        norms = np.array([tensor.update for tensor in found.tensors])
        assert np.sqrt((norms**2).sum()) == pytest.approx(found.recorded['update_norm'], rel=1e-3)


def test_far_checkpoints_any_order_and_damage_give_the_same(run, replay, opened, tmp_path):
    copy = shutil.copytree(run, tmp_path / 'run')
    for step in (2, 3, 4, 5):
        shutil.rmtree(copy / FOLDER / str(step))
    (copy / FOLDER / '1' / 'params' / 'manifest.ocdbt').write_bytes(b'')
    far = Replay(copy)
    far._setups = replay._setups  # compiled programs
    for step, checkpoint in ((9, 8), (4, 0), (5, 0), (2, 0)):  # 1 is damaged; 0, the initial state
        found = far.open(step)
        assert found.checkpoint == checkpoint
        assert found.replayed == opened(step).replayed
        assert np.array_equal(found.after_BT, opened(step).after_BT)
    shutil.rmtree(copy / FOLDER / '0')
    assert far.open(3).replayed == opened(3).replayed


def test_numbers_equal_a_hand_computation(run, opened):
    """From the saved parameters of each step, with the plain model and no code of replay.py."""
    states = {at: load(run, str(at)) for at in (0, 1, 3, 4)}
    model, seed = GPT2(states[0].model.cfg), history.read_config(run).train.seed

    def losses(params, tokens_BT1, step):
        """Micro-batch m has rows m and m + 2, and a dropout key of its own."""
        key = jax.random.fold_in(jax.random.key(seed), step - 1)
        losses_BT = jnp.zeros(tokens_BT1[:, 1:].shape)
        for m in range(2):
            rows = tokens_BT1[m::2]
            logits = model.apply({'params': params}, rows[:, :-1], jax.random.fold_in(key, m))
            log_probs = jax.nn.log_softmax(logits)
            of_targets = jnp.take_along_axis(log_probs, rows[:, 1:, None], -1)[..., 0]
            losses_BT = losses_BT.at[m::2].set(-of_targets)
        return losses_BT.mean(), losses_BT

    by_hand = jax.jit(jax.grad(losses, has_aux=True))
    for step in (1, 4):
        found, old, new = opened(step), states[step - 1].params, states[step].params
        grads, before_BT = by_hand(old, found.tokens_BT1, step)
        np.testing.assert_allclose(found.before_BT, before_BT, atol=2e-6)
        _, after_BT = by_hand(new, found.tokens_BT1, step)
        np.testing.assert_allclose(found.after_BT, after_BT, atol=2e-6)
        for name, shape, weight, gradient, update, ratio in found.tensors:
            before, after = flat(old)[name], flat(new)[name]
            assert shape == before.shape
            assert weight == pytest.approx(np.linalg.norm(before), rel=1e-5)
            by_name = np.linalg.norm(flat(grads)[name])
            assert gradient == pytest.approx(by_name, rel=1e-4, abs=1e-7)
            assert update == pytest.approx(np.linalg.norm(after - before), rel=1e-5)
            assert ratio == (pytest.approx(update / weight) if weight else None)


def test_rows_are_the_text_at_their_place(replay, opened, text):
    found = step_report.to_json(replay.run, opened(3))
    data = text.read_bytes()
    means = [row['before_mean'] for row in found['rows']]
    assert means == sorted(means, reverse=True)
    for row in found['rows']:
        held = ''.join(row['tokens']).encode()
        assert data[row['byte'] : row['byte'] + len(held)] == held
        assert data[: row['byte']].count(b'\n') + 1 == row['line']
        assert row['before'] == pytest.approx(opened(3).before_BT[row['row']], abs=1e-5)


def test_a_replay_that_differs_says_so(run, replay, opened, tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    records = (run / 'metrics.jsonl').read_text()
    value = opened(4).recorded['grad_norm']
    for factor, verdict in (
        (1.01, 'THE REPLAY DIFFERS: by 9.9e-03, relative.'),
        (1 + 1e-6, 'the replayed metrics equal the recorded ones to 1.0e-06, relative: rounding'),
    ):
        changed = records.replace(str(value), str(value * factor))
        (tmp_path / 'run' / 'metrics.jsonl').write_text(changed)
        record = next(r for r in history.read_records(tmp_path / 'run', 'train') if r['step'] == 4)
        monkeypatch.setitem(opened(4).recorded, 'grad_norm', record['grad_norm'])
        assert opened(4).verdict.startswith(verdict)


def test_a_record_without_all_metrics_is_none(run, tmp_path):
    (tmp_path / 'run').mkdir()
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    metrics = [record for record in records if record['split'] == 'train']
    expected = {r['step']: {name: r[name] for name in METRICS} for r in metrics}
    del metrics[1]['grad_norm'], expected[metrics[1]['step']]
    metrics[2]['param_norm'] = None
    del expected[metrics[2]['step']]
    path = tmp_path / 'run' / 'metrics.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert complete_records(run) != complete_records(tmp_path / 'run') == expected
    del metrics[3]['loss']
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    with pytest.raises(UserError, match=r"jsonl, line \d+ is damaged: it has no 'loss'"):
        complete_records(tmp_path / 'run')


def test_the_initial_state_of_a_run_is_scored_like_any_other(run):
    restored = load(run, '0')
    loss = score_corpus(restored).evaluation.loss
    assert loss == pytest.approx(math.log(restored.tokenizer.vocab_size), abs=0.1)


def test_what_cannot_be_replayed_is_one_line(run, replay, text, tmp_path):
    with pytest.raises(UserError, match='has no update 11: it has done 10, counted from 1'):
        replay.open(11)
    other = tmp_path / 'other.txt'
    other.write_text(text.read_text() + '!')
    copy = shutil.copytree(run, tmp_path / 'run')
    config = (copy / 'config.json').read_text()
    (copy / 'config.json').write_text(config.replace(str(text), str(other)))
    with pytest.raises(UserError, match=r'has changed: .* restore the text'):
        Replay(copy)


def test_a_text_that_was_moved(run, text, tmp_path):
    copy, gone = shutil.copytree(run, tmp_path / 'run'), tmp_path / 'gone.txt'
    config = (copy / 'config.json').read_text()
    (copy / 'config.json').write_text(config.replace(str(text), str(gone)))
    for command in (('find', '--text=ba'), ('show', '--step=8'), ('autopsy', '--step=8')):
        arguments = ('steps', *command, f'--workdir={copy}')
        code, out, err = runs.script(*arguments)
        assert (code, out) == (1, '')
        assert err.endswith(f'; --corpus=PATH says where {gone} is now\n')
        code, out, err = runs.script(*arguments, f'--corpus={text}')
        assert (code, err) == (0, '')
        assert 'text.txt' in out or 'Every value of step 8 is finite' in out


def test_the_configuration_of_each_part_of_an_extended_run(run):
    planned = [history.config_at(run, step).train.steps for step in (1, STEPS, STEPS + 1, LONGER)]
    assert planned == [STEPS, STEPS, LONGER, LONGER]


def test_show_prints_text_and_json_and_changes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob('*'))}
    arguments = ('steps', 'show', f'--workdir={run}', '--step=8')
    code, out, err = runs.script(*arguments, '--format=json')
    assert (code, err) == (0, '')
    found = json.loads(out)
    assert found['difference'] == 0
    assert list(found['replayed']) == list(METRICS)
    found['rows'][0]['tokens'] = ['\u009b2J', '\n', '"é']  # for some terminals \u009b is ESC [
    lines = step_report.to_lines(found, 2, color=False)
    assert r'  \x9b2J\n\"é' in lines
    assert 'equal the recorded ones to the last digit' in lines[1]
    assert '\n'.join(lines).count('text.txt:') == 2
    assert all(tensor['name'] in '\n'.join(lines) for tensor in found['tensors'])
    code, _, err = runs.script('steps', 'show', f'--workdir={run}')
    assert code == 2
    assert 'show needs --step' in err
    code, _, err = runs.script('steps', 'open')
    assert (code, 'expected one command, find, show or autopsy; got open' in err) == (2, True)
    code, _, err = runs.script('steps', 'show', str(run))
    assert (code, f"a run's folder is given as --workdir={run}" in err) == (2, True)
    code, _, err = runs.script('steps', 'find')
    assert (code, "find needs --workdir: the run's folder" in err) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob('*'))} == before
