"""A run that starts from another run's checkpoint: parameters, context, optimizer state."""

import contextlib
import io
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import runs
from tiny import flat

from gpt2_jax.config import resolve
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.kernels.choose import FUSED, XLA
from gpt2_jax.parallel import feed
from gpt2_jax.training import programs
from gpt2_jax.training import setup as setup_lib
from gpt2_jax.training.setup import build
from gpt2_jax.training.start import initial_state
from gpt2_jax.workdir import checkpoints as checkpoints_lib
from gpt2_jax.workdir import restore
from gpt2_jax.workdir.checksums import FOLDER

QUIET = dict(eval__sample_tokens=0)
STEPS = 18  # of runs.SMALL, whose programs other files compile too

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def base(text, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp('base') / 'run'
    runs.quiet_train(runs.make_config(text, **QUIET, checkpoint__keep='all'), folder)
    return folder


def parts_of(text, **changes):
    return build(resolve(runs.make_config(text, **QUIET | changes)))


def start(setup, base, step='best', keep_optimizer=False):
    """The state that a run starts from, and what it prints."""
    setup.config.train.update(init_from=str(base), init_step=step, init_optimizer=keep_optimizer)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return initial_state(setup), printed.getvalue().strip()


def saved(base) -> dict[str, np.ndarray]:
    """Every leaf of the base run's latest state."""
    with checkpoints_lib.Checkpoints(base / FOLDER) as checkpoints:
        return flat(
            checkpoints.restore(
                STEPS, programs.abstract_state(build(restore.load(base, 'latest').config))
            )
        )


@pytest.mark.long
def test_a_run_starts_from_the_parameters_with_a_fresh_optimizer(text, base):
    setup = parts_of(text, optim__learning_rate=1e-4)
    state, told = start(setup, base, step='latest')
    assert told == f'starting from checkpoint {STEPS} in {base}, with a fresh optimizer'
    old, fresh = saved(base), flat(programs.new_state(setup))
    assert flat(state).keys() == old.keys()
    for name, leaf in flat(state).items():
        expected = old if name.startswith('params') else fresh
        assert np.array_equal(leaf, expected[name]), name
        assert leaf.sharding == fresh[name].sharding, name
        assert leaf.dtype == fresh[name].dtype, name
    state, metrics = programs.compile_train_step(setup)(
        state, feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)
    )
    assert int(state.step) == 1
    assert float(metrics['learning_rate']) == pytest.approx(1e-4 / 11)


def test_the_requested_checkpoint_is_loaded(text, base):
    setup = parts_of(text)
    by_step = {
        step: flat(start(setup, base, step=step)[0].params)
        for step in ('best', 'latest', '5', '18')
    }
    assert all(
        np.array_equal(by_step['latest'][name], leaf) for name, leaf in by_step['18'].items()
    )
    assert not all(
        np.array_equal(by_step['latest'][name], leaf) for name, leaf in by_step['5'].items()
    )


def test_matrices_are_rounded_for_the_fused_update(text, base):
    with mock.patch.object(setup_lib, 'choose', return_value=(FUSED, {})):
        setup = parts_of(text, model__dtype='bfloat16')
    state, _ = start(setup, base)
    rounded, params = flat(state.rounded), flat(state.params)
    assert rounded.keys() == {name for name in params if name.endswith('kernel')}
    for name, leaf in rounded.items():
        assert np.array_equal(leaf, params[name].astype('bfloat16')), name


def test_matrices_are_not_rounded_for_a_loss_by_xla(text):
    """It would be computed with bf16 parameters, and its gradients too."""
    kernels = XLA._replace(optimizer='fused')
    with mock.patch.object(setup_lib, 'choose', return_value=(kernels, {})):
        assert parts_of(text, model__dtype='bfloat16').shapes.rounded is None


def test_a_smaller_context_is_cropped(text, base):
    state, told = start(
        parts_of(text, model__n_positions=5), base, step='latest', keep_optimizer=True
    )
    assert told.endswith('with its optimizer; context cropped from 16 to 5')
    old, cropped = saved(base), 0
    for name, leaf in flat(state).items():
        if name.endswith('wpe/embedding'):
            cropped += 1
            assert leaf.shape == (5, 32), name
            assert np.array_equal(leaf, old[name][:5]), name
        elif name.startswith('params'):
            assert np.array_equal(leaf, old[name]), name
    assert cropped == 3  # the parameter and two moments


