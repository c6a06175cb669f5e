"""What a run measures: losses (fetched a little late), speed, progress, and the final summary."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gpt2_jax import foreign
from gpt2_jax.errors import DivergedError
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel.devices import describe_device, model_flops_utilisation
from gpt2_jax.parallel.hosts import several
from gpt2_jax.terminal import counted
from gpt2_jax.training.setup import Setup
from gpt2_jax.workdir import history
from gpt2_jax.workdir.log import Logger, duration

# About the time between fetches of metrics, and so until an update is shown or a signal answered.
FETCH_SECONDS = 1
# Updates that may wait on the device while metrics are fetched, in seconds and in number. With
# them, the device keeps training while something else, such as saving in the background, delays the
# loop. JAX itself keeps at most 32 programs waiting.
AHEAD_SECONDS, MOST_AHEAD = 0.1, 24
ANNOUNCE_SECONDS = 4  # of training, until the time of the run is estimated


@dataclasses.dataclass
class RunProgress:
    """What a run knows beside its state; every checkpoint keeps it.

    Losses are in nats per token. Times are in seconds, over all processes of the run.
    `train_seconds` and `train_steps` exclude compilation, evaluation and waiting for saves.
    """

    best_step: int | None = None
    best_val_loss: float | None = None
    final_val_loss: float | None = None  # of the latest evaluation
    val_tokens: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    train_seconds: float = 0.0
    train_steps: int = 0
    # The work that an interrupt stopped, 'evaluation' or 'sample': the resumed run does it first.
    unfinished: list[str] = dataclasses.field(default_factory=list)
    # For each --extend: the step, and train.steps until then, on which the schedule depends.
    extensions: list[dict[str, int]] = dataclasses.field(default_factory=list)


# The fields of RunProgress, as JSON.
PROGRESS = dict.fromkeys(
    ('best_val_loss', 'final_val_loss', 'seconds', 'seconds_to_first_step', 'train_seconds'),
    foreign.Maybe(foreign.NUMBER),
) | {
    'best_step': foreign.Maybe(foreign.integer(0)),
    'val_tokens': foreign.Maybe(foreign.integer(0)),
    'train_steps': foreign.Maybe(foreign.integer(0)),
    'unfinished': foreign.Maybe([foreign.one_of('evaluation', 'sample')]),
    'extensions': foreign.Maybe(history.EXTENSIONS),
}


def read_progress(meta: dict[str, Any], workdir: Path) -> RunProgress:
    """The progress in the metadata of a checkpoint. Raises UserError if it has another form."""
    source, saved = f'the progress of the checkpoint in {workdir}', meta['progress']
    foreign.check(saved, PROGRESS, source)
    for name in saved.keys() - PROGRESS.keys():
        raise foreign.error(source, f'is of another form: it has {foreign.show(name)}')
    return RunProgress(**{name: value for name, value in saved.items() if value is not None})


class Meter:
    """Fetches the metrics of updates, checks that they are finite, times and records them.

    Metrics wait on the device while later updates are dispatched, so that the device always has
    work. `started` is when the process began, by time.monotonic(). `diverged(step, what)` makes the
    error for a value that is not finite; `watch(step, values)` sees the metrics of every update.
    """

    def __init__(
        self,
        setup: Setup,
        log: Logger,
        progress: RunProgress,
        *,
        start: int,
        started: float,
        diverged: Callable[[int, str], DivergedError],
        watch: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ):
        self.setup, self.log, self.progress = setup, log, progress
        self.diverged, self.watch = diverged, watch
        self.steps, self.every = setup.config.train.steps, setup.config.log.every
        self._first, self._started, self._seconds_before = start + 1, started, progress.seconds
        self._pending = []  # (step, its metrics, still on the device)
        self._mark = None  # where the stretch under measurement began: (time, step)
        self._announced = False
        self._fetch_every = 1  # updates; see FETCH_SECONDS
        self._ahead = 1  # updates; see AHEAD_SECONDS
        # Of this process: the time and the number of measured updates, and of evaluations.
        self._seconds = self._seconds_evaluating = 0.0
        self._steps = self._evaluations = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched update. An error may be that of an earlier update.

        Raises DivergedError if fetched metrics are not finite.
        """
        self._pending.append((step, metrics))
        if step == self._first:
            self.drain()  # waits for the compilation, which is not measured
            if step == 1:
                self.progress.seconds_to_first_step = time.monotonic() - self._started
            self._mark = time.monotonic(), step
        elif count := self._number_to_fetch():
            self._fetch(count)

    def drain(self) -> None:
        """Fetches and records all that is pending. Raises DivergedError."""
        if self._pending:
            self._fetch(len(self._pending))

    @contextlib.contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """Drains, and leaves what happens inside out of the measurement."""
        self.drain()
        yield
        self._mark = time.monotonic(), step

    def evaluated(self, seconds: float) -> None:
        """Counts an evaluation and its time, to estimate those to come."""
        self._evaluations += 1
        self._seconds_evaluating += seconds

    def seconds(self) -> float:
        """Seconds since the run began, over all its processes."""
        return self._seconds_before + time.monotonic() - self._started

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation of the mesh, 0 to 1: see devices.model_flops_utilisation."""
        return model_flops_utilisation(
            tokens_per_second, self.setup.flops_per_token, self.setup.mesh
        )

    def summary(self, corpus: dict[str, Any]) -> dict[str, Any]:
        """The result of the run, for summary.json. Times in seconds, losses in nats per token."""
        progress, setup = self.progress, self.setup
        rate = None
        if progress.train_seconds:
            rate = progress.train_steps * setup.tokens_per_step / progress.train_seconds
        return {
            'steps': self.steps,
            'tokens': self.steps * setup.tokens_per_step,
            'best_step': progress.best_step,
            'best_val_loss': progress.best_val_loss,
            'final_val_loss': progress.final_val_loss,
            'val_tokens': progress.val_tokens,
            'val_split_tokens': len(setup.dataset.val) - 1,
            'seconds_total': self.seconds(),
            'seconds_to_first_step': progress.seconds_to_first_step,
            'tokens_per_second': rate,
            'mfu': self.mfu(rate),
            'device': describe_device(setup.device),
            'jax_version': jax.__version__,
            'parameters': count_params(setup.shapes.params),
            'corpus': corpus,
        }

    def _number_to_fetch(self) -> int:
        """How many of the oldest pending metrics to fetch now: 0, or at least `_fetch_every`.

        It is more if the device finished further updates while the loop was delayed. Fetched
        together, these updates get the device's rate, and not the rate at which the loop catches
        up. If the device is in the middle of an update, none are fetched until this update ends:
        the rest of it alone would seem too fast.
        """
        losses = [metrics['loss'] for _, metrics in self._pending]
        count, before_newest = self._fetch_every, losses[self._fetch_every - 1 : -1]
        if not before_newest:
            return 0
        done = list(itertools.takewhile(lambda loss: loss.is_ready(), before_newest))
        if len(done) < len(before_newest):
            if len(losses) - count < self._ahead:
                return 0
            done.append(jax.block_until_ready(before_newest[len(done)]))
        return count - 1 + len(done)

    def _fetch(self, count: int) -> None:
        """Fetches, checks and records the oldest `count` pending metrics."""
        fetched, self._pending = self._pending[:count], self._pending[count:]
        on_host = jax.device_get([metrics for _, metrics in fetched])
        rate = self._measure(fetched[-1][0])
        for (step, _), metrics in zip(fetched, on_host, strict=True):
            loss_first = {'loss': None, **metrics}
            values = {name: float(value) for name, value in loss_first.items()}
            wrong = [f'{name} = {v}' for name, v in values.items() if not math.isfinite(v)]
            if wrong:
                raise self.diverged(step, ', '.join(wrong))
            self.watch(step, values)
            if step == 1 or step % self.every == 0 or step == self.steps:
                speed = {'tokens_per_second': rate, 'mfu': self.mfu(rate)}
                self.log.record(step, 'train', values | speed)
        left = sum(self._seconds_left(step)[:2]) if self._steps else None
        self.log.progress(step, self.steps, values['loss'], rate, left)

    def _measure(self, step: int) -> float | None:
        """Tokens per second over the stretch that ends now, with `step`; None without a stretch."""
        if not self._mark or step <= self._mark[1]:
            return None
        now, (began, first) = time.monotonic(), self._mark
        seconds_per_step = max(now - began, 1e-9) / (step - first)
        self._seconds += now - began
        self._steps += step - first
        steps_per_second = self._steps / max(self._seconds, 1e-9)
        # Several processes fetch at the same steps, so that all stop at the same bad value.
        if not several():
            self._fetch_every = min(self.every, max(1, int(FETCH_SECONDS * steps_per_second)))
            self._ahead = min(MOST_AHEAD, max(1, int(AHEAD_SECONDS * steps_per_second)))
        self._announce(step)
        self.progress.train_seconds += now - began
        self.progress.train_steps += step - first
        self._mark = now, step
        return self.setup.tokens_per_step / seconds_per_step

    def _seconds_left(self, step: int) -> tuple[float, float, int]:
        """Seconds of training after `step`, seconds of the evaluations after it, and their number.

        Until an evaluation was timed, the forward pass of a token counts as a third of its update.
        """
        every, seconds_per_step = self.setup.config.eval.every, self._seconds / self._steps
        n = math.ceil(self.steps / every) - (step - 1) // every
        if self._evaluations:
            evaluation = self._seconds_evaluating / self._evaluations
        else:
            evaluation = seconds_per_step / self.setup.tokens_per_step * self.setup.eval_tokens / 3
        return (self.steps - step) * seconds_per_step, n * evaluation, n

    def _announce(self, step: int) -> None:
        """Reports once how long the run will take."""
        is_early = self._steps < 3 or self._seconds < ANNOUNCE_SECONDS
        if self._announced or (is_early and self._steps < self.every):
            return
        self._announced = True
        training, evaluating, n = self._seconds_left(step)
        self.log.say(
            f'{self._seconds / self._steps * 1e3:.1f} ms a step: about {duration(training)} of '
            f'training to go, and {duration(evaluating)} of {counted(n, "evaluations")}'
        )
