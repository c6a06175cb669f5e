"""The speed of training, scoring, decoding and start-up, measured in repeated windows."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.architecture import GPT2Config, matmul_weights
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import CharTokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference.decoding import CHUNK, generate, with_kernels
from gpt2_jax.inference.evaluate import make_evaluate, make_jitted_eval_step, make_prepare
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.parallel import devices, feed
from gpt2_jax.training import programs
from gpt2_jax.training.meter import RunProgress
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.start import checkpoint_meta
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.checkpoints import Checkpoints


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


def first_batch(setup: Setup) -> feed.Batch:
    """The batch of step 0, which all timed updates take."""
    return feed.train_batch(setup.mesh, setup.dataset.train, step=0, **setup.batch_options)


def time_updates(
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
    batch = first_batch(setup)
    began = time.monotonic()
    state, _ = jax.block_until_ready(train_step(state, batch))
    compile_seconds = time.monotonic() - began
    step_seconds, state = time_updates(train_step, state, batch, windows, seconds)
    evaluate = make_evaluate(setup)
    evaluate(state.params)
    began = time.monotonic()
    evaluate(state.params)
    evaluation_seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        meta = checkpoint_meta(setup, Path(folder), RunProgress())
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
    batch, eval_step = first_batch(setup), make_jitted_eval_step(setup)
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


def bench_decode(
    setup: Setup,
    windows: int,
    num_samples: int,
    new_tokens: int,
    sampling: Sampling,
    prompt_tokens: int = 1,
) -> dict[str, Any]:
    """Measures generation, prefill included. Rates count the tokens of all samples.

    `first_chunk_seconds` is the time until the first tokens arrive, CHUNK of them, and
    `token_seconds` that of each later token of all samples; None if there is none.
    `memory_share` is the share of the device's memory rate that reading the weights, once a token,
    and the keys and values takes; None if the rate is not known. Raises UsageError if the context
    is too short.
    """
    context = setup.model.cfg.n_positions
    most = context + 1  # the last token is not fed to the model
    if prompt_tokens + new_tokens > most:
        raise UsageError(
            f'--prompt_tokens={prompt_tokens} and --new_tokens={new_tokens} do not fit the context '
            f'of {context}: give at most {most} together'
        )
    model = with_kernels(setup.model, setup.model.cfg.kernels, '')
    params = programs.new_state(setup).params

    def run() -> tuple[float, float, int]:
        """Seconds until the first chunk and until the last, and the tokens after the first."""
        began = time.monotonic()
        chunks = generate(
            model,
            params,
            [0] * prompt_tokens,
            max_new_tokens=new_tokens,
            num_samples=num_samples,
            sampling=sampling,
        )
        next(chunks)
        first = time.monotonic() - began
        later = sum(chunk.shape[1] for chunk in chunks)
        return first, time.monotonic() - began, later

    first_call = run()[1]
    firsts, figures, later = zip(*(run() for _ in range(windows)), strict=True)
    seconds, first = _spread(figures), statistics.median(firsts)
    token_seconds = (seconds['median'] - first) / later[0] if later[0] else None
    n_bytes = decoded_bytes(setup.model.cfg, num_samples, prompt_tokens + new_tokens / 2)
    rate = devices.PEAK_MEMORY_RATES.get(setup.device.device_kind)
    return {
        'samples': num_samples,
        'prompt_tokens': prompt_tokens,
        'new_tokens': new_tokens,
        'chunk': CHUNK,
        'seconds': seconds,
        'first_call_seconds': first_call,
        'first_chunk_seconds': first,
        'token_seconds': token_seconds,
        'tokens_per_second': num_samples * new_tokens / seconds['median'],
        'memory_share': n_bytes / token_seconds / rate if token_seconds and rate else None,
    }


def decoded_bytes(cfg: GPT2Config, num_samples: int, position: float) -> float:
    """Bytes of weights, keys and values that one token of all samples reads at this position.

    The weights are the matrices of the blocks and of the head, in the compute dtype.
    """
    cache = num_samples * 2 * cfg.n_layer * cfg.n_embd * position
    return (matmul_weights(cfg) + cache) * jnp.dtype(cfg.compute_dtype).itemsize


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