def test_a_kept_optimizer_continues_under_a_new_schedule(text, base):
    setup = parts_of(text, optim__learning_rate=1e-4)
    state, _ = start(setup, base, step='latest', keep_optimizer=True)
    old = saved(base)
    adam, schedule = (
        optax.tree.get(state.opt_state, name)
        for name in ('ScaleByAdamState', 'ScaleByScheduleState')
    )
    assert (int(state.step), int(adam.count), int(schedule.count)) == (0, STEPS, 0)
    moments = {name: leaf for name, leaf in flat(state).items() if '/mu/' in name or '/nu/' in name}
    assert len(moments) == 2 * len(flat(state.params))
    for name, leaf in moments.items():
        assert np.array_equal(leaf, old[name]), name
        assert np.asarray(leaf).any(), name
    assert float(
        programs.compile_train_step(setup)(
            state, feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)
        )[1]['learning_rate']
    ) == pytest.approx(1e-4 / 11)


@pytest.mark.parametrize(
    ('changes', 'options', 'words'),
    [
        (dict(model__n_layer=2), {}, 'model.n_layer is 1 there, 2 here$'),
        (
            dict(model__n_head=4, model__bias=True),
            {},
            'model.n_head is 2 there, 4 here; model.bias is False there, True',
        ),
        (
            dict(model__activation_function='gelu'),
            {},
            "model.activation_function is 'gelu_new' there, 'gelu' here",
        ),
        (
            dict(model__n_positions=17),
            {},
            'model.n_positions is 16 there, and 17 here: it can only shrink',
        ),
        (
            dict(data__tokenizer='byte'),
            {},
            r'its tokenizer is char with \d+ tokens, but the data use byte with 256 tokens',
        ),
        (
            dict(optim__implementation='explicit'),
            dict(keep_optimizer=True),
            "is 'auto' there, 'explicit' here",
        ),
        (
            dict(optim__algorithm='muon'),
            dict(keep_optimizer=True),
            "optim.algorithm is the same in both runs, but it is 'adamw' there, 'muon' here",
        ),
        (
            dict(optim__clip_norm=0.0),
            dict(keep_optimizer=True),
            'optim.clip_norm is 1.0 there, 0.0 here',
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(text, base, changes, options, words):
    with pytest.raises(UsageError, match=f'^this run cannot start from {base}: .*{words}'):
        start(parts_of(text, **changes), base, **options)


def test_other_characters_are_named_and_can_be_mended(text, base, tmp_path):
    other, letter = tmp_path / 'other.txt', text.read_text()[0]
    other.write_text(text.read_text().replace(letter, 'é'))
    words = f"replace 'é', which only the text has, and add a line with '{letter}', which only the"
    with pytest.raises(UsageError, match=words):
        start(parts_of(other), base)
    other.write_text(other.read_text().replace('é', '') + f'\n{letter}')
    start(parts_of(other), base)


def test_dropout_precision_and_optimizer_may_differ(text, base):
    setup = parts_of(
        text,
        model__resid_pdrop=0.3,
        model__dtype='bfloat16',
        optim__implementation='explicit',
        optim__clip_norm=0.0,
    )
    state, _ = start(setup, base)
    assert jax.tree.structure(state) == jax.tree.structure(setup.shapes)


def test_training_starts_from_it_and_resumes_from_its_own_checkpoints(text, base, tmp_path):
    config = runs.make_config(
        text,
        **QUIET,
        train__init_from=str(base),
        train__init_step='latest',
        train__init_optimizer=True,
        optim__learning_rate=1e-4,
    )
    code, out = runs.quiet_train(config, tmp_path / 'tuned')
    assert code == 0
    assert f'starting from checkpoint {STEPS} in {base}, with its optimizer' in out
    setup = parts_of(text, optim__learning_rate=1e-4)
    state, _ = start(setup, base, step='latest', keep_optimizer=True)
    assert runs.metrics(tmp_path / 'tuned')[0]['loss'] == float(
        programs.compile_train_step(setup)(
            state, feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)
        )[1]['loss']
    )
    assert 'resuming' not in out
    assert 'is finished' in runs.quiet_train(config, tmp_path / 'tuned')[1]
    config.train.init_from = str(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='nowhere: no such folder'):
        runs.quiet_train(config, tmp_path / 'other')


def test_an_impossible_start_does_not_move_the_old_run(text, tmp_path):
    """Not even with --fresh, which moves an old run aside."""
    runs.quiet_train(runs.make_config(text, **QUIET), tmp_path / 'run')
    before = sorted(path.name for path in tmp_path.rglob('*'))
    for source, said in (
        ('nowhere', 'nowhere: no such folder'),
        ('run', 'is the folder that --fresh moves aside: give another --workdir'),
    ):
        config = runs.make_config(text, **QUIET, train__init_from=str(tmp_path / source))
        with pytest.raises(UserError, match=said):
            runs.quiet_train(config, tmp_path / 'run', fresh=True)
        assert sorted(path.name for path in tmp_path.rglob('*')) == before
