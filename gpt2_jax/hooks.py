"""The hooks of a run: evaluate, sample, explain what goes wrong, save. Each is a loop.Hook."""

import collections
import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.errors import DivergedError, UserError
from gpt2_jax.inference.sampling import TO_READ
from gpt2_jax.inference.streaming import continue_text
from gpt2_jax.parallel.hosts import several
from gpt2_jax.parallel.mesh import on_one_device
from gpt2_jax.reports import autopsy
from gpt2_jax.training.loop import Interrupt, Interrupted
from gpt2_jax.training.meter import Meter
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.checkpoints import Checkpoints
from gpt2_jax.workdir.checksums import is_better
from gpt2_jax.workdir.log import Logger


def is_due(step: int, every: int, steps: int) -> bool:
    """Every `every` steps, and after the last of `steps`."""
    return step % every == 0 or step == steps


@dataclasses.dataclass
class Evaluate:
    """Evaluates the validation split; keeps the score of the best checkpoint in `meter.progress`.

    `evaluate(params, on_batch=..)` gives an Evaluation. An interrupt stops it between two batches:
    nothing is recorded, and the resumed run evaluates this step. Raises DivergedError for a loss
    that is not finite.
    """

    evaluate: Callable
    meter: Meter
    log: Logger
    interrupt: Interrupt

    def due(self, step: int) -> bool:
        return is_due(step, self.meter.setup.config.eval.every, self.meter.steps)

    def __call__(self, step: int, state: TrainState) -> None:
        progress = self.meter.progress
        report = self.log.working('evaluated', self.meter.setup.eval_tokens, 'tokens')

        def on_batch(tokens):
            self.interrupt.check()
            report.add(tokens)

        try:
            self.interrupt.check()
            result = self.evaluate(state.evaluated, on_batch=on_batch)
        except Interrupted:
            progress.unfinished = ['evaluation', 'sample']
            self.interrupt.poll()
            self.log.say(f'step {step}: the evaluation was stopped; the resumed run repeats it')
            return
        if not math.isfinite(result.loss):
            raise self.meter.diverged(step, f'validation loss = {result.loss}')
        better = is_better(result.loss, progress.best_val_loss)
        if better:
            progress.best_step, progress.best_val_loss = step, result.loss
        progress.final_val_loss, progress.val_tokens = result.loss, result.tokens
        self.log.record(step, 'val', {**result._asdict(), 'seconds': self.meter.seconds()})
        seconds = time.monotonic() - report.began
        self.meter.evaluated(seconds)
        self.log.say(
            f'step {step}: validation {result}, in {seconds:.1f} s'
            + (' (best so far)' if better else '')
        )


@dataclasses.dataclass
class Sample:
    """Writes a sample of `eval.sample_tokens` tokens from the current model; 0 writes none.

    An interrupt stops it, and the resumed run samples at this step.
    """

    meter: Meter
    log: Logger
    interrupt: Interrupt

    def due(self, step: int) -> bool:
        config = self.meter.setup.config.eval
        is_wanted = config.sample_tokens > 0 and 'sample' not in self.meter.progress.unfinished
        return is_wanted and is_due(step, config.every, self.meter.steps)

    def __call__(self, step: int, state: TrainState) -> None:
        setup = self.meter.setup
        self.log.work(f'step {step}: writing a sample')
        # One text at a time is too little work for a mesh. Every process writes it, for itself.
        params = on_one_device(setup.mesh, state.evaluated)
        written = continue_text(
            setup.model,
            params,
            setup.dataset.tokenizer,
            prompt='',
            max_new_tokens=setup.config.eval.sample_tokens,
            seed=setup.config.train.seed,
            sampling=TO_READ,
        )
        pieces = []
        try:
            for piece in written:
                # Pieces may differ between processes, which must all check equally often.
                if not several():
                    self.interrupt.check()
                pieces.append(piece)
        except Interrupted:
            self.meter.progress.unfinished = ['sample']
            self.interrupt.poll()
            return
        self.log.sample(step, ''.join(pieces))


