"""The speed of training, decoding and start-up, measured in repeated windows."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.config import resolve
from gpt2_jax.data import load
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import CharTokenizer
from gpt2_jax.diagnostics import plan
from gpt2_jax.errors import UserError
from gpt2_jax.inference.decoding import CHUNK, generate, with_kernels
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.parallel import devices, feed
from gpt2_jax.parallel.faults import memory_errors
from gpt2_jax.training import programs
from gpt2_jax.training.meter import Progress
from gpt2_jax.training.resume import checkpoint_meta
from gpt2_jax.training.setup import Setup, build
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.checkpoints import Checkpoints

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
