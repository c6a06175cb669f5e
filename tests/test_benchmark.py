"""Benchmarks, with fake clocks: the arithmetic of the figures, and which runs are cold or warm."""

import sys
import types

import jax
import numpy as np
import pytest

from gpt2_jax.architecture import PRESETS
from gpt2_jax.config import default_config, resolve
from gpt2_jax.diagnostics import benchmark, plan
from gpt2_jax.errors import UserError
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.parallel import devices
from gpt2_jax.training.setup import build


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a test moves its hand."""
    hand = [0.0]
    monkeypatch.setattr(benchmark.time, 'monotonic', lambda: hand[0])
    return hand


def test_seconds_per_call(clock):
    """Each window has as many calls as fill it; the first call, which compiles, is in no window."""
    costs = iter([100.0, 0.25, *[0.25] * 4, *[0.5] * 4, *[0.75] * 4])

    def run():
        clock[0] += next(costs)
        return clock[0]

    figures = benchmark._windows(run, 3, 1.0)
    assert figures == [0.25, 0.5, 0.75]
    assert next(costs, None) is None
    assert benchmark._spread(figures) == {'median': 0.5, 'min': 0.25, 'max': 0.75, 'windows': 3}


@pytest.fixture(scope='module')
def tiny_setup():
    config = default_config()
    config.model.update(n_layer=1, n_head=1, n_embd=8, n_positions=16)
    config.train.batch_size = 4
    return build(resolve(config), benchmark.random_data(300, 200))


def test_mfu_counts_the_peak_of_every_device(monkeypatch):
    mesh = types.SimpleNamespace(devices=np.array([None] * 4), size=4)
    monkeypatch.setattr(devices, 'peak_flops', lambda device: 1e12)
    assert devices.model_flops_utilisation(1e3, 2e8, mesh) == 0.05
    assert devices.model_flops_utilisation(None, 2e8, mesh) is None
    monkeypatch.setattr(devices, 'peak_flops', lambda device: None)
    assert devices.model_flops_utilisation(1e3, 2e8, mesh) is None


def test_training_and_decoding(tiny_setup, monkeypatch):
    """On random tokens, without a corpus; a rate is tokens divided by the median of the windows."""
    monkeypatch.setattr(devices, 'peak_flops', lambda device: 1e12)
    figures = benchmark.bench_train(tiny_setup, 3, 0.0)
    assert figures['tokens_per_step'] == 64
    assert figures['evaluation_tokens'] == 199
    rate = 64 / figures['step_seconds']['median']
    assert figures['tokens_per_second'] == rate
    assert figures['step_seconds']['windows'] == 3
    assert figures['mfu'] == pytest.approx(rate * tiny_setup.flops_per_token / 1e12)
    assert all(
        figures[f'{name}_seconds'] > 0
        for name in ('init', 'compile_and_first_step', 'evaluation', 'save')
    )
    figures = benchmark.bench_decode(tiny_setup, 2, 3, 20, Sampling(1.0, 5))
    assert figures['tokens_per_second'] == 3 * 20 / figures['seconds']['median']
    assert figures['samples'] == 3


@pytest.mark.long
def test_scale(monkeypatch):
    """Tiny sizes in the place of the published ones; test_docs.py has the command."""
    for name, width in (('gpt2', 8), ('gpt2-xl', 16)):
        sizes = {'n_layer': 1, 'n_head': 1, 'n_embd': width}
        monkeypatch.setitem(PRESETS, name, sizes)
        monkeypatch.setitem(plan.SCALE_CASES, name, (2, plan.SCALE_CASES[name][1]))
    config = default_config()
    config.model.n_positions = 16
    data = benchmark.random_data(300, 200)
    records = list(benchmark.bench_scale(resolve(config), data, 2, 0.0))
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    assert sorted((r['size'], r['devices']) for r in records) == [
        (size, n) for size in ('gpt2', 'gpt2-xl') for n in counts
    ]
    peaks = [record['planned_memory_bytes'] for record in records]
    assert peaks == sorted(peaks)
    assert all(record['tokens_per_second'] > 0 for record in records)
    records[0] |= {'tokens_per_second': 500.0, 'peak_memory_bytes': 3 * 2**30, 'mfu': 0.25}
    slow = records[0] | {'devices': 2, 'tokens_per_second': 900.0}
    large = records[0] | {'size': 'gpt2-xl', 'tokens_per_second': None}
    lines = list(benchmark.scale_table([large, slow, records[0]]))
    assert [line.split(' | ')[:6] for line in lines[2:]] == [
        ['| gpt2', '1', '2', '500', '', '1.00'],
        ['| gpt2', '2', '2', '900', '', '1.80'],
        ['| gpt2-xl', '1', '2', 'out of memory', '', ''],
    ]
    assert '| 0.250 | 3.0 GiB |' in lines[2]


STAND_IN = """
import json, os, pathlib, sys
cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
seconds = 2.0 + 5.0 * (not any(cache.iterdir()))
(cache / 'program').touch()
workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))
workdir.mkdir()
times = {'seconds_to_first_step': seconds, 'seconds_total': seconds + 1}
(workdir / 'summary.json').write_text(json.dumps(times))
sys.exit('no such thing' if 'fail' in sys.argv else 0)
"""


def test_startup_cold_and_warm(tmp_path):
    """Each cold run has its own cache; the warm runs share one that an unmeasured run fills."""
    (tmp_path / 'train.py').write_text(STAND_IN)
    figures = benchmark.bench_startup([sys.executable, str(tmp_path / 'train.py')], 2)
    assert {name: spread['median'] for name, spread in figures.items()} == {
        'cold_seconds_to_first_step': 7.0,
        'cold_seconds_total': 8.0,
        'warm_seconds_to_first_step': 2.0,
        'warm_seconds_total': 3.0,
    }
    assert all(
        spread['windows'] == 2 and spread['min'] == spread['max'] for spread in figures.values()
    )
    with pytest.raises(UserError, match='no such thing'):
        benchmark.bench_startup([sys.executable, str(tmp_path / 'train.py'), 'fail'], 1)
