"""What a run reports: the console, metrics.jsonl, samples.txt and TensorBoard events."""

import contextlib
import json
import socket
import sys
import time
from pathlib import Path

from rich import progress
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

# Not a SummaryWriter of any library: these load TensorFlow or torch where it is installed, for
# seconds.
from tensorboard.summary.writer.record_writer import RecordWriter

PLAIN_SECONDS = 5  # between progress lines if the output is not a terminal, to keep a log short


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '2 h 5 min'."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f'{int(hours)} h {int(minutes % 60)} min'
    return f'{int(minutes)} min {int(seconds % 60)} s' if minutes >= 1 else f'{seconds:.0f} s'


class Logger:
    """Everything a run writes while it trains. Use as a context manager."""

    def __init__(self, folder: Path, start: int, steps: int):
        name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.from_{start}'
        (folder / 'tensorboard').mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            texts = {'mode': 'a', 'encoding': 'utf-8', 'buffering': 1}
            self._metrics = stack.enter_context(open(folder / 'metrics.jsonl', **texts))
            self._samples = stack.enter_context(open(folder / 'samples.txt', **texts))
            self._events = RecordWriter(
                stack.enter_context(open(folder / 'tensorboard' / name, 'ab'))
            )
            self._event(file_version='brain.Event:2')
            self._close = stack.pop_all().close
        self._last_line = 0.0
        self._live = None
        if sys.stdout and sys.stdout.isatty():
            self._live = progress.Progress(
                progress.TextColumn('step {task.completed}/{task.total}'),
                progress.BarColumn(),
                progress.TextColumn('{task.description}'),
                progress.TimeRemainingColumn(),
                transient=True,
            )
            self._task = self._live.add_task('compiling', total=steps, completed=start)
            self._live.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._live:
            self._live.stop()
        self._close()

    def say(self, text: str) -> None:
        """Prints a message on the console, above the progress line if there is one."""
        if self._live:
            self._live.console.print(
                text, markup=False, emoji=False, highlight=False, soft_wrap=True
            )
        else:
            print(text, flush=True)

    def record(self, step: int, split: str, values: dict[str, float | None]) -> None:
        """Writes a line of metrics.jsonl and the same figures as TensorBoard events.

        None stands for an unknown figure. Raises ValueError for a figure that is not finite.
        """
        record = {'step': step, 'split': split, **values}
        self._metrics.write(json.dumps(record, allow_nan=False) + '\n')
        self.figures(step, split, values)

    def figures(self, step: int, split: str, values: dict[str, float | None]) -> None:
        """Writes figures as TensorBoard events alone."""
        known = [
            Summary.Value(tag=f'{split}/{name}', simple_value=value)
            for name, value in values.items()
            if value is not None
        ]
        self._event(step=step, summary=Summary(value=known))

    def sample(self, step: int, text: str) -> None:
        """Writes a sampled text to samples.txt and to the console."""
        self._samples.write(f'=== step {step} ===\n{text}\n\n')
        self.say(f'--- sample at step {step} ---\n{text.strip()}\n---')

    def progress(
        self,
        step: int,
        steps: int,
        loss: float,
        tokens_per_second: float | None,
        seconds_left: float | None,
    ):
        """Shows the state of training in the live line, or in a plain line every PLAIN_SECONDS."""
        rate = f'{tokens_per_second:,.0f} tokens/s' if tokens_per_second else 'compiled'
        if self._live:
            self._live.update(self._task, completed=step, description=f'loss {loss:.3f}, {rate}')
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or step == steps:
            self._last_line = time.monotonic()
            left = f', {duration(seconds_left)} left' if seconds_left else ''
            print(f'step {step}/{steps}: loss {loss:.3f}, {rate}{left}', flush=True)

    def flush(self) -> None:
        """Writes out all buffers: the files hold everything reported so far when this returns."""
        for file in (self._metrics, self._samples, self._events):
            file.flush()

    def _event(self, **fields) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
