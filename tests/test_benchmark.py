"""Benchmarks, with fake clocks: the arithmetic of the figures, and which runs are cold or warm."""

import json
import re
import runpy
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from jax.profiler import ProfileData
from tiny import shapes

from gpt2_jax.architecture import PRESETS
from gpt2_jax.config import default_config, resolve
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.parallel import devices
from gpt2_jax.speed import benchmark, profile, scale, time_to_loss
from gpt2_jax.speed.case import SCALE_CASES
from gpt2_jax.training.setup import build

ROOT = Path(__file__).parents[1]


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
    config.model.update(n_layer=1, n_head=1, n_embd=8, n_positions=64)
    config.train.update(batch_size=4, seq_len=16)
    return build(resolve(config), benchmark.random_data(300, 200))


def test_mfu_counts_the_peak_of_every_device(monkeypatch):
    mesh = types.SimpleNamespace(devices=np.array([None] * 4), size=4)
    monkeypatch.setattr(devices, 'peak_flops', lambda device: 1e12)
    assert devices.model_flops_utilisation(1e3, 2e8, mesh) == 0.05
    assert devices.model_flops_utilisation(None, 2e8, mesh) is None
    monkeypatch.setattr(devices, 'peak_flops', lambda device: None)
    assert devices.model_flops_utilisation(1e3, 2e8, mesh) is None


@pytest.mark.long
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
    figures = benchmark.bench_score(tiny_setup, 2, 0.0)
    assert figures['tokens_per_batch'] == 64
    assert figures['tokens_per_second'] == 64 / figures['batch_seconds']['median']
    forward = figures['tokens_per_second'] * tiny_setup.flops_per_token / 3
    assert figures['mfu'] == pytest.approx(forward / 1e12)
    figures = benchmark.bench_decode(tiny_setup, 2, 3, 20, Sampling(1.0, 5))
    assert figures['tokens_per_second'] == 3 * 20 / figures['seconds']['median']
    assert figures['samples'] == 3
    assert 0 < figures['first_chunk_seconds'] < figures['seconds']['median']
    later = figures['seconds']['median'] - figures['first_chunk_seconds']
    assert figures['token_seconds'] == pytest.approx(later / (20 - benchmark.CHUNK))
    cfg, kind = tiny_setup.model.cfg, tiny_setup.device.device_kind
    monkeypatch.setitem(devices.PEAK_MEMORY_RATES, kind, 1e9)
    figures = benchmark.bench_decode(tiny_setup, 1, 2, 20, Sampling(1.0, 5), prompt_tokens=8)
    block = jax.tree_util.tree_leaves_with_path(shapes(tiny_setup.model)['h_0'])
    matrices = sum(leaf.size for path, leaf in block if path[-1].key == 'kernel')
    read = cfg.n_layer * matrices + cfg.vocab_size * cfg.n_embd
    read += 2 * 2 * cfg.n_layer * cfg.n_embd * (8 + 10)  # keys and values of two texts
    assert figures['memory_share'] == pytest.approx(4 * read / figures['token_seconds'] / 1e9)
    most = cfg.n_positions + 1
    message = f'--prompt_tokens=8 and --new_tokens={most} do not fit .* at most {most} together'
    with pytest.raises(UsageError, match=message):
        benchmark.bench_decode(tiny_setup, 1, 1, most, Sampling(), prompt_tokens=8)


