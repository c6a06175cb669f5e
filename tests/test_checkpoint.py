"""Checkpoints: each changed byte is found, the latest two and the best stay, nan is never saved."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import make_config

from gpt2_jax import config as config_lib
from gpt2_jax import hooks
from gpt2_jax import train as train_lib
from gpt2_jax.errors import DivergedError, UsageError, UserError
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.training import programs
from gpt2_jax.training.setup import build
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import checkpoints as checkpoints_lib
from gpt2_jax.workdir import checksums, storage
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

pytestmark = pytest.mark.usefixtures('trace_once')


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
            problem = verify(path)
            if name == CHECKSUMS:
                assert problem in (f'{name!r} is not as it was saved', 'its save was cut short')
            else:
                state = 'missing' if change == 'delete' else 'not as it was saved'
                assert problem == f'{name!r} is {state}', f'{change} {name}'
            file.write_bytes(data)
    assert verify(path) is None


def test_added_files_do_not_damage_a_checkpoint(text, finished, run):
    """Desktops, editors and synchronisers leave files anywhere."""
    for step in all_steps(run / FOLDER):
        for name in ('.DS_Store', 'params/Thumbs.db', 'train/d/.nfs0001', 'meta/.x.tmp/y'):
            file = run / FOLDER / str(step) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text('x')
        assert verify(run / FOLDER / str(step)) is None
    for name in ('.DS_Store', '²', '٣', '007', '-5', '1_000', '5 ', 'notes.txt'):
        (run / FOLDER / name).mkdir()
    assert load(run, 'latest').step == STEPS
    shutil.rmtree(newest(run))
    code, printed = runs.quiet_train(make_config(text), run)
    assert code == 0
    assert 'resuming from checkpoint 15 ' in printed
    assert 'renamed' not in printed
    assert runs.differences(run, finished) == []


@pytest.mark.parametrize('how', ['flip', 'no checksums'])
def test_if_every_checkpoint_is_damaged_nothing_is_changed(how, text, run):
    steps = all_steps(run / FOLDER)
    for step in steps:
        if how == 'flip':
            flip(run / FOLDER / str(step) / 'meta/metadata', 9)
        else:
            (run / FOLDER / str(step) / CHECKSUMS).unlink()
    before = sorted(run.rglob('*'))
    for _ in range(2):
        with pytest.raises(UserError, match=r'every checkpoint in \S+ is damaged \(.*--fresh'):
            runs.quiet_train(make_config(text), run)
    assert sorted(run.rglob('*')) == before


def test_a_renamed_checkpoint_gets_its_name_back(text, finished, run):
    """Under the name of another step it would be resumed from, and updates would be left out."""
    folder = run / FOLDER
    shutil.rmtree(newest(run))
    (folder / '15').rename(folder / '17')
    assert verify(folder / '17') == 'it is the checkpoint of step 15 under another name'
    with pytest.raises(UserError, match='17 cannot be used: it is the checkpoint of step 15'):
        load(run, '17')
    shutil.copytree(folder / '17', folder / '16')
    code, printed = runs.quiet_train(make_config(text), run)
    assert code == 0
    assert 'checkpoint 16 gets its name back: it is the checkpoint of step 15' in printed
    assert 'checkpoint 17 cannot be used: it is the checkpoint of step 15' in printed
    assert 'resuming from checkpoint 15 ' in printed
    assert runs.differences(run, finished) == []


def test_checkpoints_of_an_older_version(text, run):
    """Their checksums have no step, so the step in the state is compared."""
    path = newest(run)
    sums = path / CHECKSUMS
    sums.write_text(''.join(sums.read_text().splitlines(keepends=True)[1:]))
    assert verify(path) is None
    assert load(run, 'latest').step == STEPS
    path.rename(path.with_name('21'))
    with pytest.raises(UserError, match=r'/21 holds the state of step 18: .* Rename it to 18'):
        load(run, '21')
    with pytest.raises(UserError, match=r'/21 holds the state of step 18'):
        runs.quiet_train(make_config(text, train__steps=30), run, extend=True)


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda meta: [], 'expected an object'),
        (lambda meta: {}, "it has no 'config'"),
        (lambda meta: meta | {'config': 5}, 'config is 5, expected a text'),
        (lambda meta: meta | {'corpus': {'name': 'x'}}, "'corpus' has no 'sha256'"),
        (lambda meta: meta | {'log_sizes': {'x': -1}}, 'log_sizes.x is -1, expected an integer'),
        (lambda meta: meta | {'config': '['}, 'the configuration cannot be read as JSON'),
        (lambda meta: meta | {'config': '[' * 5000}, 'the configuration cannot be read as JSON'),
        (lambda meta: meta | {'config': '[]'}, 'the configuration is damaged'),
        (lambda meta: meta | {'config': '{"train": 5}'}, 'the configuration is damaged'),
        (lambda meta: meta | {'config': '{"train": {"steps": {}}}'}, 'train.steps = an object'),
        (lambda meta: meta | {'config': '{"optim": {"eps": 1%s}}' % ('0' * 401)}, 'optim.eps = 1'),
        (
            lambda meta: meta | {'config': '{"train": {"steps": 1%s}}' % ('0' * 30)},
            'train.steps = 1',
        ),
        (lambda meta: meta | {'progress': {'x': 1}}, 'progress'),
        (lambda meta: meta | {'progress': {'best_val_loss': 'x'}}, 'progress'),
        (lambda meta: meta | {'progress': {'seconds': 10**400}}, 'progress'),
    ],
)
def test_a_checkpoint_with_metadata_of_another_form(change, problem, text, run):
    """Its checksums are right: it was written by another program."""
    file = newest(run) / 'meta/metadata'
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    checksums.write_checksums(newest(run))
    with pytest.raises(UserError, match=problem):
        runs.quiet_train(make_config(text), run)
    if problem != 'progress':
        with pytest.raises(UserError, match=problem):
            load(run, 'latest')


@pytest.mark.parametrize(
    'metrics',
    [
        '',
        '[',
        '[' * 5000,
        '{}',
        '[]',
        '{"val_loss": "x"}',
        '{"val_loss": NaN}',
        '{"val_loss": 1%s}',
    ],
)
def test_a_checkpoint_with_metrics_of_another_form(metrics, run):
    (newest(run) / 'metrics/metrics').write_text(metrics.replace('%s', '0' * 400))
    checksums.write_checksums(newest(run))
    with pytest.raises(UserError, match=r'metrics/metrics (cannot be read as JSON|is damaged): '):
        load(run, 'best')


def test_a_state_that_the_checkpoint_library_cannot_read(run):
    (newest(run) / 'train/manifest.ocdbt').write_bytes(b'')
    checksums.write_checksums(newest(run))
    with pytest.raises(UserError, match=r'18 is undamaged, but not in the form .*zarr'):
        load(run, 'latest')


def test_the_reason_why_an_array_cannot_be_read_is_given():
    """Orbax says at which index it was reading, and TensorStore below it why that failed."""

    class Manager:
        directory = 'checkpoints'

        def restore(self, step, args):
            raise Exception('Encountered error at index 3') from ValueError('OUT_OF_RANGE')

    with pytest.raises(UserError, match=r'checkpoint 18 in checkpoints is .*saves: OUT_OF_RANGE'):
        storage.restore_items(Manager(), 18)


@pytest.mark.parametrize(
    ('changes', 'difference'),
    [
        ({'model__n_layer': 2}, 'h_1 is only here (6 arrays)'),
        (
            {'model__n_positions': 17},
            'wpe/embedding is (16, 32) float32 there, (17, 32) float32 here',
        ),
    ],
)
def test_arrays_that_do_not_fit_are_listed_and_none_is_loaded(changes, difference, run, text):
    """A missing branch has one line, and not one for each of its leaves."""
    setup = build(config_lib.resolve(make_config(text, **changes)))
    with (
        Checkpoints(run / FOLDER) as checkpoints,
        mock.patch.object(type(checkpoints._orbax), 'restore') as restore,
        pytest.raises(UserError, match='none was loaded:\n') as error,
    ):
        checkpoints.restore(STEPS, programs.abstract_state(setup))
    assert not restore.called
    trees = ('params', 'train/opt_state/1/0/mu', 'train/opt_state/1/0/nu')
    listed = ''.join(str(error.value).splitlines(keepends=True)[1:])
    assert listed == ';\n'.join(f'  {tree}/{difference}' for tree in trees)


def test_metadata_that_the_checkpoint_library_cannot_read(run):
    (newest(run) / '_CHECKPOINT_METADATA').write_text('{"metrics": "x"}')
    checksums.write_checksums(newest(run))
    with pytest.raises(UserError, match=r'a checkpoint in \S+ is undamaged, but not in the form'):
        load(run, 'latest')


def test_a_tie_makes_the_newer_checkpoint_the_best():
    assert checksums.is_better(1.5, None)
    assert checksums.is_better(1.5, 1.5)
    assert not checksums.is_better(1.5, 1.4)


def test_the_name_of_a_folder_is_no_pattern(text, finished, tmp_path):
    """Orbax finds the parts of a checkpoint by a pattern that begins with the folder's path."""
    run = tmp_path / 'a*[!b]?' / '[v2]' / '{x} ü 日本'
    assert runs.quiet_train(make_config(text), run)[0] == 0
    assert load(run, 'best').step == load(finished, 'best').step
    assert runs.differences(run, finished) == []


