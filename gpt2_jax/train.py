"""The training loop: the one file that knows all the others.

    for step in range(start, steps):  update;  evaluate, sample and save where step + 1 is due

Checkpoint S means exactly S updates. The batch and the dropout masks of an update are functions of its number, so a
run that was cut off and goes on from its last checkpoint computes what it would have computed.
"""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gpt2_jax.data import batches, tokenizers
from gpt2_jax.parallel import mesh
from gpt2_jax.training import finetune
from gpt2_jax.workdir import folder
from gpt2_jax import config as config_lib
from gpt2_jax.workdir.checkpoints import Checkpoints, FOLDER, best_in, sealed_in, set_aside_damaged
from gpt2_jax.errors import DivergedError, UsageError
from gpt2_jax.inference.decoding import Sampling, default_prompt, generate, stream_text
from gpt2_jax.model.gpt2 import count_params
from gpt2_jax.training.setup import Recipe, build, describe, schedule_of
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.log import RunLog, duration

# Small models read better a little below the temperature they were trained at.
EVAL_SAMPLING = Sampling(temperature=0.8)
MEMORY_KNOBS = ('lower --config.train.batch_size, raise --config.train.accumulate (the same gradient in less memory), '
                'lower --config.train.seq_len, set --config.model.remat=True, or take a smaller model.n_layer or '
                'model.n_embd')


@dataclasses.dataclass
class Progress:
    """What a run knows beside its state; it is kept in every checkpoint."""

    best_step: int | None = None
    best_val_loss: float | None = None
    final_val_loss: float | None = None  # of the latest evaluation
    val_tokens: int = 0
    # Of this process and those before it. Training time and its steps are without compilation, evaluations and the
    # waits of saves.
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    train_seconds: float = 0.0
    train_steps: int = 0


def train(config: ConfigDict, workdir: Path, *, extend: bool = False, fresh: bool = False,
          started: float | None = None) -> int:
    """Trains, or goes on training, in the run's folder; returns the exit code: 0, or 128 + a signal's number.

    `extend` lets train.steps grow, `fresh` moves an old run aside first, `started` is when the process began, by
    time.monotonic(). Raises UserError, and leaves every finished checkpoint as it is.
    """
    started = time.monotonic() if started is None else started
    config = config_lib.resolve(config)
    with mesh.memory_errors(MEMORY_KNOBS):
        # What cannot be trained on is told before any folder is made or moved.
        recipe = build(config)
        recipe.check()
        if fresh:
            finetune.check(recipe)
        recipe.batch(0)
        next(batches.eval_batches(recipe.dataset.val, batch_size=1, seq_len=config.train.seq_len))
    print('\n'.join(describe(recipe)), flush=True)
    if fresh and (aside := folder.move_aside(workdir)):
        print(f'the old run was moved to {aside}')
    with folder.claim(workdir), mesh.memory_errors(MEMORY_KNOBS):
        for report in set_aside_damaged(workdir / FOLDER):
            print(report, flush=True)
        with Checkpoints(workdir / FOLDER) as checkpoints, _compiling() as pool:
            start, progress, log_sizes = _where_to_start(recipe, workdir, checkpoints, extend)
            if start == config.train.steps and (workdir / 'summary.json').exists():
                print(f'the run in {workdir} is finished: {start:,} steps, best validation loss '
                      f'{progress.best_val_loss:.4f} at step {progress.best_step:,}; raise train.steps with --extend '
                      'to go on, or start anew with --fresh')
                return 0
            if start:
                print(f'going on from checkpoint {start:,} in {workdir}', flush=True)
            train_step, evaluate = recipe.train_step(pool), recipe.evaluator(pool=pool)
            state = checkpoints.restore(start, recipe.abstract_state()) if start else finetune.first_state(recipe)
            folder.cut_back(workdir, log_sizes)
            (workdir / 'summary.json').unlink(missing_ok=True)
            folder.write_text(workdir / 'config.json', config_lib.to_json(config))
            folder.write_text(workdir / 'tokenizer.json', tokenizers.to_json(recipe.dataset.tokenizer))
            with RunLog(workdir, start, config.train.steps) as log:
                loop = Loop(recipe, workdir, checkpoints, log, progress, started, evaluate)
                caught = loop.run(train_step, state, start)
            checkpoints.wait()
        if caught:
            print(f'stopped by {caught.name} at step {loop.done:,}, which is saved; the same command goes on')
            return 128 + caught
        summary = loop.summary()
        folder.write_text(workdir / 'summary.json', json.dumps(summary, indent=1) + '\n')
        print(f'finished {config.train.steps:,} steps in {duration(summary["seconds_total"])}: best validation loss '
              f'{progress.best_val_loss:.4f} at step {progress.best_step:,}, final {progress.final_val_loss:.4f}\n'
              f'sample from it: python scripts/sample.py --ckpt_dir={workdir}')
        return 0


