"""What a run reports: the console, metrics.jsonl, samples.txt and TensorBoard events."""

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rich import progress as rich_progress
from tensorboard.compat.proto.event_pb2 import Event

# Not a SummaryWriter of any library: these load TensorFlow or torch, if it is installed, which
# takes seconds.
from tensorboard.summary.writer.record_writer import RecordWriter

from gpt2_jax import files
from gpt2_jax.progress import Progress
from gpt2_jax.terminal import printable, put
from gpt2_jax.workdir import events

PLAIN_SECONDS = 5  # between progress lines if the output is not a terminal, to keep a log short
LIVE_SECONDS = 0.5  # between changes of the live line while a run evaluates


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '2 h 5 min'."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f'{int(hours)} h {int(minutes % 60)} min'
    return f'{int(minutes)} min {int(seconds % 60)} s' if minutes >= 1 else f'{seconds:.0f} s'


class GrowingFile:
    """A binary file that only grows, and that is written again if another program removes it."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, 'a+b')  # noqa: SIM115 (closed by `close`)
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> None:
        """Appends to the file, or to its buffer."""
        self._file.write(data)
        self._size += len(data)

    def flush(self) -> None:
        """Writes out the buffer."""
        self._file.flush()

    def close(self) -> None:
        """Writes out the buffer and closes the file."""
        self._file.close()

    def mend(self) -> str | None:
        """Writes the file again if it was removed; returns one line if it was changed.

        Call it after `flush`.
        """
        size = os.fstat(self._file.fileno()).st_size
        lost, self._size = self._size - size, size
        if lost > 0:
            return f'{self._path} was cut short by another program: {lost:,} bytes are lost'
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                return None
        self._path.parent.mkdir(exist_ok=True)
        self._file.seek(0)  # the removed file exists as long as it is open
        with files.new_file(self._path) as copy:
            shutil.copyfileobj(self._file, copy)
        self._file.close()
        self._file = open(self._path, 'a+b')  # noqa: SIM115
        return f'{self._path} was removed by another program: it is written again, complete'


class Logger:
    """Everything a run writes while it trains. Use as a context manager.

    `settings` are the settings of the run, by name; TensorBoard gets them once, when the run
    begins. Without `writes` no file is written: only one of several processes writes.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        steps: int,
        settings: dict[str, Any],
        writes: bool = True,
    ):
        name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.from_{start}'
        paths = [folder / 'metrics.jsonl', folder / 'samples.txt', folder / 'tensorboard' / name]
        begins = not any(folder.glob('tensorboard/events.out.tfevents.*'))
        if writes:
            (folder / 'tensorboard').mkdir(exist_ok=True)
        else:
            paths = [Path(os.devnull)] * len(paths)
        self._folder, self._folder_stat, self._writes = folder, os.stat(folder), writes
        self._files = [GrowingFile(path) for path in paths]
        self._metrics, self._samples, event_file = self._files
        self._events = RecordWriter(event_file)
        self._event(file_version='brain.Event:2')
        if begins:
            self._event(step=start, summary=events.settings(settings))
            self._event(step=start, summary=events.loss_chart())
        self._last_line = 0.0
        self._live = None
        if sys.stdout and sys.stdout.isatty():
            self._live = rich_progress.Progress(
                rich_progress.TextColumn('step {task.completed}/{task.total}'),
                rich_progress.BarColumn(),
                rich_progress.TextColumn('{task.description}'),
                rich_progress.TimeElapsedColumn(),
                transient=True,
            )
            self._task = self._live.add_task('', total=steps, completed=start)
            self._live.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            self.flush()
        finally:
            if self._live:
                self._live.stop()
            with contextlib.ExitStack() as stack:  # closes all of them, also after an error
                for file in self._files:
                    stack.callback(file.close)

    def say(self, text: str) -> None:
        """Prints a message on the console, above the progress line if there is one."""
        text = printable(text, sys.stdout)
        if self._live:
            self._live.console.print(
                text, markup=False, emoji=False, highlight=False, soft_wrap=True
            )
        else:
            put(text)

    def work(self, text: str) -> None:
        """Says what the run is busy with: in the live line, or in a line of its own."""
        if self._live:
            self._live.update(self._task, description=text)
        else:
            put(text)

    def working(self, what: str, total: int, unit: str) -> Progress:
        """The progress of work beside training, reported by `work`."""
        every = LIVE_SECONDS if self._live else None
        return Progress(what, total, unit, 1, self.work, every)

    def record(self, step: int, split: str, values: dict[str, float | None]) -> None:
        """Writes a line of metrics.jsonl, and its figures as TensorBoard events.

        None stands for an unknown figure. Raises ValueError for a figure that is not finite.
        """
        record = {'step': step, 'split': split, **values}
        self._metrics.write((json.dumps(record, allow_nan=False) + '\n').encode())
        self._metrics.flush()
        self.figures(step, split, values)

    def figures(self, step: int, split: str, values: dict[str, float | None]) -> None:
        """Writes figures as TensorBoard events alone."""
        self._event(step=step, summary=events.figures(split, values))

    def sample(self, step: int, text: str) -> None:
        """Writes a sampled text to samples.txt, to TensorBoard and to the console."""
        self._samples.write(f'=== step {step} ===\n{text}\n\n'.encode())
        self._samples.flush()
        self._event(step=step, summary=events.text('sample', text))
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
        left = f', {duration(seconds_left)} left' if seconds_left else ''
        line = f'loss {loss:.3f}, {rate}{left}'
        if self._live:
            self._live.update(self._task, completed=step, description=line)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or step == steps:
            self._last_line = time.monotonic()
            put(f'step {step}/{steps}: {line}')

    def flush(self) -> None:
        """Writes out all buffers: the files hold everything reported so far when this returns.

        A file that another program removed is written again; says so.
        """
        for file in self._files:
            file.flush()
        if not self._writes:
            return
        try:
            moved = not os.path.samestat(os.stat(self._folder), self._folder_stat)
        except FileNotFoundError:
            moved = True
        if not moved:  # else the files are where the folder is now
            for report in filter(None, (file.mend() for file in self._files)):
                self.say(report)

    def _event(self, **fields) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