@pytest.mark.parametrize('name', ['back\\slash', 'not utf-8 \udcff'])
def test_a_folder_that_could_not_be_read_back_is_refused_before_training(name, text, tmp_path):
    with pytest.raises(UsageError, match='could not be read back: its name'):
        runs.quiet_train(make_config(text), tmp_path / name)
    assert not (tmp_path / name).exists()


# Orbax's event loop may still have tasks when its checkpointer is closed after an error.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('item', ['params', 'train', 'meta'])
def test_a_checkpoint_that_cannot_be_read_back_is_not_committed(item, tmp_path, monkeypatch):
    """As if Orbax had left out the last step of a save, without an error."""
    read_back = storage.read_back

    def incomplete(path, step, items):
        file = path / item / ('metadata' if item == 'meta' else 'manifest.ocdbt')
        file.rename(tmp_path / 'lost')
        read_back(path, step, items)

    with Checkpoints(tmp_path / 'c') as checkpoints:
        checkpoints.save(1, small_state(1), META, None)
        checkpoints.wait()
        monkeypatch.setattr(storage, 'read_back', incomplete)
        checkpoints.save(2, small_state(2), META, None)
        with pytest.raises(UserError, match=r'2 could not be saved .* cannot be read'):
            checkpoints.wait()
        assert all_steps(tmp_path / 'c') == [1]
        monkeypatch.setattr(storage, 'read_back', read_back)
        with pytest.raises(UserError, match=r'3 could not be saved .* it holds step 4'):
            checkpoints.save(3, small_state(4), META, None)
            checkpoints.wait()


