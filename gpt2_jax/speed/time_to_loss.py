"""The time to a validation loss, over seeds: the benchmark of docs/tinyshakespeare-benchmark.md."""

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt2_jax import files, progress
from gpt2_jax.config import flatten, resolve
from gpt2_jax.errors import UserError
from gpt2_jax.terminal import say
from gpt2_jax.workdir import history

# The rules of the benchmark that settings can break. All other settings belong to the recipe, which
# is free.
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
