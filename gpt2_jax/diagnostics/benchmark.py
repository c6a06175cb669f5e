"""The speed of training, scoring, decoding and start-up, in windows; and the time to a loss."""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gpt2_jax import files, progress
from gpt2_jax.config import flatten, resolve
from gpt2_jax.data import load
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import CharTokenizer
from gpt2_jax.diagnostics import plan
from gpt2_jax.errors import UserError
from gpt2_jax.inference.decoding import CHUNK, generate, with_kernels
from gpt2_jax.inference.evaluate import make_evaluate, make_jitted_eval_step, make_prepare
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.parallel import devices, feed
from gpt2_jax.parallel.faults import memory_errors
from gpt2_jax.terminal import say
from gpt2_jax.training import programs
from gpt2_jax.training.meter import Progress
from gpt2_jax.training.resume import checkpoint_meta
from gpt2_jax.training.setup import Setup, build
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import history
from gpt2_jax.workdir.checkpoints import Checkpoints

# The rules of docs/tinyshakespeare-benchmark.md that settings can break. All other settings belong
# to the recipe, which is free.
BENCHMARK_RULES = {
    'model.n_layer': 6,
    'model.n_head': 6,
    'model.n_embd': 384,
    'model.n_inner': 4 * 384,
    'model.n_positions': 256,
    'data.corpus': 'tinyshakespeare',
    'data.tokenizer': 'char',
    'data.val_fraction': 0.1,
    'data.holdout': 0.0,
    'train.init_from': '',
    'train.seq_len': 256,  # an evaluation has windows of this length
    'eval.tokens': 0,
}
SCALE_SIZES = ('gpt2', 'gpt2-xl')  # of plan.SCALE_CASES, those that bench_scale measures


def random_data(vocab_size: int, n_tokens: int = 1 << 20) -> Dataset:
    """Uniformly random tokens: speed does not depend on the text."""
    tokens = Tokens((np.random.default_rng(0).integers(0, vocab_size, n_tokens, dtype=np.uint16),))
    tokenizer = CharTokenizer(''.join(map(chr, range(vocab_size))))
    return Dataset('random tokens', tokenizer, tokens, tokens, '')


def _windows(run: Callable[[], Any], windows: int, seconds: float) -> list[float]:
    """Seconds per call of `run` in each of several windows, which last about `seconds` each.

    run() returns the arrays to wait for. The first call, which compiles, is not measured.
    """
    jax.block_until_ready(run())
    began = time.monotonic()
    jax.block_until_ready(run())
    calls = max(1, round(seconds / (time.monotonic() - began)))
    figures = []
    for _ in range(windows):
        began = time.monotonic()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        figures.append((time.monotonic() - began) / calls)
    return figures


def _spread(figures: list[float]) -> dict[str, float]:
    return {
        'median': statistics.median(figures),
        'min': min(figures),
        'max': max(figures),
        'windows': len(figures),
    }


def _first_batch(setup: Setup) -> feed.Batch:
    return feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)


def _time_updates(
    train_step: Callable, state: TrainState, batch: feed.Batch, windows: int, seconds: float
) -> tuple[dict[str, float], TrainState]:
    """The seconds of an update, and the state after all of them."""

    def run():
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    return _spread(_windows(run, windows, seconds)), state


def bench_train(setup: Setup, windows: int, seconds: float) -> dict[str, Any]:
    """Measures updates, an evaluation, a save and the compilation.

    Times are in seconds, memory in bytes, rates in tokens per second.
    """
    began = time.monotonic()
    state = jax.block_until_ready(programs.new_state(setup))
    init_seconds = time.monotonic() - began
    train_step = programs.compile_train_step(setup)
    batch = _first_batch(setup)
    began = time.monotonic()
    state, _ = jax.block_until_ready(train_step(state, batch))
    compile_seconds = time.monotonic() - began
    step_seconds, state = _time_updates(train_step, state, batch, windows, seconds)
    evaluate = make_evaluate(setup)
    evaluate(state.params)
    began = time.monotonic()
    evaluate(state.params)
    evaluation_seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        meta = checkpoint_meta(setup, Path(folder), Progress())
        began = time.monotonic()
        checkpoints.save(int(state.step), state, meta, None)
        blocked_seconds = time.monotonic() - began
        checkpoints.wait()
        save_seconds = time.monotonic() - began
    rate = setup.tokens_per_step / step_seconds['median']
    return {
        'step_seconds': step_seconds,
        'tokens_per_second': rate,
        'tokens_per_step': setup.tokens_per_step,
        'flops_per_token': setup.flops_per_token,
        'mfu': devices.model_flops_utilisation(rate, setup.flops_per_token, setup.mesh),
        'init_seconds': init_seconds,
        'compile_and_first_step_seconds': compile_seconds,
        'evaluation_seconds': evaluation_seconds,
        'evaluation_tokens': len(setup.dataset.val) - 1,
        'save_seconds': save_seconds,
        'save_holds_up_training_seconds': blocked_seconds,
        'peak_memory_bytes': (setup.device.memory_stats() or {}).get('peak_bytes_in_use'),
    }