def test_every_leaf_is_read_back(tmp_path, monkeypatch):
    """A state is read in groups: of one leaf, of some, of all."""
    tree = {'step': jnp.int32(1), 'opt_state': [jnp.zeros(n) for n in range(1, 9)]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1, TrainState(tree['step'], {'w': jnp.ones(3)}, tree['opt_state']), META, 1
        )
        checkpoints.wait()
    for n_bytes in (1, 40, 10000):
        read, original = [], storage._read
        monkeypatch.setattr(storage, 'READ_BACK_BYTES', n_bytes)

        def note(path, like, read=read, original=original, **options):
            result = original(path, like, **options)
            read += [leaf.size for leaf in jax.tree.leaves(result) if leaf is not ...]
            return result

        with monkeypatch.context() as patch:
            patch.setattr(storage, '_read', note)
            storage.read_back(tmp_path / '1', 1, {'train': tree})
        assert sorted(read) == [1, 1, 2, 3, 4, 5, 6, 7, 8], n_bytes


def test_a_change_of_any_bit_of_the_checksums_is_found(tmp_path):
    path = tmp_path / '12'
    path.mkdir()
    for name in ('one', 'two'):
        (path / name).write_text(name)
    checksums.write_checksums(path)
    data = (path / CHECKSUMS).read_bytes()
    assert verify(path) is None
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        sums = checksums.parse_checksums(changed)
        assert sums is None or sums.step != 12, bit
    for length in range(len(data)):
        assert checksums.parse_checksums(data[:length]) is None, length
    flip(path / CHECKSUMS, 999)
    assert verify(path) == f'{CHECKSUMS!r} is not as it was saved'


def test_checksums_that_name_a_file_elsewhere_are_damaged(tmp_path):
    path = tmp_path / '12'
    path.mkdir()
    (tmp_path / 'outside').write_text('x')
    (path / 'link').symlink_to(tmp_path / 'outside')
    digest = hashlib.sha256(b'x').hexdigest()
    for name in ('../outside', str(tmp_path / 'outside'), 'link', 'a/../../outside', '.'):
        (path / CHECKSUMS).write_text(f'{digest}  {name}\n')
        assert verify(path), name


def test_checksums_have_the_format_of_sha256sum(run):
    """It skips the first line, a comment."""
    first, *lines = (newest(run) / CHECKSUMS).read_text().splitlines()
    assert first.startswith(f'# checkpoint of step {STEPS}; ')
    assert all(re.fullmatch(r'[0-9a-f]{64}  \S+', line) for line in lines)
    if shutil.which('sha256sum'):
        check = ['sha256sum', '--check', '--strict', '--quiet', CHECKSUMS]
        subprocess.run(check, cwd=newest(run), check=True)


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


def test_a_file_in_the_place_of_the_checkpoints(tmp_path):
    """It is found before training, and not at the first save."""
    (tmp_path / 'checkpoints').write_text('')
    with pytest.raises(UserError, match=r'checkpoints is not a folder, and .* could not'):
        quarantine(tmp_path / 'checkpoints')


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


