"""Checkpoints: each changed byte is found, the latest two and the best stay, nan is never saved."""

import json
import random
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import make_config

from gpt2_jax import train as train_lib
from gpt2_jax.errors import DivergedError, UserError
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import checkpoints, checksums
from gpt2_jax.workdir.checkpoints import Checkpoints
from gpt2_jax.workdir.checksums import (
    CHECKSUMS,
    FOLDER,
    all_steps,
    best_step,
    committed_steps,
    quarantine,
    verify,
)
from gpt2_jax.workdir.restore import load

STEPS = runs.SMALL['train.steps']


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    with runs.compile_once():
        yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt')


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished') / 'run'
    assert runs.quiet_train(make_config(text), folder)[0] == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def newest(run):
    return run / FOLDER / str(all_steps(run / FOLDER)[-1])


def test_a_change_in_any_file_of_a_checkpoint_is_found(run):
    path, draw = newest(run), random.Random(0)
    assert verify(path) is None
    files = [file for file in path.rglob('*') if file.is_file()]
    assert len(files) > 20
    for file in files:
        data, name = file.read_bytes(), str(file.relative_to(path))
        for change in ('flip', 'cut', 'delete'):
            if change == 'delete':
                file.unlink()
            elif not data:
                continue
            elif change == 'flip':
                flip(file, draw.randrange(8 * len(data)))
            else:
                file.write_bytes(data[:-1])
            told = verify(path)
            assert told, f'{change} {name}'
            assert (
                change == 'delete'
                or name == CHECKSUMS
                or told == f'{name!r} is not as it was saved'
            )
            file.write_bytes(data)
    (path / 'params/added').write_bytes(b'')
    assert verify(path) == "'params/added' is not as it was saved"


def test_a_change_of_any_bit_of_the_checksums_is_found(tmp_path):
    for name in ('one', 'two'):
        (tmp_path / name).write_text(name)
    checksums.write_checksums(tmp_path)
    for bit in range(8 * (tmp_path / CHECKSUMS).stat().st_size):
        flip(tmp_path / CHECKSUMS, bit)
        assert verify(tmp_path), bit
        flip(tmp_path / CHECKSUMS, bit)
    assert verify(tmp_path) is None


def test_checksums_have_the_format_of_sha256sum(run):
    lines = (newest(run) / CHECKSUMS).read_text().splitlines()
    assert all(re.fullmatch(r'[0-9a-f]{64}  \S+', line) for line in lines)


@pytest.mark.parametrize('kind', ['damaged', 'unsealed', 'temporary'])
def test_a_bad_latest_checkpoint_is_renamed_and_training_resumes_from_the_one_before(
    kind, text, finished, run, monkeypatch
):
    path = newest(run)
    before = all_steps(run / FOLDER)[-2]
    (run / 'summary.json').unlink()
    if kind == 'damaged':
        flip(next(file for file in (path / 'train').rglob('d/*') if file.stat().st_size > 100), 333)
    elif kind == 'unsealed':
        (path / CHECKSUMS).unlink()
    else:
        path.rename(path.with_name(f'{STEPS}.orbax-checkpoint-tmp'))
    code, printed = runs.quiet_train(make_config(text), run)
    aside = run / FOLDER / f'{STEPS}.damaged'
    assert code == 0
    assert f'resuming from checkpoint {before} ' in printed
    assert aside.is_dir()
    reason = "'train/.*' is not as it was saved" if kind == 'damaged' else 'its save was cut short'
    assert re.search(
        rf'checkpoint {STEPS} cannot be used: {reason}; renamed to {re.escape(str(aside))}', printed
    )
    assert runs.differences(run, finished) == []


