"""Parts of a run that the tests of whole runs (test_resume.py) do not see."""

import contextlib
import gc
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import runs

from gpt2_jax.config import default_config, resolve
from gpt2_jax.diagnostics.describe import describe
from gpt2_jax.errors import UsageError
from gpt2_jax.train import train
from gpt2_jax.training import loop, meter, programs, setup
from gpt2_jax.training.setup import build
from gpt2_jax.workdir import storage


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'config': {}}, r'the configuration is of type dict: expected the result of default_con'),
        ({'config': 'configs/quickstart.py'}, 'the configuration is of type str'),
        ({'workdir': 3}, '3 is not a path'),
        ({'hooks': [print]}, 'expected a list of objects with due'),
        ({'hooks': 3}, 'hooks holds 3: expected a list'),
        ({'hooks': [loop.Hook]}, 'hooks holds <class .*>: expected a list'),
    ],
)
def test_what_train_cannot_use_is_refused(wrong, said, tmp_path):
    """As called from a notebook, before any folder is made."""
    given = {'config': default_config(), 'workdir': tmp_path / 'run'} | wrong
    with pytest.raises(UsageError, match=said):
        train(**given)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_may_be_a_text(tmp_path):
    config = runs.make_config(runs.write_text(tmp_path / 'text.txt'), train__steps=2)
    assert runs.quiet_train(config, str(tmp_path / 'run'))[0] == 0
    assert (tmp_path / 'run/summary.json').exists()


@pytest.mark.parametrize(('place', 'hinted'), [('gpu', True), ('cpu', False)])
def test_idle_gpus_are_pointed_out(place, hinted, tmp_path, monkeypatch):
    """And the simulated devices of a CPU are not."""
    setup = build(resolve(runs.make_config(runs.write_text(tmp_path / 'text.txt'))))
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    card = SimpleNamespace(platform=place, device_kind='card', memory_stats=lambda: None)
    monkeypatch.setattr(type(setup), 'device', card)
    lines = '\n'.join(describe(setup))
    assert ('1 of 4 devices work: --config.mesh.fsdp=4' in lines) == hinted


def described(tmp_path, text, **changes) -> list[str]:
    """What a run on this text says of itself."""
    (tmp_path / 'text.txt').write_bytes(text.encode())
    return describe(build(resolve(runs.make_config(tmp_path / 'text.txt', **changes))))


@pytest.mark.parametrize(('end', 'hinted'), [('\n', False), ('\r\n', True)])
def test_carriage_returns_are_pointed_out(end, hinted, tmp_path):
    lines = described(tmp_path, f'abcde{end}' * 1000)
    assert ('carriage returns' in '\n'.join(lines)) == hinted


@pytest.mark.long
def test_a_run_in_a_thread_is_the_run_in_the_main_thread(tmp_path):
    config = runs.make_config(runs.write_text(tmp_path / 'text.txt'), train__steps=2)
    assert runs.quiet_train(config, tmp_path / 'main')[0] == 0
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(runs.quiet_train(config, tmp_path / 'thread')[0])
    )
    thread.start()
    thread.join()
    assert codes == [0]
    assert runs.differences(tmp_path / 'main', tmp_path / 'thread') == []