@pytest.mark.long
def test_scale(monkeypatch):
    """Tiny sizes in the place of the published ones; test_docs.py has the command."""
    for name, width in (('gpt2', 8), ('gpt2-xl', 16)):
        sizes = {'n_layer': 1, 'n_head': 1, 'n_embd': width}
        monkeypatch.setitem(PRESETS, name, sizes)
        monkeypatch.setitem(SCALE_CASES, name, (2, SCALE_CASES[name][1]))
    config = default_config()
    config.model.n_positions = 16
    data = benchmark.random_data(300, 200)
    records = list(scale.bench_scale(resolve(config), data, 2, 0.0))
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    assert sorted((r['size'], r['devices']) for r in records) == [
        (size, n) for size in ('gpt2', 'gpt2-xl') for n in counts
    ]
    peaks = [record['planned_memory_bytes'] for record in records]
    assert peaks == sorted(peaks)
    assert all(record['tokens_per_second'] > 0 for record in records)
    records[0] |= {'tokens_per_second': 500.0, 'peak_memory_bytes': 3 * 2**30, 'mfu': 0.25}
    shares = {'collectives': 0.125, 'collectives_alone': 0.0}
    slow = records[0] | {'devices': 2, 'tokens_per_second': 900.0} | shares
    large = records[0] | {'size': 'gpt2-xl', 'tokens_per_second': None}
    lines = list(scale.scale_table([large, slow, records[0]]))
    assert [line.split(' | ')[:6] for line in lines[2:]] == [
        ['| gpt2', '1', '2', '500', '', '1.00'],
        ['| gpt2', '2', '2', '900', '', '1.80'],
        ['| gpt2-xl', '1', '2', 'out of memory', '', ''],
    ]
    assert '| 0.250 |  |  | 3.0 GiB |' in lines[2]
    assert '| 0.250 | 12.5% | 0.0% | 3.0 GiB |' in lines[3]


def test_collectives_in_a_profile():
    """Two GPUs: a product from 0 to 60 us, NCCL from 40 to 80, a product from 90 to 100 on one;
    on the other NCCL is wholly beside a product of 100 us. A plane of the host does not count."""

    def line(name, events):
        times = ''.join(
            f'events {{metadata_id: {kind} offset_ps: {start}000000 duration_ps: {length}000000}} '
            for kind, start, length in events
        )
        return f'lines {{name: "{name}" {times}}} '

    names = ''.join(
        f'event_metadata {{key: {key} value: {{id: {key} name: "{name}"}}}} '
        for key, name in ((1, 'gemm'), (2, 'ncclDevKernel_AllReduce_Sum_f32_RING_LL'))
    )
    products = line('Stream #1(Compute)', [(1, 0, 60), (1, 90, 10)])
    planes = {
        '/device:GPU:0': products
        + line('Stream #2', [(2, 40, 40)])
        + line('XLA Ops', [(1, 0, 99)]),
        '/device:GPU:1': line('Stream #1', [(1, 0, 100)]) + line('Stream #2', [(2, 50, 20)]),
        '/host:CPU': line('Stream #1', [(2, 0, 100)]),
    }
    text = ''.join(f'planes {{name: "{name}" {lines} {names}}} ' for name, lines in planes.items())
    shares = profile.shares_of([ProfileData.from_text_proto(text)])
    assert shares == pytest.approx(((0.4 + 0.2) / 2, (0.2 + 0.0) / 2))
    host = ProfileData.from_text_proto(f'planes {{name: "/host:CPU" {products} {names}}}')
    assert profile.shares_of([host]) is None


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


SEED_STAND_IN = """
import json, os, pathlib, sys, time
programs = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
seed = int(next(word for word in sys.argv if 'seed=' in word).partition('=')[2])
workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))
workdir.mkdir()
if seed == 3:
    print('all well so far', flush=True)
    sys.exit('Traceback: a line\\nerror: no such thing')
time.sleep(0.0 if programs.exists() else 0.6)
programs.mkdir(exist_ok=True)
with open(workdir / 'metrics.jsonl', 'w') as file:
    for step, loss in enumerate((1.9, 1.5 - seed / 10, 1.3 + seed / 10, 1.45), 1):
        file.write(json.dumps({'step': step, 'split': 'val', 'loss': loss}) + '\\n')
        file.write(json.dumps({'step': step, 'split': 'train', 'loss': 0.1}) + '\\n')
        print(f'step {step}: validation loss {loss} nats', flush=True)
        time.sleep(0.2 if step == 1 else 0.0)
"""


@pytest.fixture
def seed_command(tmp_path):
    (tmp_path / 'train.py').write_text(SEED_STAND_IN)
    return [sys.executable, str(tmp_path / 'train.py')]


