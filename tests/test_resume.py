"""A stopped run resumes as if it had never been stopped, or says why it cannot resume."""

import fcntl
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import kill_runs
import pytest
import runs
from runs import make_config

from gpt2_jax import config as config_lib
from gpt2_jax import hooks
from gpt2_jax import train as train_lib
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.parallel import feed
from gpt2_jax.training import start
from gpt2_jax.workdir import checksums, folder, restore
from gpt2_jax.workdir.checksums import all_steps, best_step

STEPS = runs.SMALL['train.steps']

pytestmark = pytest.mark.usefixtures('trace_once')


@pytest.fixture(scope='module')
def reference(text, tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp('reference') / 'run'
    assert runs.quiet_train(make_config(text), folder)[0] == 0
    return folder


@pytest.fixture(scope='module')
def half(text, tmp_path_factory):
    """A run that was stopped at step 12, where no save was due."""
    folder = tmp_path_factory.mktemp('half') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 12, signal.SIGTERM)
        code, printed = runs.quiet_train(make_config(text), folder)
    assert code == 128 + signal.SIGTERM
    assert 'stopped by SIGTERM at step 12' in printed
    return folder


@pytest.fixture
def stopped(half, tmp_path):
    return shutil.copytree(half, tmp_path / 'run')


def signal_at(patch, step, number):
    """Sends the signal during an update."""

    def change(state):
        if state.step == step - 1:
            signal.raise_signal(number)
        return state

    runs.before_updates(patch, change)