def test_signals_are_left_alone_outside_the_main_thread():
    noted, before = [], signal.getsignal(signal.SIGTERM)

    def enter():
        with loop.interrupts() as interrupt:
            noted.append((interrupt.poll(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert noted == [(None, before)]


def test_orbax_warns_of_nothing_while_a_run_trains(tmp_path, caplog):
    """In a notebook too, where no script has silenced it; afterwards it warns as before."""
    caplog.set_level(logging.WARNING, 'absl')
    text = runs.write_text(tmp_path / 'text.txt')
    # Step 0 is saved without a validation loss, which Orbax warns of.
    config = runs.make_config(text, train__steps=2, checkpoint__keep='log')
    assert runs.quiet_train(config, tmp_path / 'run')[0] == 0
    assert [record for record in caplog.records if record.name == 'absl'] == []
    first, second = storage.without_warnings(), storage.without_warnings()
    first.__enter__()
    second.__enter__()
    logger = logging.getLogger('absl')
    for one, heard in ((first, ['hook']), (second, ['hook', 'orbax'])):  # in any order
        one.__exit__(None, None, None)
        caplog.clear()
        for name in ('hook', 'orbax'):  # a hook of the user is heard
            where = f'/packages/{name}/a.py', 1
            logger.handle(logger.makeRecord('absl', logging.ERROR, *where, name, (), None))
        assert [record.getMessage() for record in caplog.records] == heard


def test_one_layer_and_one_head_are_counted_in_the_singular(tmp_path):
    for n, said in ((1, ': 1 layer, 1 head, width'), (2, ': 2 layers, 2 heads, width')):
        lines = described(tmp_path, 'abcde' * 200, model__n_layer=n, model__n_head=n)
        assert any(said in line for line in lines)


def test_an_error_does_not_wait_for_the_compilation():
    done = threading.Event()
    with pytest.raises(KeyError), programs.compiling() as pool:
        compiled = pool.submit(done.wait, 5)
        raise KeyError
    assert not compiled.done()
    done.set()


@pytest.mark.parametrize(
    ('steps', 'expected'),
    [
        (1, '1 step = 0.00016 epochs'),
        (500, '500 steps = 0.08 epochs'),
        (12_500, '12,500 steps = 2.0 epochs'),
    ],
)
def test_a_part_of_an_epoch_is_described_with_digits(tmp_path, steps, expected):
    sizes = dict(train__steps=steps, train__batch_size=1, model__n_positions=8)
    lines = described(tmp_path, 'abcde' * 20_000, data__val_fraction=0.5, **sizes)
    assert sum(expected in line for line in lines) == 1


@pytest.mark.parametrize(
    ('holdout', 'eval_tokens', 'expected'),
    [
        (0.0, None, '80 training and 20 validation tokens'),
        (0.25, None, '60 training and 20 held-out training tokens'),
        (0.0, None, 'evaluation all validation targets, every 250 steps'),
        (0.0, 8, 'evaluation 8 of the 19 validation targets, evenly spread, every 250 steps'),
    ],
)
def test_a_run_describes_its_text(tmp_path, holdout, eval_tokens, expected):
    lines = described(
        tmp_path,
        'abcde' * 20,
        data__val_fraction=0.2,
        data__holdout=holdout,
        eval__tokens=eval_tokens,
        eval__every=250,
        train__steps=250,
        model__n_positions=8,
    )
    assert sum(expected in line for line in lines) == 1


@pytest.mark.parametrize(
    ('dtype', 'residual_dtype', 'expected'),
    [
        ('float32', 'compute', 'loss in fp32'),
        ('bfloat16', 'compute', 'the residual stream in bfloat16'),
        ('bfloat16', 'float32', 'the residual stream in float32'),
    ],
)
def test_a_run_describes_its_precision(tmp_path, dtype, residual_dtype, expected):
    dtypes = dict(model__dtype=dtype, model__residual_dtype=residual_dtype)
    lines = described(tmp_path, 'abcde' * 20, **dtypes)
    assert [line.endswith(expected) for line in lines if line.startswith('precision')] == [True]


@pytest.mark.parametrize(
    ('steps', 'expected'),
    [
        (476_838, ['decoding; hopper (a GPU kernel of this package for Hopper GPUs): gelu']),
        (
            476_837,
            [
                'all parts',
                'gelu: hopper needs a run of 953,675 micro-batches or more, to make up for its '
                'compilation, not 953,674',
            ],
        ),
    ],
)
def test_a_run_describes_the_kernel_for_hopper_gpus(tmp_path, monkeypatch, steps, expected):
    """From 2e12 numbers in GELU: an update has 2 micro-batches of 16 x 128 tokens, in 2 layers."""
    monkeypatch.setattr(setup, 'platform_of', lambda device: 'gpu')
    monkeypatch.setattr(setup, 'has_hopper_kernels', lambda device: True)
    lines = described(
        tmp_path,
        'abcde' * 400,
        model__n_layer=2,
        model__n_embd=128,
        model__n_positions=128,
        model__dtype='bfloat16',
        train__steps=steps,
        train__batch_size=32,
        train__grad_accum_steps=2,
    )
    first = next(n for n, line in enumerate(lines) if line.startswith('kernels'))
    found = lines[first : first + len(expected)]
    assert all(line.endswith(end) for line, end in zip(found, expected, strict=True))
    assert sum('hopper' in line for line in lines) == 1


FREED = """
import ctypes, resource
from gpt2_jax.config import default_config
from gpt2_jax.errors import UserError
from gpt2_jax.train import train

config = default_config()
config.data.corpus = 'missing.txt'
try:
    train(config, 'run')
except UserError:
    pass
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**25 + 1)
    ctypes.memset(block, 1, 2**25)
    libc.free(ctypes.c_void_p(block))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries are left alone')
@pytest.mark.parametrize('tuned', [{}, {'MALLOC_ARENA_MAX': '4'}])
def test_a_notebook_trains_without_page_faults(tuned, tmp_path):
    """train() keeps memory that is freed, which the scripts do by themselves, unless told."""
    env = {**os.environ, **tuned, 'PYTHONPATH': str(Path(__file__).parents[1])}
    run = [sys.executable, '-c', FREED]
    out = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    _, second = map(int, out.stdout.split())
    assert (second > 1000) == bool(tuned)


class Loss(float):
    """A loss on a device, which may not have computed it yet."""

    ready = True

    def is_ready(self):
        return self.ready


def run_meter(seconds, monkeypatch, recorded=None):
    """Twelve updates of so many seconds; returns the meter, its clock, what it showed and said."""
    now, shown, said = [0.0], [], []
    recorded = [] if recorded is None else recorded
    monkeypatch.setattr(meter.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(meter.Meter, 'mfu', lambda self, rate: None)
    config = default_config()
    config.train.steps, config.eval.every = 100, 40
    setup = SimpleNamespace(config=config, tokens_per_step=1000, eval_tokens=12_000)
    log = SimpleNamespace(
        say=said.append,
        record=lambda step, *_: recorded.append(step),
        progress=lambda step, steps, loss, rate, left: shown.append((step, left)),
    )
    progress = meter.RunProgress()
    meters = meter.Meter(setup, log, progress, start=0, started=0.0, diverged=None)
    for step in range(1, 13):
        now[0] += seconds
        meters.add(step, {'loss': Loss(2.0)})
    return meters, now, shown, said


@pytest.mark.parametrize(
    ('seconds', 'steps'), [(2.0, range(1, 12)), (0.4, [1, 2, 3, 4, 5, 7, 9, 11]), (0.01, [1, 2])]
)
def test_slow_updates_are_shown_one_by_one(seconds, steps, monkeypatch):
    """Fast ones every log.every updates, here 10."""
    _, _, shown, _ = run_meter(seconds, monkeypatch)
    assert [step for step, _ in shown] == list(steps)


@pytest.mark.parametrize('seconds', [2.0, 0.01])
def test_the_first_update_every_tenth_and_the_last_are_recorded(seconds, monkeypatch):
    """Whether they are fetched one by one or several at a time; log.every is 10."""
    recorded = []
    meters, now, _, _ = run_meter(seconds, monkeypatch, recorded)
    for step in range(13, 96):
        now[0] += seconds
        meters.add(step, {'loss': Loss(2.0)})
    meters.steps = 95
    meters.drain()
    assert recorded == [1, *range(10, 91, 10), 95]


@pytest.mark.parametrize(
    ('processes', 'ready', 'seconds', 'later'),
    [
        (1, True, 0.01, 1),
        (1, False, 0.01, 8),
        (1, False, 0.001, meter.MOST_AHEAD),
        (1, False, 2.0, 1),
        (2, False, 0.01, 1),
    ],
)
def test_the_device_has_work_while_metrics_are_fetched(
    processes, ready, seconds, later, monkeypatch
):
    """At most AHEAD_SECONDS of updates wait, and none that are already done."""
    monkeypatch.setattr(Loss, 'ready', ready)
    monkeypatch.setattr(meter, 'several', lambda: processes > 1)
    meters, now, shown, _ = run_meter(seconds, monkeypatch)
    for step in range(13, 96):
        now[0] += seconds
        meters.add(step, {'loss': Loss(2.0)})
        if step > 60 and shown[-1][0] > 40:
            assert 0 <= step - shown[-1][0] - later <= meters._fetch_every
    assert meters._fetch_every == (10 if seconds < 1 and processes == 1 else 1)


@pytest.mark.parametrize(
    ('at', 'n_ready', 'fetched'),
    # All metrics from step 3 on wait. At 36, 24 are later than the first 10: the loop blocks until
    # the update that the device computes now has ended.
    [(35, 9, 2), (35, 15, 2), (35, 99, 34), (36, 0, 12), (36, 9, 12), (36, 15, 18), (36, 99, 35)],
)
def test_metrics_that_are_ready_are_fetched_together(at, n_ready, fetched, monkeypatch):
    """Fetched one by one, updates done while the loop was delayed would seem too fast.

    So would the rest of an update that the device had begun before the fetch.
    """
    monkeypatch.setattr(Loss, 'ready', False)
    meters, _, shown, _ = run_meter(0.001, monkeypatch)
    for step in range(13, at):
        meters.add(step, {'loss': Loss(2.0)})
    for _, metrics in meters._pending[:n_ready]:
        metrics['loss'].ready = True
    assert shown[-1][0] == 2
    meters.add(at, {'loss': Loss(2.0)})
    assert shown[-1][0] == fetched


def test_garbage_collections_pass_over_what_is_older_than_the_loop():
    frozen = []

    def hook(step, state):
        frozen.append(gc.get_freeze_count())
        assert gc.isenabled()  # objects made by the loop itself are collected
        if step == 2:
            raise KeyError

    hook.due = lambda step: True
    meters = SimpleNamespace(add=lambda *_: None, paused=contextlib.nullcontext)
    with pytest.raises(KeyError):
        loop.run(
            lambda state, batch: (state, {}),
            None,
            [0, 0, 0],
            start=0,
            meter=meters,
            hooks=[hook],
            interrupt=loop.Interrupt(),
        )
    assert len(frozen) == 2
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_the_time_left_includes_evaluations(monkeypatch):
    meters, now, shown, said = run_meter(2.0, monkeypatch)
    seconds = 22 / 10  # an update, as measured: 22 s after the first, 10 of the 11 were fetched
    # Three evaluations of 12,000 tokens, each with a third of the work of 12 updates.
    assert shown[-1] == (11, pytest.approx((89 + 3 * 4) * seconds))
    assert said == [
        '2666.7 ms a step: about 4 min 16 s of training to go, and 32 s of 3 evaluations'
    ]
    with meters.paused(12):
        now[0] += 7
        meters.evaluated(7)
    for step in (13, 14):
        now[0] += 2
        meters.add(step, {'loss': Loss(2.0)})
    assert shown[-1] == (13, pytest.approx(87 * 26 / 12 + 3 * 7))
