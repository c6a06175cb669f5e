"""A run's life as people lead it: whatever happens to its folder, it ends bit-equal, or is refused.

Rules train, stop, crash, rename, copy, damage, cut short, add and delete. After each, every update
that is made gives the very state that an undisturbed run has at this step, or the run is refused
with one line and no whole checkpoint is lost.

    LIFE=200 python -m pytest tests/faults/test_life.py               # 200 lives instead of a few
    LIFE=200 JAX_NUM_CPU_DEVICES=2 LIFE_MESH=2 python -m pytest ..    # on a mesh of two devices
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from gpt2_jax.errors import UserError
from gpt2_jax.workdir.checksums import CHECKSUMS, FOLDER, all_steps, verify

STEPS, MORE_STEPS = 12, 15
CHANGES = {
    'model__n_embd': 8,
    'model__n_positions': 8,
    'train__steps': STEPS,
    'eval__every': 4,
    'eval__sample_tokens': 3,
    'checkpoint__every': 3,
    'mesh__data': int(os.environ.get('LIFE_MESH', '1')),
}
LIVES = int(os.environ.get('LIFE', '0'))
NAMES = ('run', 'p[1]', 'a b', 'ü*?', 'x/[!y]/{z}')
ADDED = ('.DS_Store', 'params/Thumbs.db', 'train/d/.nfs01', '.x.syncthing.tmp', 'metrics/old')

choices = st.integers(0, 10**6)


class Stop:
    """A hook that ends the run at a step: by a signal, or as an unexpected error would."""

    def __init__(self, step: int, crash: bool):
        self.step, self.crash = step, crash

    def due(self, step):
        if step == self.step and self.crash:
            raise Crash
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)
        return False

    def __call__(self, step, state):
        raise AssertionError


class Crash(Exception):
    """Stands in for a bug or a power cut between two saves."""


class Record:
    """A hook that notes the SHA-256 of the state after each update."""

    def __init__(self):
        self.digests = {}

    def due(self, step):
        return True

    def __call__(self, step, state):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state):
            digest.update(np.asarray(leaf).tobytes())
        self.digests[step] = digest.hexdigest()


@functools.cache
def undisturbed() -> tuple[Path, dict[int, str], dict[int, str]]:
    """A text, and the digests of the run on it, and of its extension."""
    folder = Path(tempfile.mkdtemp(prefix='undisturbed.'))
    text = runs.write_text(folder / 'text.txt', words=150)
    record, more = Record(), Record()
    runs.quiet_train(runs.make_config(text, **CHANGES), folder / 'run', hooks=[record])
    shutil.copytree(folder / 'run', folder / 'more')
    config = runs.make_config(text, **CHANGES | {'train__steps': MORE_STEPS})
    runs.quiet_train(config, folder / 'more', extend=True, hooks=[more])
    return text, record.digests, record.digests | more.digests


class Life(RuleBasedStateMachine):
    """One folder and what may happen to it."""

    @initialize()
    def begin(self):
        self.home = Path(tempfile.mkdtemp(prefix='life.'))
        self.text, self.digests, self.more = undisturbed()
        self.run, self.steps, self.logs_are_whole = self.home / NAMES[0], STEPS, True

    def teardown(self):
        shutil.rmtree(self.home, ignore_errors=True)

    # -- what the run does

    def train(self, *hooks, **options) -> str | None:
        """Trains, and checks each update; returns the refusal, if it was refused."""
        if self.steps == MORE_STEPS and max(self.whole_steps(), default=0) < STEPS:
            self.steps = STEPS  # from an earlier step the extended schedule would be another
        record, before, refusal = Record(), self.whole_steps(), None
        config = runs.make_config(self.text, **CHANGES | {'train__steps': self.steps})
        try:
            code, printed = runs.quiet_train(config, self.run, hooks=[record, *hooks], **options)
        except UserError as error:
            refusal = str(error)
        finally:
            expected = self.digests if self.steps == STEPS else self.more
            wrong = [step for step, sha in record.digests.items() if expected[step] != sha]
            assert not wrong, f'the state of step {wrong[0]} is not that of the undisturbed run'
        if refusal:
            assert '\n' not in refusal
            assert record.digests or self.whole_steps() >= before
        elif code == 0:
            assert all_steps(self.run / FOLDER)[-1] == self.steps, printed
            if self.logs_are_whole:
                self.check_logs()
        return refusal

    def whole_steps(self) -> set[int]:
        """The steps whose checkpoint can be used."""
        folder = self.run / FOLDER
        return {step for step in all_steps(folder) if verify(folder / str(step)) is None}

    def check_logs(self):
        records = [(record['step'], record['split']) for record in runs.metrics(self.run)]
        assert len(set(records)) == len(records)
        assert {step for step, split in records if split == 'val'} >= set(range(4, STEPS + 1, 4))
        assert max(runs.events(self.run).values()) == 1
        summary = json.loads((self.run / 'summary.json').read_text())
        assert summary['steps'] == self.steps

    @rule(step=st.integers(1, STEPS), crash=st.booleans())
    def train_and_stop(self, step, crash):
        with contextlib.suppress(Crash):
            self.refused(self.train(Stop(step, crash)))

    @rule()
    def finish(self):
        self.refused(self.train())

    @rule()
    def extend(self):
        """A finished run only: else the schedule of earlier updates would change."""
        if self.steps == STEPS and max(self.whole_steps(), default=0) == STEPS:
            self.steps = MORE_STEPS
            self.refused(self.train(extend=True))

    def refused(self, problem: str | None):
        """After a refusal people begin again."""
        if problem:
            self.steps, self.logs_are_whole = STEPS, True
            assert self.train(fresh=True) is None, problem

    # -- what happens to its folder

    @rule(name=st.sampled_from(NAMES))
    def rename_folder(self, name):
        if self.run.exists() and not (self.home / name).exists():
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            self.run = self.run.rename(self.home / name)

    @rule(choice=choices)
    def copy_folder(self, choice):
        if self.run.exists():
            self.run = Path(shutil.copytree(self.run, self.home / f'copy {choice}'))

    @rule()
    def move_text(self):
        moved = self.home / 'moved.txt'
        if not moved.exists():
            self.text = Path(shutil.copy(self.text, moved))

    def checkpoint(self, choice: int) -> Path | None:
        steps = all_steps(self.run / FOLDER)
        return self.run / FOLDER / str(steps[choice % len(steps)]) if steps else None

    @rule(choice=choices, how=st.sampled_from(('flip', 'cut', 'delete', 'empty')))
    def damage(self, choice, how):
        path = self.checkpoint(choice)
        if files := sorted(file for file in path.rglob('*') if file.is_file()) if path else []:
            file = files[choice % len(files)]
            data = bytearray(file.read_bytes())
            if how == 'delete':
                file.unlink()
            elif data:
                data[choice % len(data)] ^= 1 + choice % 255
                file.write_bytes({'flip': data, 'cut': data[:-1], 'empty': b''}[how])

    @rule(choice=choices, step=st.integers(0, STEPS + 3))
    def rename_checkpoint(self, choice, step):
        if (path := self.checkpoint(choice)) and not path.with_name(str(step)).exists():
            path.rename(path.with_name(str(step)))

    @rule(choice=choices, step=st.integers(0, STEPS + 3))
    def copy_checkpoint(self, choice, step):
        if (path := self.checkpoint(choice)) and not path.with_name(str(step)).exists():
            shutil.copytree(path, path.with_name(str(step)))

    @rule(moved=st.booleans())
    def cut_the_last_save_short(self, moved):
        """Killed before Orbax moved the checkpoint into place, or before it was committed."""
        if path := self.checkpoint(-1):
            (path / CHECKSUMS).unlink(missing_ok=True)
            unmoved = path.with_name(f'{path.name}.orbax-checkpoint-tmp')
            if not moved and not unmoved.exists():
                path.rename(unmoved)

    @rule(choice=choices)
    def delete_checkpoint(self, choice):
        if path := self.checkpoint(choice):
            shutil.rmtree(path)

    @rule(choice=choices, name=st.sampled_from(ADDED))
    def add_file(self, choice, name):
        if path := self.checkpoint(choice):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text('x')
            (self.run / FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
            (self.run / FOLDER / name).write_text('x')

    @rule(name=st.sampled_from(('metrics.jsonl', 'samples.txt', 'tensorboard', 'summary.json')))
    def delete_log(self, name):
        path = self.run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        self.logs_are_whole = False

    @rule(choice=choices)
    def cut_metrics_short(self, choice):
        if (path := self.run / 'metrics.jsonl').exists():
            self.logs_are_whole = False
            data = path.read_bytes()
            path.write_bytes(data[: choice % (len(data) + 1)])


@pytest.mark.filterwarnings('ignore::hypothesis.errors.HypothesisWarning')
@pytest.mark.long
def test_a_run_ends_bit_equal_or_is_refused():
    with runs.trace_once():
        run_state_machine_as_test(
            Life,
            settings=settings(
                max_examples=LIVES or 2,
                stateful_step_count=25 if LIVES else 6,
                derandomize=not LIVES,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
