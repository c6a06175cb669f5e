"""How far long work has come: on stderr, with its speed and the time left."""

import sys
import threading
import time
from collections.abc import Callable

LINE_SECONDS = 0.5  # between updates of a line on a terminal
LOG_SECONDS = 5  # between lines in a log; later, a tenth of the time that has passed
TICK_SECONDS = 1  # between looks at work that reports nothing


class Progress:
    """Reports `WHAT 12.3 of 45.6 MB, 7.8 MB/s, 4 s left` as work is done. A context manager.

    A terminal shows one line, which is cleared at the end. Elsewhere a line is printed now and
    then. `total` and the work done are in `unit` / `scale`. Without a total, the line is
    `WHAT, 7 s`. With `write`, lines go to that function instead of stderr, every `every` seconds if
    it is given. In the context, time is reported also while no work is done: before the first
    batch, for instance, a program is compiled.
    """

    silent = False  # set in a process that leaves all reports to another one

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = 'MB',
        scale: float = 1e6,
        write: Callable[[str], None] | None = None,
        every: float | None = None,
    ):
        self.what, self.total, self.done = what, total, 0
        self.unit, self.scale, self.write, self.every = unit, scale, write, every
        self.began = self.reported = time.monotonic()
        self.on_terminal = not write and sys.stderr is not None and sys.stderr.isatty()
        self.lock, self.ended = threading.Lock(), threading.Event()

    def add(self, amount: int) -> None:
        """Counts work done, and reports if it is time."""
        self.done += amount
        self._look()

    def _look(self) -> None:
        with self.lock:
            now = time.monotonic()
            passed = now - self.began
            wait = LINE_SECONDS if self.on_terminal else max(LOG_SECONDS, passed / 10)
            if now - self.reported >= (self.every or wait) and not self.ended.is_set():
                self.reported = now
                self._report(passed)

    def _report(self, passed: float) -> None:
        if self.silent:
            return
        line = f'{self.what}, {passed:.0f} s'
        if self.total is not None:
            speed = self.done / passed
            digits = 1 if self.scale > 1 else 0
            done, total, rate = (
                f'{amount / self.scale:,.{digits}f}' for amount in (self.done, self.total, speed)
            )
            line = f'{self.what} {done} of {total} {self.unit}'
            if self.done:
                left = _duration(max(0, self.total - self.done) / speed)
                line += f', {rate} {self.unit}/s, {left} left'
            else:
                line += f', {passed:.0f} s'
        if self.write:
            self.write(line)
        elif self.on_terminal:
            print(f'\r\x1b[K{line}', end='', file=sys.stderr, flush=True)
        elif sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self.ended.wait(TICK_SECONDS):
            self._look()

    def __enter__(self) -> 'Progress':
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        with self.lock:  # the last report is over
            if self.on_terminal and not self.silent:
                print('\r\x1b[K', end='', file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'
