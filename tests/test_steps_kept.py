"""Checkpoints worth studying: those that checkpoint.keep names stay, and each is what it says."""

import re

import numpy as np
import pytest
import runs
from tiny import flat

from gpt2_jax.config import resolve
from gpt2_jax.training.programs import new_state
from gpt2_jax.training.setup import build
from gpt2_jax.workdir.checksums import FOLDER, all_steps, committed_steps
from gpt2_jax.workdir.restore import load
from gpt2_jax.workdir.storage import is_log_spaced


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    with runs.compile_once():
        yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt')


@pytest.fixture(scope='module')
def reference(text, tmp_path_factory):
    """The run that keeps its latest checkpoints."""
    folder = tmp_path_factory.mktemp('reference') / 'run'
    assert runs.quiet_train(runs.make_config(text), folder)[0] == 0
    return folder


def test_log_spaced_steps():
    steps = [step for step in range(3001) if is_log_spaced(step, 700)]
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700, 1400, 2100, 2800]


def test_the_kept_checkpoints_are_those_of_their_steps(text, reference, tmp_path):
    """Keeping more changes no bit of the run, and the checkpoint of step S has S updates."""
    config = runs.make_config(text, checkpoint__keep='log', checkpoint__every=100)
    code, printed = runs.quiet_train(config, tmp_path / 'run')
    assert code == 0
    steps = committed_steps(tmp_path / 'run' / FOLDER)
    assert {0, 1, 2, 4, 8, 16, 18} <= set(steps)
    said = re.search(r'checkpoints kept for good: up to 7 of ([\d.]+) MiB', printed)
    on_disk = sum(
        file.stat().st_size
        for item in ('params', 'train')
        for file in (tmp_path / 'run' / FOLDER / '8' / item).rglob('*')
        if file.is_file()
    )
    assert float(said[1]) * 2**20 == pytest.approx(on_disk, rel=0.5)
    assert runs.differences(tmp_path / 'run', reference) == []
    restored = load(tmp_path / 'run', '0')
    drawn = flat(new_state(build(resolve(config))).params)
    assert all(np.array_equal(leaf, drawn[name]) for name, leaf in flat(restored.params).items())
    eight = load(tmp_path / 'run', '8')
    assert eight.meta['progress']['train_steps'] <= 8
    for step in steps:
        assert load(tmp_path / 'run', str(step)).step == step


def test_all_keeps_every_checkpoint(text, tmp_path):
    config = runs.make_config(text, checkpoint__keep='all', train__steps=13)
    code, printed = runs.quiet_train(config, tmp_path / 'run')
    assert code == 0
    # Every 5 steps, the evaluations at 7 and 13 if they are the best, and the last.
    assert {0, 5, 10, 13} <= set(committed_steps(tmp_path / 'run' / FOLDER)) <= {0, 5, 7, 10, 13}
    assert 'checkpoints kept for good: up to 5 of' in printed


def test_a_run_that_was_stopped_at_once_keeps_its_step_0(text, reference, tmp_path):
    """The checkpoint of step 0 is no reason to call a run begun, and it is not saved twice."""
    config, run = runs.make_config(text, checkpoint__keep='log'), tmp_path / 'run'
    with pytest.MonkeyPatch.context() as patch:

        def fail(state):
            raise KeyboardInterrupt

        runs.before_updates(patch, fail)
        with pytest.raises(KeyboardInterrupt):
            runs.quiet_train(config, run)
    assert all_steps(run / FOLDER) == [0]
    before = (run / FOLDER / '0' / 'SHA256SUMS').stat().st_mtime_ns
    assert runs.quiet_train(config, run)[0] == 0
    assert (run / FOLDER / '0' / 'SHA256SUMS').stat().st_mtime_ns == before
    assert runs.differences(run, reference) == []