def _corpus(recipe: Recipe) -> dict[str, Any]:
    """The identity of the text a run trains on."""
    asked, got = recipe.config.data.corpus, recipe.dataset
    return {'asked_for': asked, 'name': got.name, 'sha256': got.sha256,
            'fallback': got.name == recipe.config.data.fallback != asked}


def _where_to_start(recipe: Recipe, workdir: Path, checkpoints: Checkpoints,
                    extend: bool) -> tuple[int, Progress, dict[str, int]]:
    """The latest checkpoint's step, progress and log sizes; those of a new run where there is none.

    Raises UsageError naming every setting that keeps the run from going on with this configuration.
    """
    saved = sealed_in(workdir / FOLDER)
    if not saved:
        return 0, Progress(), {}
    start, config = saved[-1], recipe.config
    meta = checkpoints.read_meta(start)
    old = config_lib.from_json(meta['config'])
    differ = config_lib.differences(old, config)
    longer = config.train.steps > old.train.steps
    if extend and longer:
        differ.pop('train.steps')
    theirs, ours = meta['corpus'], _corpus(recipe)
    if theirs['sha256'] != ours['sha256']:
        differ['data.corpus (its text)'] = tuple(f'{c["name"]} {c["sha256"][:12]}' for c in (theirs, ours))
    if differ:
        fields = '; '.join(f'{key}: {a!r} there, {b!r} now' for key, (a, b) in differ.items())
        hint = ' (a larger train.steps may go on with --extend)' if 'train.steps' in differ and longer else ''
        raise UsageError(f'the run in {workdir} has another configuration: {fields}{hint}; give the same settings to '
                         'go on, another --workdir for a new run, or --fresh to move the old one aside')
    if extend and longer:
        before, after = (float(schedule_of(c)(start)) for c in (old, config))
        print(f'extended from {old.train.steps:,} to {config.train.steps:,} steps: the schedule is laid out anew over '
              f'all of them, and the learning rate at step {start:,} goes from {before:.3g} to {after:.3g}')
    progress = Progress(**meta['progress'])
    if progress.best_step not in saved:  # it was damaged: the best is one that can be restored
        progress.best_step, progress.best_val_loss = best_in(workdir / FOLDER)
    return start, progress, meta['log_sizes']