def test_renamed_checkpoints_get_different_names(tmp_path):
    for name in ('7', '7.orbax-checkpoint-tmp', '7.orbax-checkpoint-tmp-1', '7.damaged', 'other'):
        (tmp_path / name).mkdir()
    assert len(quarantine(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '7.damaged',
        '7.damaged.2',
        '7.damaged.3',
        '7.damaged.4',
        'other',
    ]


def small_state(step):
    return TrainState(jnp.int32(step), {'w': jnp.full(3, step, jnp.float32)}, {'m': jnp.zeros(2)})


@pytest.mark.parametrize(
    ('losses', 'kept'),
    [
        (
            (4, 3, 2.5, 2.7, 2.9, 3.0),
            [(1,), (1, 2), (2, 3), (3, 4), (3, 4, 5), (3, 5, 6)],
        ),  # the loss rises after the third
        ((4, 3, 2.5, 2.4), [(1,), (1, 2), (2, 3), (3, 4)]),  # the loss falls
        (
            (4, 3, None, None, None, 3),
            [(1,), (1, 2), (2, 3), (2, 3, 4), (2, 4, 5), (5, 6)],
        ),  # not evaluated; a tie
    ],
)
@pytest.mark.parametrize('reopened', [False, True])
def test_latest_two_and_best_are_kept(losses, kept, reopened, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, (loss, expected) in enumerate(zip(losses, kept, strict=True), 1):
        checkpoints.save(step, small_state(step), {'step': step}, loss)
        checkpoints.wait()
        assert tuple(committed_steps(tmp_path)) == expected
        best, least = best_step(tmp_path)
        assert least == min(loss for loss in losses[:step] if loss)
        assert best in expected
        if reopened:
            checkpoints.__exit__(None, None, None)
            checkpoints = Checkpoints(tmp_path)
    for step in kept[-1]:
        restored = checkpoints.restore(step, jax.eval_shape(lambda: small_state(0)))
        assert restored.step == step
        assert np.array_equal(restored.params['w'], np.full(3, step))
        assert checkpoints.read_meta(step) == {'step': step}
    checkpoints.__exit__(None, None, None)


def test_a_damaged_best_checkpoint_is_reported_and_training_resumes(text, finished, run):
    folder, latest = run / FOLDER, newest(run)
    shutil.copytree(latest, folder / '9')
    (folder / '9/metrics/metrics').write_text('{"val_loss": 0.5}')
    checksums.write_checksums(folder / '9')
    assert best_step(folder) == (9, 0.5)
    assert load(run, 'best').step == 9
    flip(folder / '9/params/_METADATA', 99)
    with pytest.raises(
        UserError,
        match=r"checkpoint \S+/9 cannot be used: 'params/_METADATA' is not as it was saved",
    ):
        load(run, 'best')
    code, out, err = runs.script('sample', f'--ckpt_dir={run}', '--step=best', '--max_new_tokens=5')
    assert code == 1
    assert out == ''
    assert f'or --step={STEPS}' in err
    assert len(err.splitlines()) == 1
    assert runs.script('sample', f'--ckpt_dir={run}', '--step=latest', '--max_new_tokens=5')[0] == 0
    shutil.rmtree(latest)  # so that there are steps to train
    code, printed = runs.quiet_train(make_config(text), run)
    assert code == 0
    assert 'checkpoint 9 cannot be used' in printed
    assert (folder / '9.damaged').is_dir()
    assert runs.differences(run, finished) == []


def test_a_damaged_validation_loss_does_not_choose_the_best(run):
    for step in all_steps(run / FOLDER):
        if (path := run / FOLDER / str(step) / 'metrics/metrics').exists():
            flip(path, 100)
            with pytest.raises(
                UserError,
                match=rf"checkpoint \S+/{step} cannot be used: 'metrics/metrics' is not as",
            ):
                load(run, 'best')
            flip(path, 100)


def test_a_value_that_is_not_finite_is_never_saved(text, finished, tmp_path, monkeypatch):
    run = tmp_path / 'run'
    with monkeypatch.context() as patch:
        runs.before_updates(
            patch,
            lambda state: state.replace(
                params=jax.tree.map(
                    lambda leaf: leaf * jnp.where(state.step == 12, jnp.nan, 1), state.params
                )
            ),
        )
        with pytest.raises(DivergedError, match=r'diverged at step 13: .*loss = nan') as error:
            runs.quiet_train(make_config(text), run)
    assert error.value.exit_code == 3
    assert 'the last good checkpoint is step 10' in str(error.value)
    assert committed_steps(run / FOLDER)[-1] == 10
    assert [record['step'] for record in runs.metrics(run)][-1] == 12
    assert runs.quiet_train(make_config(text), run)[0] == 0  # the nan is not in it
    assert runs.differences(run, finished) == []


def test_a_huge_learning_rate_ends_the_run_as_diverged(text, tmp_path):
    config = make_config(
        text, optim__learning_rate=1e30, optim__clip_norm=0.0, optim__warmup_steps=0
    )
    with pytest.raises(
        DivergedError, match=r'diverged at step [12]: .* there is no checkpoint yet'
    ):
        runs.quiet_train(config, tmp_path)
    assert all_steps(tmp_path / FOLDER) == []
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def test_a_validation_loss_that_is_not_finite_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_lib,
        'make_evaluate',
        lambda setup, **_: lambda params: make_evaluate(setup)(params)._replace(loss=float('inf')),
    )
    with pytest.raises(
        DivergedError, match=r'diverged at step 7: validation loss = inf; .* checkpoint is step 5'
    ):
        runs.quiet_train(make_config(text), tmp_path)


@pytest.mark.parametrize('every', [5, 1000])
def test_a_save_that_fails_in_the_background_is_reported(every, text, tmp_path, monkeypatch):
    seal = checksums.write_checksums

    def fails(path):
        if path.name == '7':
            raise OSError(28, 'No space left on device')
        seal(path)

    def slowly(state):  # leaves time to notice before the next save
        time.sleep(0.1 if state.step >= 7 else 0)
        return state

    monkeypatch.setattr(checkpoints, 'write_checksums', fails)
    runs.before_updates(monkeypatch, slowly)
    with pytest.raises(
        UserError, match=r'checkpoint 7 could not be saved .* No space left'
    ) as error:
        runs.quiet_train(make_config(text, checkpoint__every=every), tmp_path)
    assert ('the checkpoints of step 5 are whole' if every == 5 else 'there is none yet') in str(
        error.value
    )
    # The failed checkpoint is removed, and none was saved after it.
    assert all_steps(tmp_path / FOLDER) == ([5] if every == 5 else [])
    assert runs.metrics(tmp_path)[-1]['step'] < (11 if every == 5 else 14)


def test_saving_an_existing_or_earlier_step_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, small_state(5), {}, None)
        for step in (5, 4):
            with pytest.raises(
                UserError, match=rf'checkpoint {step} could not be saved .* step exists: \[5\]'
            ):
                checkpoints.save(step, small_state(step), {}, None)
        assert committed_steps(tmp_path) == [5]