@dataclasses.dataclass
class Save:
    """Saves the state and everything that resuming needs.

    Also saves when the state is the best so far, when checkpoint.keep asks for this step, and when
    a signal has arrived. `meta()` gives the data to keep beside the state; see
    start.checkpoint_meta. Raises UserError if this save, or the save before it, failed.
    """

    checkpoints: Checkpoints
    meter: Meter
    log: Logger
    meta: Callable[[], dict[str, Any]]
    evaluate: Evaluate
    interrupt: Interrupt

    def due(self, step: int) -> bool:
        self.checkpoints.check()
        kept = self.checkpoints.kept
        if step == 0:
            return kept.includes(0) and not self.checkpoints.committed()
        is_best = self.meter.progress.best_step == step
        is_kept = kept.keep == 'log' and kept.includes(step)
        every = self.meter.setup.config.checkpoint.every
        is_regular = is_due(step, every, self.meter.steps)
        return is_best or is_kept or is_regular or bool(self.interrupt.seen)

    def __call__(self, step: int, state: TrainState) -> None:
        progress = self.meter.progress
        self.log.flush()
        progress.seconds = self.meter.seconds()
        is_evaluated = self.evaluate.due(step) and 'evaluation' not in progress.unfinished
        val_loss = progress.final_val_loss if is_evaluated else None
        self.checkpoints.save(step, state, self.meta(), val_loss)


class ExplainSpikes:
    """Explains updates whose loss or gradient norm leaps, without stopping the run.

    An update leaps if a value is more than `deviations` standard deviations above the mean of up to
    WINDOW updates before it; 0: none does. The first PAGES explanations of a process get a page,
    which takes a replay; the others get a line with the command that makes one.
    """

    WINDOW, LEAST, PAGES = 100, 20, 3

    def __init__(self, deviations: float, workdir: Path, log: Logger):
        self.deviations, self.workdir, self.log = deviations, workdir, log
        self.recent = {
            name: collections.deque(maxlen=self.WINDOW) for name in ('loss', 'grad_norm')
        }
        self.leaps: dict[int, str] = {}  # by step, not explained yet; of two at a step, the loss
        self.pages = 0

    def watch(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of an update."""
        if not self.deviations:
            return
        for name, recent in self.recent.items():
            if len(recent) >= self.LEAST:
                mean, deviation = float(np.mean(recent)), float(np.std(recent))
                if values[name] > mean + self.deviations * deviation:
                    times = (values[name] - mean) / max(deviation, 1e-12)
                    what = f'{name} = {values[name]:.4g} is {times:.1f} deviations above {mean:.4g}'
                    self.leaps.setdefault(step, what)
            recent.append(values[name])

    def due(self, step: int) -> bool:
        return bool(self.leaps)

    def __call__(self, step: int, state: TrainState) -> None:
        self.explain()

    def explain(self) -> None:
        """Explains the updates that leapt since the last call."""
        leaps, self.leaps = self.leaps, {}
        for at, what in leaps.items():
            self.pages += 1
            by_hand = self.pages > self.PAGES
            why = autopsy_command(self.workdir, at) if by_hand else explained(self.workdir, at)
            self.log.say(f'step {at}: {what}. {why}')


def autopsy_command(workdir: Path, step: int) -> str:
    """The command that explains an update, as a shell reads it."""
    where = shlex.quote(str(workdir))
    return f'python scripts/steps.py autopsy --workdir={where} --step={step}'


def explained(workdir: Path, step: int) -> str:
    """Why an update went wrong, in sentences that name the page; or how to find out by hand.

    A run of several processes does not replay the update: its user does, with one process.
    """
    by_hand = autopsy_command(workdir, step)
    if several():
        return f'{by_hand} explains it'
    try:
        said, page = autopsy.explain(workdir, step)
    except (UserError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = ' '.join(str(error).split())[:200]
        return f'It could not be explained here ({reason}); {by_hand} tries again'
    return f'{" ".join(said)} {page} shows all of it'


def finish_last_step(
    step: int,
    state: TrainState,
    evaluate: Evaluate,
    sample: Sample,
    checkpoints: Checkpoints,
) -> None:
    """Does what an interrupt stopped at the step that a run resumes from.

    The checkpoint of that step gets the validation loss that it was saved without.
    """
    progress = evaluate.meter.progress
    unfinished, progress.unfinished = progress.unfinished, []
    if 'evaluation' in unfinished:
        evaluate(step, state)
        if not progress.unfinished:
            checkpoints.add_val_loss(step, progress.final_val_loss)
    if 'sample' in unfinished and sample.due(step):
        sample(step, state)


def diverged(checkpoints: Checkpoints, workdir: Path, step: int, what: str) -> DivergedError:
    """The error for a value that is not finite.

    Names the value, the last good checkpoint, and where the value came from.
    """
    checkpoints.wait()
    steps = checkpoints.committed()
    last = (
        f'the last good checkpoint is step {steps[-1]}' if steps else 'there is no checkpoint yet'
    )
    return DivergedError(
        f'training diverged at step {step}: {what}; nothing was saved from it, {last} in '
        f'{checkpoints.folder}. {explained(workdir, step)}. Start again (--fresh, or another '
        '--workdir) with a lower optim.learning_rate, more optim.warmup_steps, or optim.clip_norm '
        '= 1'
    )