@contextlib.contextmanager
def _compiling() -> Iterator[ThreadPoolExecutor]:
    """Threads to compile on; where an error ends the run, it is told without waiting for them."""
    pool = ThreadPoolExecutor(2, 'compile')
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Notes the first SIGTERM or Ctrl-C, so that the loop can save and leave; a second one is not held back."""
    noted = []

    def note(number, frame):
        noted.append(signal.Signals(number))
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        restore()


class Loop:
    """One pass of the training loop over its steps, and what it counts."""

    def __init__(self, recipe: Recipe, workdir: Path, checkpoints: Checkpoints, log: RunLog, progress: Progress,
                 started: float, evaluate: Callable):
        self.recipe, self.config, self.workdir = recipe, recipe.config, workdir
        self.checkpoints, self.log, self.progress, self.started = checkpoints, log, progress, started
        self.seconds_before, self.told_time = progress.seconds, False
        self.evaluate = evaluate
        self.pending = []  # (step, its metrics, still on the device)
        self.done = 0
        self.mark = None  # where the stretch under measurement began: (time, step)

    def run(self, train_step: Callable, state: TrainState, start: int) -> signal.Signals | None:
        """Updates from step `start` to the last; returns the signal that cut it short, if one did."""
        config, steps = self.config, self.config.train.steps
        self.done = start
        with _signals() as noted, contextlib.closing(batches.prefetch(self.recipe.batch, start, steps)) as stream:
            for index, batch in enumerate(stream, start):
                state, metrics = train_step(state, batch)
                self.done = done = index + 1
                self.pending.append((done, metrics))
                # A signal is looked for once: one that comes later in this pass waits for the next.
                first, last, leaves = index == start, done == steps, bool(noted)
                evaluates = last or done % config.eval.every == 0
                saves = last or leaves or done % config.checkpoint.every == 0
                if first or evaluates or saves:
                    self.fetch(len(self.pending))
                elif len(self.pending) > config.log.every:
                    self.fetch(config.log.every)  # all but the newest, so that the device always has work
                if done == 1:
                    self.progress.seconds_to_first_step = time.monotonic() - self.started
                if evaluates:
                    saves |= self.evaluate_and_sample(state.params)
                if saves:
                    self.save(state)
                if first or evaluates or saves:
                    self.mark = time.monotonic(), done
                if leaves:
                    return noted[0]
        return None

    def fetch(self, count: int) -> None:
        """Fetches, checks and records the oldest `count` pending metrics.

        Raises DivergedError, and UserError where the save in the background failed.
        """
        self.checkpoints.check()
        fetched, self.pending = self.pending[:count], self.pending[count:]
        now_on_host = jax.device_get([metrics for _, metrics in fetched])
        rate = self.measure(fetched[-1][0])
        for (step, _), metrics in zip(fetched, now_on_host, strict=True):
            values = {'loss': None, **{name: float(value) for name, value in metrics.items()}}  # the loss comes first
            wrong = [f'{name} = {value}' for name, value in values.items() if not math.isfinite(value)]
            if wrong:
                raise self.diverged(step, ', '.join(wrong))
            if step == 1 or step % self.config.log.every == 0 or step == self.config.train.steps:
                self.log.record(step, 'train', {**values, 'tokens_per_second': rate, 'mfu': self.mfu(rate)})
        left = self.config.train.steps - step
        self.log.progress(step, self.config.train.steps, values['loss'], rate,
                          left * self.recipe.tokens_per_step / rate if rate else None)

    def measure(self, step: int) -> float | None:
        """Tokens per second over the stretch that ends, now, with `step`; None where none was under measurement."""
        if not self.mark or step <= self.mark[1]:
            return None
        now, (began, first), config = time.monotonic(), self.mark, self.config
        if not self.told_time:
            left = (config.train.steps - step) * (now - began) / (step - first)
            evaluations = math.ceil(config.train.steps / config.eval.every) - (step - 1) // config.eval.every
            self.log.say(f'{(now - began) / (step - first) * 1e3:.1f} ms a step: about {duration(left)} to go, and the '
                         f'time of {evaluations} evaluation{"s" * (evaluations > 1)}')
            self.told_time = True
        self.progress.train_seconds += now - began
        self.progress.train_steps += step - first
        self.mark = now, step
        return (step - first) * self.recipe.tokens_per_step / (now - began)

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOP utilisation: the share of the devices' peak; None where either is unknown."""
        peak = mesh.peak_flops(self.recipe.device)
        if not peak or not tokens_per_second:
            return None
        return tokens_per_second * self.recipe.flops_per_token / (peak * self.recipe.mesh.size)

    def diverged(self, step: int, what: str) -> DivergedError:
        """The error for a value that is not finite."""
        self.checkpoints.wait()
        kept = sealed_in(self.workdir / FOLDER)
        last = f'the last good checkpoint is that of step {kept[-1]}' if kept else 'there is no checkpoint yet'
        return DivergedError(f'training diverged at step {step}: {what}; nothing was saved from it, {last} in '
                             f'{self.workdir}. Start anew (--fresh, or another --workdir) with a lower '
                             'optim.learning_rate, more optim.warmup_steps, or optim.clip_norm = 1')

    def evaluate_and_sample(self, params) -> bool:
        """Evaluates the whole validation split and prints a sample; returns whether the loss is the best so far."""
        began = time.monotonic()
        result = self.evaluate(params)
        if not math.isfinite(result.loss):
            raise self.diverged(self.done, f'validation loss = {result.loss}')
        progress = self.progress
        # Of equal ones the later, as orbax has it, so that both keep the same checkpoint.
        better = progress.best_val_loss is None or result.loss <= progress.best_val_loss
        if better:
            progress.best_step, progress.best_val_loss = self.done, result.loss
        progress.final_val_loss, progress.val_tokens = result.loss, result.tokens
        seconds = self.seconds_before + time.monotonic() - self.started
        self.log.record(self.done, 'val', {**result._asdict(), 'seconds': seconds})
        self.log.say(f'step {self.done}: validation loss {result.loss:.4f} nats, perplexity {result.perplexity:.3f}, '
                     f'{result.bits_per_byte:.4f} bits per byte over {result.tokens:,} tokens, in '
                     f'{time.monotonic() - began:.1f} s' + (' (best so far)' if better else ''))
        if self.config.eval.sample_tokens:
            tokenizer = self.recipe.dataset.tokenizer
            whole = jax.device_put(params, self.recipe.device)  # one text at a time is no work for a mesh
            chunks = generate(self.recipe.model, whole, default_prompt(tokenizer), sampling=EVAL_SAMPLING,
                              max_new_tokens=self.config.eval.sample_tokens, seed=self.config.train.seed,
                              notify=lambda text: None)
            self.log.sample(self.done, ''.join(stream_text(chunks, tokenizer)))
        return better

    def save(self, state: TrainState) -> None:
        """Saves the state and all that is needed to go on from it."""
        self.log.flush()
        self.progress.seconds = self.seconds_before + time.monotonic() - self.started
        evaluated_now = self.done % self.config.eval.every == 0 or self.done == self.config.train.steps
        meta = {'config': config_lib.to_json(self.config), 'corpus': _corpus(self.recipe),
                'tokenizer': tokenizers.to_json(self.recipe.dataset.tokenizer),
                'progress': dataclasses.asdict(self.progress), 'log_sizes': folder.log_sizes(self.workdir)}
        self.checkpoints.save(self.done, state, meta, self.progress.final_val_loss if evaluated_now else None)

    def summary(self) -> dict[str, Any]:
        """summary.json: what came of the run. Times in seconds, losses in nats per token."""
        progress, steps = self.progress, self.config.train.steps
        seconds = progress.train_seconds
        rate = progress.train_steps * self.recipe.tokens_per_step / seconds if seconds else None
        return {
            'steps': steps, 'tokens': steps * self.recipe.tokens_per_step,
            'best_step': progress.best_step, 'best_val_loss': progress.best_val_loss,
            'final_val_loss': progress.final_val_loss, 'val_tokens': progress.val_tokens,
            'seconds_total': self.seconds_before + time.monotonic() - self.started,
            'seconds_to_first_step': progress.seconds_to_first_step,
            'tokens_per_second': rate, 'mfu': self.mfu(rate),
            'device': mesh.describe_device(self.recipe.device), 'jax_version': jax.__version__,
            'parameters': count_params(self.recipe.shapes.params), 'corpus': _corpus(self.recipe),
        }
