"""Checkpoints worth studying: those that checkpoint.keep names stay, and each is what it says."""

import itertools
import re
import types

import numpy as np
import pytest
import runs
from tiny import flat

from gpt2_jax.config import resolve
from gpt2_jax.training.programs import new_state
from gpt2_jax.training.setup import build
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.checkpoints import Checkpoints, state_bytes
from gpt2_jax.workdir.checksums import FOLDER, all_steps, committed_steps
from gpt2_jax.workdir.restore import load
from gpt2_jax.workdir.storage import Kept, is_log_spaced

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def reference(text, tmp_path_factory):
    """The run that keeps its latest checkpoints."""
    folder = tmp_path_factory.mktemp('reference') / 'run'
    assert runs.quiet_train(runs.make_config(text), folder)[0] == 0
    return folder


def test_log_spaced_steps():
    steps = [step for step in range(3001) if is_log_spaced(step, 700)]
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700, 1400, 2100, 2800]


@pytest.mark.long
def test_a_run_that_keeps_more_is_the_run_that_keeps_less(text, reference, tmp_path):
    """Stopped at once and resumed: step 0 is kept, saved once, and changes no bit of the run."""
    config, run = runs.make_config(text, checkpoint__keep='log'), tmp_path / 'run'
    with pytest.MonkeyPatch.context() as patch:

        def fail(state):
            raise KeyboardInterrupt

        runs.before_updates(patch, fail)
        with pytest.raises(KeyboardInterrupt):
            runs.quiet_train(config, run)
    assert all_steps(run / FOLDER) == [0]
    before = (run / FOLDER / '0' / 'SHA256SUMS').stat().st_mtime_ns
    code, printed = runs.quiet_train(config, run)
    assert code == 0
    assert (run / FOLDER / '0' / 'SHA256SUMS').stat().st_mtime_ns == before
    assert runs.differences(run, reference) == []
    said = re.search(r'checkpoints kept for good: up to 7 of ([\d.]+) MiB', printed)
    on_disk = sum(
        file.stat().st_size
        for item in ('params', 'train')
        for file in (run / FOLDER / '8' / item).rglob('*')
        if file.is_file()
    )
    assert float(said[1]) * 2**20 == pytest.approx(on_disk, rel=0.5)
    # The latest two and the best too; each has as many updates as it says.
    steps = committed_steps(run / FOLDER)
    assert {0, 1, 2, 4, 8, 16, 18} <= set(steps)
    assert len(steps) <= 8
    assert [load(run, str(step)).step for step in steps] == steps
    drawn = flat(new_state(build(resolve(config))).params)
    saved = flat(load(run, '0').params)
    assert all(np.array_equal(leaf, drawn[name]) for name, leaf in saved.items())


def test_all_keeps_every_checkpoint(tmp_path):
    kept = Kept('all', 1)
    assert kept.includes(0)
    assert kept.includes(13)
    with Checkpoints(tmp_path, kept=kept) as checkpoints:
        params = {'kernel': np.zeros(2**18, np.float32)}
        state = TrainState(np.int32(0), params, {}, rounded=params)  # which is not saved
        (line,) = checkpoints.describe_kept(state, steps=13, every=5, eval_every=7)
    # Every 5 steps, the evaluations at 7 and 13 if they are the best, and the last.
    assert line.startswith('checkpoints kept for good: up to 5 of 1.0 MiB')


@pytest.mark.parametrize('keep', ['log', 'all'])
def test_the_checkpoints_of_a_run_are_counted(keep, tmp_path):
    """Without a list of all steps, which would not end for a run that is to end by a signal."""
    state = TrainState(np.int32(0), {'kernel': np.zeros(1, np.float32)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        for steps, every, eval_every in itertools.product(
            (1, 12, 512, 700, 2001), (1, 5, 6), (4, 9)
        ):
            checkpoints.kept = Kept(keep, every)
            (line,) = checkpoints.describe_kept(state, steps, every, eval_every)
            kept = {0, steps} | {
                step
                for step in range(steps)
                if (is_log_spaced(step, every) if keep == 'log' else not step % every)
                or (keep == 'all' and not step % eval_every)
            }
            assert f'up to {len(kept):,} of' in line, (steps, every, eval_every)
        checkpoints.describe_kept(state, 2**31 - 1, 1, 1)


@pytest.mark.parametrize(('steps', 'n'), [(100, 4), (10, 3), (6, 2)])
def test_little_room_is_said_for_the_checkpoints_that_there_will_be(
    steps, n, tmp_path, monkeypatch
):
    params = {'kernel': np.zeros(2**18, np.float32)}
    state = TrainState(np.int32(0), params, {})

    def lines(free):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr('shutil.disk_usage', lambda path: usage)
        return checkpoints.describe_kept(state, steps=steps, every=5, eval_every=7)

    with Checkpoints(tmp_path, kept=Kept('latest', 1)) as checkpoints:
        size = state_bytes(state)
        assert lines(n * size) == []
        assert lines(size - 1) == []  # less than one checkpoint is an error: see check_room
        (line,) = lines(n * size - 1)
    assert line.startswith(f'little room: there will be {n} more checkpoints of 1.0 MiB, and the')