def test_time_to_loss(seed_command):
    """A process a seed, with an empty cache unless warm; the first loss that is low enough."""
    cold = list(time_to_loss.bench_time_to_loss(seed_command, range(2), 1.4))
    assert [r['seed'] for r in cold] == [0, 1]
    assert [r['steps_to_loss'] for r in cold] == [3, 2]
    assert [r['best_loss'] for r in cold] == [1.3, 1.4]
    assert [r['best_step'] for r in cold] == [3, 2]
    assert [r['final_loss'] for r in cold] == [1.45, 1.45]
    for record in cold:
        assert 0.8 < record['seconds_to_loss'] <= record['seconds_total']
    (warm,) = time_to_loss.bench_time_to_loss(seed_command, [0], 1.4, warm=True)
    assert 0.2 < warm['seconds_to_loss'] < 0.8
    (never,) = time_to_loss.bench_time_to_loss(seed_command, [0], 1.0, warm=True)
    assert never['seconds_to_loss'] is None
    assert 'never reached 1.0; best loss 1.3000 at step 3' in time_to_loss.describe_seed(never, 1.0)
    assert time_to_loss.summarize_seeds([never], None, 1.0)['seconds_to_loss_mean'] is None


def test_a_seed_that_fails_is_named(seed_command):
    records = list(time_to_loss.bench_time_to_loss(seed_command, [3, 0], 1.4, warm=True))
    line = time_to_loss.describe_seed(records[0], 1.4)
    assert line == 'seed 3 failed: exit code 1: error: no such thing'
    assert records[1]['best_loss'] == 1.3
    with pytest.raises(UserError, match=r'^1 of 2 seeds failed \(3\): there is no mean$'):
        time_to_loss.summarize_seeds(records, None, None)


def test_figures_over_seeds():
    """Against a table of Student's t: 1.833 and 2.821 are its 5 and 1 % points at 9 degrees."""
    for t, degrees, p in (
        (-1.833, 9, 0.05),
        (2.821, 9, 0.99),
        (-6.314, 1, 0.05),
        (0.0, 4, 0.5),
        (-4.604, 4, 0.005),
        (-2.920, 2, 0.05),
    ):
        assert time_to_loss.student_t(t, degrees) == pytest.approx(p, rel=2e-3)
    losses = [1.42, 1.43, 1.41, 1.42]
    records = [{'seed': i, 'best_loss': x, 'seconds_to_loss': 9.0} for i, x in enumerate(losses)]
    found = time_to_loss.summarize_seeds(records, 1.43, 10.0)
    deviation = float(np.std(losses, ddof=1))
    assert found['best_loss_mean'] == pytest.approx(1.42)
    assert found['best_loss_std'] == pytest.approx(deviation)
    t = (1.42 - 1.43) / (deviation / 2)
    assert found['best_loss_p'] == pytest.approx(time_to_loss.student_t(t, 3))
    assert found['seconds_to_loss_p'] == 0.0
    assert 'best_loss_p' not in time_to_loss.summarize_seeds(records, None, None)


def test_rules_of_the_benchmark():
    config = runpy.run_path(str(ROOT / 'configs' / 'shakespeare_fast.py'))['get_config']()
    config.eval.tokens = 0
    assert time_to_loss.broken_rules(config) == []
    config.optim.algorithm, config.train.steps, config.model.attn_pdrop = 'muon', 99, 0.5
    assert time_to_loss.broken_rules(config) == []
    config.model.n_layer, config.data.holdout = 7, 0.1
    assert time_to_loss.broken_rules(config) == [
        'model.n_layer = 7 instead of 6',
        'data.holdout = 0.1 instead of 0.0',
    ]


@pytest.mark.long
def test_the_script_trains_seeds(tmp_path):
    text, out = runs.write_text(tmp_path / 'text.txt', words=300), tmp_path / 'figures.json'
    sizes = runs.SMALL | {'train.steps': 2, 'model.n_positions': 8, 'data.corpus': text}
    flags = [f'--config.{key}={value}' for key, value in sizes.items()]
    code, printed, errors = runs.script(
        'benchmark',
        '--config=configs/shakespeare_fast.py',
        '--what=time-to-loss',
        '--seeds=1',
        '--loss=9',
        f'--out={out}',
        *flags,
        '--config.model.dtype=float32',
        '--platform=cpu',
    )
    assert code == 0, errors
    assert 'no entry of the benchmark: model.n_layer = 1 instead of 6' in printed
    assert re.search(r'^seed 0: reached 9.0 after [\d.]+ s, at step 2;', printed, re.MULTILINE)
    figures = json.loads(out.read_text('utf-8'))
    assert figures['records'][0]['best_loss'] == figures['best_loss_mean'] < 9
    assert figures['best_loss_std'] is None