def bench_score(setup: Setup, windows: int, seconds: float) -> dict[str, Any]:
    """Measures evaluation steps on a batch of random targets; MFU counts the forward pass alone."""
    prepared = make_prepare(setup)(programs.new_state(setup).params)
    batch, eval_step = _first_batch(setup), make_jitted_eval_step(setup)
    batch = jax.tree.map(lambda x: x[: setup.rows_per_micro_batch], batch)
    batch['mask'] = jax.device_put(
        np.ones(batch['targets'].shape, np.float32), batch['targets'].sharding
    )
    spread = _spread(_windows(lambda: eval_step(prepared, batch), windows, seconds))
    rate, flops = batch['targets'].size / spread['median'], setup.flops_per_token / 3
    return {
        'batch_seconds': spread,
        'tokens_per_second': rate,
        'tokens_per_batch': batch['targets'].size,
        'mfu': devices.model_flops_utilisation(rate, flops, setup.mesh),
    }


def bench_scale(
    config: ConfigDict, dataset: Dataset | None, windows: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measures updates of SCALE_SIZES on 1, 2, 4, .. devices, as plan.scale_case lays them out.

    Yields a record for each, with the same figures as planned, in the order of planned memory: JAX
    reports the peak of a process, which is that of the last record only if no earlier one needed
    more. All updates are compiled first, side by side. A case without room is reported as None.
    """
    dataset = dataset or load.load_dataset(**config.data)
    base = plan.case_of(config, dataset.tokenizer.vocab_size)
    kind = jax.devices()[0].device_kind
    gpu = next((gpu for gpu in plan.GPUS.values() if gpu.kind == kind), plan.GPUS['h200'])
    counts = [2**i for i in range(jax.device_count().bit_length())]
    plans = [
        (size, plan.plan(plan.scale_case(base, size, n), gpu))
        for size in SCALE_SIZES
        for n in counts
    ]
    plans.sort(key=lambda named: (named[1].peak, named[1].case.devices))
    with ThreadPoolExecutor(len(plans), 'compile') as pool:  # its end waits for all programs
        setups = [build(scale_config(config, planned.case), dataset) for _, planned in plans]
        steps = [programs.compile_train_step(setup, pool) for setup in setups]
    for (size, planned), setup, train_step in zip(plans, setups, steps, strict=True):
        rate, peak = None, None
        with contextlib.suppress(UserError), memory_errors('train'):
            state, batch = programs.new_state(setup), _first_batch(setup)
            spread, state = _time_updates(train_step, state, batch, windows, seconds)
            rate = setup.tokens_per_step / spread['median']
            peak = (setup.device.memory_stats() or {}).get('peak_bytes_in_use')
        state = batch = None  # room for the next
        yield {
            'size': size,
            'devices': planned.case.devices,
            'mesh': dict(planned.case.mesh),
            'windows_a_device': planned.case.rows,
            'tokens_per_second': rate,
            'mfu': devices.model_flops_utilisation(rate, setup.flops_per_token, setup.mesh),
            'peak_memory_bytes': peak,
            'planned_tokens_per_second': planned.tokens_per_second,
            'planned_memory_bytes': planned.peak,
        }


def scale_config(config: ConfigDict, case: plan.Case) -> ConfigDict:
    """`config` with the sizes, the mesh and the batch of a case."""
    config, sizes = config.copy_and_resolve_references(), dataclasses.asdict(case.cfg)
    config.model.update({name: sizes[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_inner')})
    config.mesh.update(case.mesh)
    shares = case.mesh['data'] * case.mesh['fsdp']
    config.train.update(batch_size=case.rows * shares, grad_accum_steps=1)
    return resolve(config)


def scale_table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the records of `bench_scale` as a Markdown table, with weak scaling."""
    yield (
        '| model | GPUs | windows a GPU | tokens/s | planned | weak scaling | MFU | memory a GPU | '
        'planned |'
    )
    yield '| --- ' * 9 + '|'
    rates = {(r['size'], r['devices']): r['tokens_per_second'] for r in records}
    for record in sorted(records, key=lambda r: (SCALE_SIZES.index(r['size']), r['devices'])):
        rate, one = record['tokens_per_second'], rates[record['size'], 1]
        planned, peak, mfu = (
            record[name] for name in ('planned_tokens_per_second', 'peak_memory_bytes', 'mfu')
        )
        cells = [
            *(record['size'], record['devices'], record['windows_a_device']),
            f'{rate:,.0f}' if rate else 'out of memory',
            f'{planned:,.0f}' if planned else '',
            f'{rate / one:.2f}' if rate and one else '',
            f'{mfu:.3f}' if mfu else '',
            f'{peak / plan.GIB:.1f} GiB' if peak else '',
            f'{record["planned_memory_bytes"] / plan.GIB:.1f} GiB',
        ]
        yield f'| {" | ".join(map(str, cells))} |'


def bench_decode(
    setup: Setup, windows: int, num_samples: int, new_tokens: int, sampling: Sampling
) -> dict[str, Any]:
    """Measures generation from a one-token prompt, prefill included.

    Rates count the tokens of all samples.
    """
    model = with_kernels(setup.model, setup.model.cfg.kernels, '')
    params = programs.new_state(setup).params

    def run():
        chunks = generate(
            model,
            params,
            [0],
            max_new_tokens=new_tokens,
            num_samples=num_samples,
            sampling=sampling,
        )
        return sum(chunk.shape[1] for chunk in chunks)

    began = time.monotonic()
    run()
    first = time.monotonic() - began
    figures = []
    for _ in range(windows):
        began = time.monotonic()
        run()
        figures.append(time.monotonic() - began)
    seconds = _spread(figures)
    return {
        'samples': num_samples,
        'new_tokens': new_tokens,
        'chunk': CHUNK,
        'seconds': seconds,
        'first_call_seconds': first,
        'tokens_per_second': num_samples * new_tokens / seconds['median'],
    }


def bench_startup(train_command: list[str], windows: int) -> dict[str, Any]:
    """Measures how long a process takes to its first update, and to the end of a run of one update.

    A cold run finds nothing compiled, a warm run finds all its programs compiled. `train_command`
    runs scripts/train.py. Raises UserError if that fails.
    """
    figures = {}
    for kind in ('cold', 'warm'):
        summaries = []
        with tempfile.TemporaryDirectory() as shared:
            for window in range(windows + (kind == 'warm')):  # the first warm run fills the cache
                with tempfile.TemporaryDirectory() as own:
                    cache = {'JAX_COMPILATION_CACHE_DIR': shared if kind == 'warm' else own}
                    done = subprocess.run(
                        [*train_command, '--config.train.steps=1', f'--workdir={own}/run'],
                        capture_output=True,
                        text=True,
                        env=os.environ | cache,
                    )
                    if done.returncode:
                        raise UserError(f'the run to be timed failed: {done.stderr.strip()[-500:]}')
                    if window or kind == 'cold':
                        summaries.append(
                            json.loads(Path(own, 'run/summary.json').read_text('utf-8'))
                        )
        for name in ('seconds_to_first_step', 'seconds_total'):
            figures[f'{kind}_{name}'] = _spread([summary[name] for summary in summaries])
    return figures


def broken_rules(config: ConfigDict) -> list[str]:
    """The settings that keep a run from being an entry of the benchmark, in words."""
    flat = flatten(resolve(config))
    return [
        f'{key} = {flat[key]!r} instead of {value!r}'
        for key, value in BENCHMARK_RULES.items()
        if flat[key] != value
    ]


def report_time_to_loss(
    train_command: list[str],
    config: ConfigDict,
    seeds: Sequence[int],
    target: float,
    warm: bool = False,
    against_loss: float | None = None,
    against_seconds: float | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """`bench_time_to_loss` with a printed line for each seed; returns the figures over all seeds.

    Evaluations cover the whole validation split. `out` is written again after each seed, as JSON.
    Raises UserError if a seed failed, after the other seeds.
    """
    path = files.output_path(out) if out else None
    config, records = config.copy_and_resolve_references(), []
    config.eval.tokens = 0
    train_command = [*train_command, '--config.eval.tokens=0']
    figures = {'loss': target, 'warm': warm, 'broken_rules': broken_rules(config)}
    for rule in figures['broken_rules']:
        say(f'no entry of the benchmark: {rule}')

    def write():
        if path:
            everything = {'arguments': train_command[2:], **figures, 'records': records}
            files.write_text(path, json.dumps(everything) + '\n')

    with progress.Progress(f'training {len(seeds)} seeds'):
        for record in bench_time_to_loss(train_command, seeds, target, warm):
            say(describe_seed(record, target))
            records.append(record)
            write()
    figures |= summarize_seeds(records, against_loss, against_seconds)
    write()
    return figures


def bench_time_to_loss(
    train_command: list[str], seeds: Iterable[int], target: float, warm: bool = False
) -> Iterator[dict[str, Any]]:
    """Trains once for each seed, in a process of its own; yields a record when one has ended.

    `seconds_to_loss` counts from before the process is started until it has printed the first
    validation loss <= `target`; None if it never did. `best_loss` is the lowest of the run, at
    `best_step`. Nothing is compiled beforehand, unless the run is `warm`: then the same seed was
    trained once before, with the same cache of programs. A seed whose process fails has only
    `error`.
    """
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [*train_command, f'--config.train.seed={seed}']
            env = os.environ | {'JAX_COMPILATION_CACHE_DIR': f'{folder}/programs'}
            for name in ('first', 'run') if warm else ('run',):
                record = _timed_run(command, Path(folder, name), env, target)
                if 'error' in record:
                    break
            yield {'seed': seed, **record}


def _timed_run(
    command: list[str], workdir: Path, env: dict[str, str], target: float
) -> dict[str, Any]:
    """The record of one run, without its seed: see `bench_time_to_loss`."""
    printed_at, last = {}, 'it printed nothing'
    began = time.monotonic()
    with tempfile.TemporaryFile('w+', encoding='utf-8') as errors:
        process = subprocess.Popen(
            [*command, f'--workdir={workdir}'],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
        with process:
            for line in process.stdout:  # the time of a line is when it arrives
                words, _, message = line.partition(': ')
                if message.startswith('validation'):
                    printed_at[words] = time.monotonic() - began
                last = line.strip() or last
        seconds = time.monotonic() - began
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [last])[-1]
    if process.returncode:
        return {'error': f'exit code {process.returncode}: {last[-500:]}'}
    evaluated = history.read_records(workdir, 'val')
    best = min(evaluated, key=lambda record: record['loss'])
    reached = next((r['step'] for r in evaluated if r['loss'] <= target), None)
    return {
        'seconds_to_loss': printed_at.get(f'step {reached}'),
        'steps_to_loss': reached,
        'best_loss': best['loss'],
        'best_step': best['step'],
        'final_loss': evaluated[-1]['loss'],
        'seconds_total': seconds,
    }


def describe_seed(record: dict[str, Any], target: float) -> str:
    """A record of `bench_time_to_loss` as a line."""
    if 'error' in record:
        return f'seed {record["seed"]} failed: {record["error"]}'
    reached = f'never reached {target}'
    if record['seconds_to_loss'] is not None:
        reached = (
            f'reached {target} after {record["seconds_to_loss"]:.2f} s, at step '
            f'{record["steps_to_loss"]:,}'
        )
    return (
        f'seed {record["seed"]}: {reached}; best loss {record["best_loss"]:.4f} at step '
        f'{record["best_step"]:,}, last {record["final_loss"]:.4f}; {record["seconds_total"]:.2f} '
        's in all'
    )


def summarize_seeds(
    records: list[dict[str, Any]], against_loss: float | None, against_seconds: float | None
) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, with p-values against given figures.

    A seed that never reached the loss leaves no mean of the seconds. Raises UserError if a seed
    failed: a mean over the others would not be one over all.
    """
    failed = [record['seed'] for record in records if 'error' in record]
    if failed:
        names = ', '.join(map(str, failed))
        raise UserError(f'{len(failed)} of {len(records)} seeds failed ({names}): there is no mean')
    against = {'seconds_to_loss': against_seconds, 'best_loss': against_loss}
    found = {'seeds': len(records)}
    for name, figure in against.items():
        values = [record[name] for record in records]
        n, whole = len(values), None not in values
        found[f'{name}_mean'] = statistics.mean(values) if whole else None
        found[f'{name}_std'] = statistics.stdev(values) if whole and n > 1 else None
        if figure is not None:
            p = p_value(values, figure) if whole and n > 1 else None
            found |= {f'{name}_against': figure, f'{name}_p': p}
    return found


def p_value(values: list[float], figure: float) -> float:
    """How likely a mean this low or lower is, if the true mean is `figure`: Student's t-test.

    One-sided, for n >= 2 normally distributed values of unknown deviation.
    """
    n, mean, deviation = len(values), statistics.mean(values), statistics.stdev(values)
    if not deviation:
        return 0.5 if mean == figure else float(mean > figure)
    return student_t(math.sqrt(n) * (mean - figure) / deviation, n - 1)


def student_t(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t distribution: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    between = math.sin(angle) * total  # P(|T| <= t), signed
    if odd:
        between = 2 / math.pi * (angle + between)
    return (1 + between) / 2