class SignalAt:
    """A hook that sends a signal in the middle of an iteration, after the loop has polled."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def due(self, step):
        if step == self.step:
            signal.raise_signal(self.number)
        return False

    def __call__(self, step, state):
        raise AssertionError


def signal_in_evaluation(patch, n):
    """Makes Ctrl-C arrive during the n-th evaluation of a process, counted from 1."""
    make = train_lib.make_evaluate

    def make_interrupted(*args, **options):
        evaluate, count = make(*args, **options), itertools.count(1)

        def run(params, on_batch):
            if next(count) == n:
                signal.raise_signal(signal.SIGINT)
            return evaluate(params, on_batch=on_batch)

        return run

    patch.setattr(train_lib, 'make_evaluate', make_interrupted)


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob('*')
        if path.name != '.lock'
    }


@pytest.mark.long
def test_processes_that_are_killed_and_stopped(text, reference, tmp_path):
    draw, run = random.Random(3), tmp_path / 'run'

    def start():
        return kill_runs.start(run, text, runs.compile_cache(), runs.SMALL)

    moments = (kill_runs.kill(start(), run, draw, in_save=True, delay=0) for _ in range(3))
    assert any('in the save of' in str(moment) for moment in moments)  # usually the first
    process = start()
    time.sleep(draw.uniform(1, 3))  # mostly while it compiles, or in its first steps
    process.kill()
    process.communicate()
    for number in (signal.SIGTERM, signal.SIGINT):
        known, process = all_steps(run / 'checkpoints'), start()
        while process.poll() is None and set(all_steps(run / 'checkpoints')) <= set(known):
            time.sleep(0.002)
        process.send_signal(number)
        printed, _ = process.communicate()
        assert process.returncode == 128 + number, printed
        assert re.search(rf'stopped by {number.name} at step \d+, which is saved', printed), printed
    kill_runs.finish(start())
    assert runs.differences(run, reference) == []


@pytest.mark.parametrize(
    ('number', 'at'),
    # 7 is evaluated, 10 is saved
    [(signal.SIGTERM, 7), (signal.SIGINT, 9), (signal.SIGXCPU, 9)],
)
def test_a_signal_saves_and_ends_the_run(number, at, text, reference, tmp_path):
    # A shell ignores Ctrl-C in its background jobs.
    before = signal.signal(number, signal.default_int_handler)
    config = make_config(text, log__every=1)
    # A limit of CPU seconds sends its signal again and again: the save must not end at it.
    hooks = [SignalAt(at, number)] * (1 + (number == signal.SIGXCPU))
    code, printed = runs.quiet_train(config, tmp_path, hooks=hooks)
    assert code == 128 + number
    assert f'stopped by {number.name} at step {at + 1}, which is saved' in printed
    assert signal.signal(number, before) is signal.default_int_handler
    assert runs.quiet_train(make_config(text, log__every=1), tmp_path)[0] == 0
    assert runs.different_states(tmp_path, reference) == []
    steps = [record['step'] for record in runs.metrics(tmp_path) if record['split'] == 'train']
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_other_signals_save_and_end_the_run_too(number, text, tmp_path):
    def nothing(*_):
        pass

    before = signal.signal(number, nothing)
    code, printed = runs.quiet_train(make_config(text), tmp_path, hooks=[SignalAt(1, number)])
    assert signal.signal(number, before) is nothing
    assert code == 128 + number
    assert f'stopped by {number.name} at step 2, which is saved' in printed
    assert all_steps(tmp_path / 'checkpoints') == [2]


def test_under_nohup_the_loss_of_the_terminal_is_ignored(text, reference, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hooks = [SignalAt(9, signal.SIGHUP)]
        assert runs.quiet_train(make_config(text), tmp_path, hooks=hooks)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert runs.differences(tmp_path, reference) == []


@pytest.mark.parametrize(
    ('n', 'step', 'then'),
    [(1, 7, 7), pytest.param(2, 14, 18, marks=pytest.mark.long), (3, 18, 18)],
)
def test_ctrl_c_in_an_evaluation_saves_at_once(n, step, then, text, reference, tmp_path):
    """Evaluations are due at steps 7, 14 and 18. The resumed run is stopped in one more of them."""
    with pytest.MonkeyPatch.context() as patch:
        signal_in_evaluation(patch, n)
        code, printed = runs.quiet_train(make_config(text), tmp_path)
    assert code == 128 + signal.SIGINT
    assert f'step {step}: the evaluation was stopped; the resumed run repeats it' in printed
    assert f'stopped by SIGINT at step {step}, which is saved' in printed
    assert not [r for r in runs.metrics(tmp_path) if (r['step'], r['split']) == (step, 'val')]
    assert f'=== step {step} ===' not in (tmp_path / 'samples.txt').read_text()
    with pytest.MonkeyPatch.context() as patch:
        signal_in_evaluation(patch, 1 if then == step else 2)
        code, printed = runs.quiet_train(make_config(text), tmp_path)
    assert code == 128 + signal.SIGINT
    assert f'stopped by SIGINT at step {then}, which is saved' in printed
    assert runs.quiet_train(make_config(text), tmp_path)[0] == 0
    assert runs.differences(tmp_path, reference) == []
    assert best_step(tmp_path / 'checkpoints') == best_step(reference / 'checkpoints')


def test_a_sample_is_stopped_by_ctrl_c(text, reference, tmp_path, monkeypatch):
    sampled = hooks.continue_text

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return sampled(*args, **options)

    monkeypatch.setattr(hooks, 'continue_text', interrupted)
    code, printed = runs.quiet_train(make_config(text), tmp_path)
    assert code == 128 + signal.SIGINT
    assert 'stopped by SIGINT at step 7, which is saved' in printed
    assert (tmp_path / 'samples.txt').read_text() == ''
    monkeypatch.undo()
    assert runs.quiet_train(make_config(text), tmp_path)[0] == 0
    assert runs.differences(tmp_path, reference) == []


def test_a_checkpoint_evaluated_after_its_save_is_kept_as_the_best(text, tmp_path, monkeypatch):
    """The evaluation of step 7 is stopped, repeated, and made better than all later ones."""
    with pytest.MonkeyPatch.context() as patch:
        signal_in_evaluation(patch, 1)
        runs.quiet_train(make_config(text), tmp_path)
    make = train_lib.make_evaluate

    def make_worse(*args, **options):
        evaluate, losses = make(*args, **options), itertools.count(1)
        return lambda *args, **kw: evaluate(*args, **kw)._replace(loss=float(next(losses)))

    monkeypatch.setattr(train_lib, 'make_evaluate', make_worse)
    assert runs.quiet_train(make_config(text, checkpoint__every=3), tmp_path)[0] == 0
    assert best_step(tmp_path / 'checkpoints') == (7, 1.0)
    assert all_steps(tmp_path / 'checkpoints') == [7, 15, 18]
    assert restore.load(tmp_path, 'best').step == 7


def test_the_interval_of_evaluations_changes_no_parameter(text, reference, tmp_path):
    assert runs.quiet_train(make_config(text, eval__every=1000), tmp_path)[0] == 0
    assert runs.different_states(tmp_path, reference) == []


def test_a_finished_run_says_so_and_changes_nothing(text, reference):
    before = snapshot(reference)
    code, printed = runs.quiet_train(make_config(text), reference)
    best = json.loads((reference / 'summary.json').read_text())['best_val_loss']
    assert code == 0
    assert f'is finished: {STEPS} steps, best validation loss {best:.4f}' in printed
    assert snapshot(reference) == before


def test_a_finished_run_writes_deleted_settings_again(text, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / 'run')
    before = {name: (run / name).read_bytes() for name in ('config.json', 'tokenizer.json')}
    for name in before:
        (run / name).unlink()
    assert runs.quiet_train(make_config(text), run)[0] == 0
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_terminal_does_not_obey_the_name_of_a_folder(text, reference, tmp_path, monkeypatch):
    run = shutil.copytree(reference, tmp_path / 'a\x1b[2Jb')
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    assert train_lib.train(make_config(text), run) == 0
    assert r'a\x1b[2Jb is finished' in sys.stdout.getvalue()
    assert '\x1b' not in sys.stdout.getvalue()


def test_killed_between_the_last_save_and_the_summary(text, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / 'run')
    (run / 'summary.json').unlink()
    assert runs.quiet_train(make_config(text), run)[0] == 0
    assert runs.differences(run, reference) == []
    summary, wanted = (
        json.loads((folder / 'summary.json').read_text()) for folder in (run, reference)
    )
    assert all(
        summary[key] == wanted[key] for key in ('seconds_to_first_step', 'tokens_per_second')
    )


def test_summary(text, reference):
    summary = json.loads((reference / 'summary.json').read_text())
    assert summary['steps'] == STEPS
    assert summary['tokens'] == STEPS * 4 * 16
    validated = [record for record in runs.metrics(reference) if record['split'] == 'val']
    best = min(validated, key=lambda record: record['loss'])
    assert (summary['best_step'], summary['best_val_loss']) == (best['step'], best['loss'])
    assert summary['final_val_loss'] == validated[-1]['loss']
    assert validated[-1]['step'] == STEPS
    assert summary['val_tokens'] == best['tokens'] == -(-len(text.read_text()) // 10) - 1
    assert 0 < summary['seconds_to_first_step'] < summary['seconds_total'] < 100
    assert summary['tokens_per_second'] > 0
    assert summary['parameters'] == 13_280
    assert summary['device'].startswith('cpu')
    assert summary['jax_version']


def test_settings_without_effect_on_updates_may_change(text, reference, stopped, monkeypatch):
    # What eval.tokens is if left open follows eval.every: here from 8,192 to 106.
    monkeypatch.setattr(config_lib, 'MIN_EVAL_TOKENS', 100)
    changed = make_config(
        text, eval__every=5, eval__sample_tokens=0, checkpoint__every=4, log__every=1
    )
    code, printed = runs.quiet_train(changed, stopped)
    assert code == 0
    assert 'evaluations keep their size of 8,192 tokens, so that losses stay comparable' in printed
    assert runs.different_states(stopped, reference) == []
    assert runs.metrics(stopped)[-1]['tokens'] == runs.metrics(reference)[-1]['tokens']
    assert json.loads((stopped / 'config.json').read_text())['eval']['tokens'] == 8192


def test_other_settings_may_not_change(text, stopped, monkeypatch, capsys):
    before = snapshot(stopped)
    changed = make_config(
        text, model__n_embd=16, train__seed=5, optim__beta1=0.8, eval__every=3, eval__tokens=50
    )
    with pytest.raises(UsageError) as error:
        runs.quiet_train(changed, stopped)
    for part in (
        'model.n_embd: 32 there, 16 now',
        'train.seed: 0 there, 5 now',
        'optim.beta1: 0.9 there, 0.8 now',
        'eval.tokens: 8192 there, 50 now',
        '--fresh',
        '--workdir',
    ):
        assert part in str(error.value)
    assert 'eval.every' not in str(error.value)
    # The size of evaluations would be kept, but a run that is refused says nothing about it.
    monkeypatch.setattr(config_lib, 'MIN_EVAL_TOKENS', 100)
    refused = make_config(text, train__steps=6, eval__every=5)
    with pytest.raises(UsageError, match=r'train\.steps: \d+ there, 6 now;'):
        train_lib.train(refused, stopped)
    assert 'evaluations' not in capsys.readouterr().out
    assert snapshot(stopped) == before


def test_a_run_of_an_older_version_keeps_its_order(text, stopped, monkeypatch):
    """Such a run has no train.order in its files, and its epochs had tables."""
    with pytest.raises(UsageError, match=r"train\.order: 'keyed' there, 'table' now"):
        runs.quiet_train(make_config(text, train__order='table'), stopped)
    checkpoint = stopped / checksums.FOLDER / '12'
    meta = json.loads((checkpoint / 'meta/metadata').read_text())
    settings = json.loads(meta['config'])
    del settings['train']['order']
    (checkpoint / 'meta/metadata').write_text(json.dumps(meta | {'config': json.dumps(settings)}))
    checksums.write_checksums(checkpoint)
    make, orders = feed.train_batches, []
    monkeypatch.setattr(
        feed, 'train_batches', lambda *a, **options: orders.append(options) or make(*a, **options)
    )
    code, printed = runs.quiet_train(make_config(text), stopped)
    assert code == 0
    assert "train.order stays 'table': an older version started this run\n" in printed
    assert [(options['start'], options['order']) for options in orders] == [(12, 'table')]
    assert json.loads((stopped / 'config.json').read_text())['train']['order'] == 'table'


def test_a_changed_text_is_refused(text, stopped, tmp_path):
    shutil.copy(text, tmp_path / 'kept')
    words = text.read_text()
    try:
        text.write_text(words[:-1] + words[0])
        with pytest.raises(UsageError, match=r'data\.corpus \(its text\).* there, .* now'):
            runs.quiet_train(make_config(text), stopped)
    finally:
        shutil.copy(tmp_path / 'kept', text)


def test_the_same_text_may_move(text, reference, stopped, tmp_path):
    moved = shutil.copy(text, tmp_path / 'moved.txt')
    code, printed = runs.quiet_train(make_config(moved), stopped)
    assert code == 0
    assert f'data.corpus is now {moved}: the text is the same as in {text}' in printed
    assert runs.different_states(stopped, reference) == []
    assert runs.metrics(stopped) == runs.metrics(reference)


def test_evaluate_finds_a_text_that_was_moved(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / 'run')
    text = Path(json.loads((run / 'summary.json').read_text())['corpus']['asked_for'])
    moved = text.rename(text.with_name('moved.txt'))
    try:
        code, _, err = runs.script('evaluate', f'--ckpt_dir={run}')
        assert code == 1
        assert err.endswith(f'; --corpus=PATH says where {text} is now\n')
        code, _, err = runs.script('evaluate', f'--ckpt_dir={run}', f'--corpus={moved}')
        assert code == 0, err
        moved.with_name('other.txt').write_text(moved.read_text() + 'ba')
        code, _, err = runs.script(
            'evaluate', f'--ckpt_dir={run}', f'--corpus={moved.with_name("other.txt")}'
        )
        assert code == 1
        assert 'the run was trained on' in err
        assert err.endswith(
            'restore the old text to compare figures, or score another with --text\n'
        )
    finally:
        moved.rename(text)


def test_a_deleted_configuration_is_written_again(text, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / 'run')
    (run / 'config.json').unlink()
    command = ('steps', 'find', f'--workdir={run}', '--text=ba')
    code, _, err = runs.script(*command)
    assert code == 1
    assert err.endswith('was it deleted? The command that trained the run writes it again\n')
    assert runs.quiet_train(make_config(text), run)[0] == 0
    assert runs.script(*command)[0] == 0


def test_train_steps_may_only_grow_and_only_with_extend(text, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / 'run')
    with pytest.raises(
        UsageError, match=r'train\.steps: 18 there, 30 now \(--extend allows a larger'
    ):
        runs.quiet_train(make_config(text, train__steps=30), run)
    with pytest.raises(UsageError, match=r'train\.steps: 18 there, 12 now; '):
        runs.quiet_train(make_config(text, train__steps=12), run, extend=True)
    code, printed = runs.quiet_train(make_config(text, train__steps=30), run, extend=True)
    assert code == 0
    told = re.search(
        r'extended from 18 to 30 steps: the schedule now spans all .* learning rate at step 18 '
        r'changes from (\S+) to (\S+)',
        printed,
    )
    assert float(told[1]) == pytest.approx(6e-5)
    assert float(told[2]) > 3e-4
    records = runs.metrics(run)
    assert records[: len(runs.metrics(reference))] == runs.metrics(reference)
    assert records[-1]['step'] == 30
    assert max(runs.events(run).values()) == 1
    assert json.loads((run / 'summary.json').read_text())['steps'] == 30


def test_an_extension_that_keeps_the_learning_rate_says_so(text):
    old, new = (make_config(text, train__steps=n, optim__warmup_steps=50) for n in (18, 30))
    said = start._describe_extension(old, new, 9)
    assert said.endswith('the learning rate at step 9 stays 0.000588')


def test_fresh_moves_the_old_run_aside(text, reference, stopped):
    before = {
        path.relative_to(stopped): path.read_bytes()
        for path in stopped.rglob('*')
        if path.is_file()
    }
    code, printed = runs.quiet_train(make_config(text), stopped, fresh=True)
    (aside,) = (folder for folder in stopped.parent.iterdir() if folder != stopped)
    assert code == 0
    assert f'the old run was moved to {aside}' in printed
    before.pop(next(path for path in before if path.name == '.lock'))
    assert all((aside / path).read_bytes() == data for path, data in before.items())
    assert runs.differences(stopped, reference) == []


def test_fresh_moves_nothing_if_the_run_cannot_start(text, stopped):
    before = snapshot(stopped)
    with pytest.raises(UserError, match='too few'):
        runs.quiet_train(make_config(text, model__n_positions=5000), stopped, fresh=True)
    assert snapshot(stopped) == before


def test_logs_are_cut_back_to_the_checkpoint(text, reference, stopped):
    for name in ('metrics.jsonl', 'samples.txt'):
        with open(stopped / name, 'a') as file:
            file.write('{"step": 14, "split": "train", "loss"')
    (event_file,) = (stopped / 'tensorboard').iterdir()
    data = event_file.read_bytes()
    event_file.write_bytes(data + data[:-5])  # every record again, and half a record
    (stopped / 'tensorboard/events.out.tfevents.later').write_bytes(data)
    assert runs.quiet_train(make_config(text), stopped)[0] == 0
    assert runs.differences(stopped, reference) == []


def test_logs_that_were_lost_before_a_resume_are_reported(text, reference, stopped):
    """The run goes on with logs that can be read."""
    metrics = stopped / 'metrics.jsonl'
    metrics.write_bytes(metrics.read_bytes()[:-20])
    (stopped / 'samples.txt').unlink()
    code, printed = runs.quiet_train(make_config(text), stopped)
    assert code == 0
    assert re.search(r'metrics\.jsonl was cut short: 20 of the [\d,]+ bytes', printed), printed
    assert 'samples.txt is missing: its records up to the checkpoint are lost' in printed
    assert runs.different_states(stopped, reference) == []
    records = runs.metrics(stopped)
    lost = [record for record in runs.metrics(reference) if record not in records]
    assert [record['step'] for record in lost] == [12]


def test_a_folder_that_is_moved_stops_the_run(text, reference, tmp_path):
    """Another run may have begun in its place: nothing may be written there."""
    run, moved = tmp_path / 'run', tmp_path / 'run.old'

    class Move:
        def due(self, step):
            return step == 12

        def __call__(self, step, state):
            while not (run / 'checkpoints/10/SHA256SUMS').exists():
                time.sleep(0.01)
            run.rename(moved)
            run.mkdir()
            (run / '.lock').touch()

    with pytest.raises(UserError, match=r'run was moved, or its file \.lock was removed'):
        runs.quiet_train(make_config(text), run, hooks=[Move()])
    assert sorted(path.name for path in run.rglob('*')) == ['.lock']
    assert runs.quiet_train(make_config(text), moved)[0] == 0
    assert runs.differences(moved, reference) == []


def test_a_lock_that_is_removed_stops_the_run(text, tmp_path):
    class Remove:
        def due(self, step):
            return step == 12

        def __call__(self, step, state):
            (tmp_path / '.lock').unlink()

    with pytest.raises(UserError, match=r'file \.lock was removed'):
        runs.quiet_train(make_config(text), tmp_path, hooks=[Remove()])
    assert runs.quiet_train(make_config(text), tmp_path)[0] == 0


def test_a_folder_that_is_moved_before_it_is_locked(tmp_path, monkeypatch):
    """As --fresh of another process may: the lock is taken in the folder that has the name now."""
    run, flock = tmp_path / 'run', fcntl.flock
    run.mkdir()

    def late(descriptor, operation):
        if not (tmp_path / 'old').exists():
            run.rename(tmp_path / 'old')
            run.mkdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, 'flock', late)
    with folder.claim(run) as check:
        check()
        assert (run / '.lock').read_text() == str(os.getpid())
    assert (tmp_path / 'old/.lock').read_text() == ''


def test_a_fresh_run_behind_a_link(tmp_path):
    """The folder that the link leads to is moved; the link stays, and leads to a new folder."""
    (tmp_path / 'disk/checkpoints').mkdir(parents=True)
    (tmp_path / 'run').symlink_to(tmp_path / 'disk')
    aside = folder.move_aside(tmp_path / 'run')
    assert (aside / 'checkpoints').is_dir()
    with folder.claim(tmp_path / 'run') as check:
        check()
    assert os.listdir(tmp_path / 'disk') == ['.lock']


def test_links_are_not_followed(text, tmp_path):
    """A link in the place of a file that a run writes would have its target overwritten."""
    target, run = tmp_path / 'precious', tmp_path / 'run'
    target.write_text('mine')
    run.mkdir()
    names = ('config.json.part', 'config.json', 'tokenizer.json', 'summary.json')
    for name in (*names, 'metrics.jsonl'):
        (run / name).symlink_to(target)
    os.mkfifo(run / 'samples.txt')
    (run / 'tensorboard').mkdir()
    (run / 'tensorboard/notes').write_text('not a log')
    assert runs.quiet_train(make_config(text), run)[0] == 0
    (run / '.lock').unlink()
    (run / '.lock').symlink_to(target)
    with pytest.raises(UserError, match=r'cannot write \S+/\.lock: '):
        runs.quiet_train(make_config(text), run)
    assert target.read_text() == 'mine'
    assert (run / 'samples.txt').is_file()
    assert (run / 'tensorboard/notes').read_text() == 'not a log'


def test_a_copy_of_hard_links_keeps_its_logs(text, reference, stopped):
    """As `cp -al` and many backups make them: records would be written into both."""
    run, backup = stopped.rename(stopped.with_name('my run')), stopped.with_name('backup')
    shutil.copytree(run, backup, copy_function=os.link)
    before = {path: path.read_bytes() for path in backup.rglob('*') if path.is_file()}
    code, printed = runs.quiet_train(make_config(text), run)
    assert code == 0
    assert printed.endswith(f"scripts/sample.py --ckpt_dir='{run}'\n")  # as a shell reads it
    assert runs.differences(run, reference) == []
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {'.lock'}


def test_logs_that_are_not_of_a_run_are_not_touched(text, tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('mine\n')
    with pytest.raises(UserError, match=r'not the folder of a run, but has metrics\.jsonl'):
        runs.quiet_train(make_config(text), tmp_path)
    assert (tmp_path / 'metrics.jsonl').read_text() == 'mine\n'


def test_evaluate_restores_best_and_latest_to_the_digit(reference):
    summary = json.loads((reference / 'summary.json').read_text())
    for which, step, loss in (
        ('best', summary['best_step'], summary['best_val_loss']),
        ('latest', STEPS, summary['final_val_loss']),
    ):
        arguments = ('evaluate', f'--ckpt_dir={reference}', f'--step={which}')
        code, out, err = runs.script(*arguments)
        assert (code, err) == (0, '')
        assert out.startswith(f'step {step}, val: loss {loss:.4f} nats per token')
        found = json.loads(runs.script(*arguments, '--json')[1])
        assert (found['step'], found['loss']) == (step, loss)


def test_sampling_needs_only_the_folder(text, reference, tmp_path, monkeypatch):
    options = ('--prompt=ba', '--max_new_tokens=40', '--seed=7')
    code, out, _ = runs.script('sample', f'--ckpt_dir={reference}', *options)
    assert code == 0
    assert out.startswith('ba')
    assert len(out) == 43
    moved = shutil.copytree(reference, tmp_path / 'else where')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('gpt2_jax.data.load.load_dataset', None)  # the text is not read
    assert runs.script('sample', f'--ckpt_dir={moved}', *options)[1] == out
    assert runs.script('sample', f'--ckpt_dir={moved}', *options[:-1], '--seed=8')[1] != out