META = {
    'config': '',
    'tokenizer': '',
    'corpus': {'name': '', 'sha256': '', 'fallback': False},
    'progress': {},
    'log_sizes': {'metrics.jsonl': 3},
}


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
        checkpoints.save(step, small_state(step), META | {'config': str(step)}, loss)
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
        meta = checkpoints_lib.read_meta(tmp_path / str(step))
        assert meta == META | {'config': str(step)}
    checkpoints.__exit__(None, None, None)


def test_rounded_matrices_are_made_from_the_parameters(tmp_path):
    """A checkpoint does not hold them, and needs no room for them."""
    params = {'kernel': jnp.array([1.001, 2.003]), 'bias': jnp.ones(2)}
    state = small_state(1).replace(
        params=params, rounded={'kernel': params['kernel'].astype(jnp.bfloat16), 'bias': None}
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.replace(rounded=None)))
    with (
        Checkpoints(tmp_path) as checkpoints,
        mock.patch('shutil.disk_usage', return_value=mock.Mock(free=size)),
    ):
        checkpoints.save(1, state, META, None)
        checkpoints.wait()
        restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
    assert not [path for path in (tmp_path / '1').rglob('*') if 'rounded' in path.name]
    assert restored.rounded['bias'] is None
    assert restored.rounded['kernel'].dtype == jnp.bfloat16
    assert np.array_equal(restored.rounded['kernel'], state.rounded['kernel'])


def test_a_damaged_best_checkpoint_is_reported_and_training_resumes(text, finished, run):
    folder, latest = run / FOLDER, newest(run)
    shutil.copytree(latest, folder / '9')
    (folder / '9/metrics/metrics').write_text('{"val_loss": 0.5}')
    checksums.write_checksums(folder / '9')
    assert best_step(folder) == (9, 0.5)
    assert verify(folder / '9') is None
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


@pytest.fixture
def unexplained(monkeypatch):
    """The explanation of a value that is not finite is left out: tests/test_autopsy.py has it."""
    monkeypatch.setattr(hooks, 'explained', lambda workdir, step: f'Step {step} is explained')


@pytest.mark.usefixtures('unexplained')
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


@pytest.mark.usefixtures('unexplained')
def test_huge_parameters_end_the_run_as_diverged(text, tmp_path, monkeypatch):
    runs.before_updates(
        monkeypatch,
        lambda state: state.replace(params=jax.tree.map(lambda leaf: leaf * 1e30, state.params)),
    )
    with pytest.raises(DivergedError, match=r'diverged at step 1: .* there is no checkpoint yet'):
        runs.quiet_train(make_config(text, log__every=1), tmp_path)
    assert all_steps(tmp_path / FOLDER) == []
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


@pytest.mark.usefixtures('unexplained')
def test_a_validation_loss_that_is_not_finite_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_lib,
        'make_evaluate',
        lambda setup, **_: (
            lambda params, **more: make_evaluate(setup)(params, **more)._replace(loss=float('inf'))
        ),
    )
    with pytest.raises(
        DivergedError, match=r'diverged at step 7: validation loss = inf; .* checkpoint is step 5'
    ):
        runs.quiet_train(make_config(text), tmp_path)


def test_a_failed_save_leaves_nothing_even_if_a_writer_is_late(tmp_path, monkeypatch):
    """Orbax reports the first item that cannot be written while others are still being written."""
    late = tmp_path / '5.orbax-checkpoint-tmp' / 'train.orbax-checkpoint-tmp' / '_sharding'
    (tmp_path / '4.orbax-checkpoint-tmp').mkdir()  # of another step

    def write():
        late.parent.mkdir(parents=True, exist_ok=True)
        late.write_text('')

    def save(*args, **options):
        write()
        writer.start()
        raise OSError('File too large')

    writer = threading.Timer(0.15, write)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints_lib.ocp.CheckpointManager, 'save', save)
        with pytest.raises(UserError, match=r'checkpoint 5 could not be saved .* File too large'):
            checkpoints.save(5, small_state(5), META, None)
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ['4.orbax-checkpoint-tmp']


@pytest.mark.parametrize('every', [5, 1000])
def test_a_save_that_fails_in_the_background_is_reported(every, text, tmp_path, monkeypatch):
    seal, failed = checksums.write_checksums, threading.Event()

    def fails(path):
        if path.name == '7':
            failed.set()
            raise OSError(28, 'No space left on device')
        seal(path)

    def slowly(state):  # leaves time to notice before the next save
        if state.step >= 7:
            failed.wait(60)
            time.sleep(0.1)
        return state

    monkeypatch.setattr(checkpoints_lib, 'write_checksums', fails)
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
        checkpoints.save(5, small_state(5), META, None)
        for step in (5, 4):
            with pytest.raises(
                UserError, match=rf'checkpoint {step} could not be saved .* step exists: \[5\]'
            ):
                checkpoints.save(step, small_state(step), META, None)
        assert committed_steps(tmp_path) == [5]
