"""How far long work has come: on stderr, with its speed and the time left."""

import sys
import time
from collections.abc import Callable

LINE_SECONDS = 0.5  # between updates of a line on a terminal
LOG_SECONDS = 5  # between lines in a log; later, a tenth of the time that has passed


class Progress:
    """Reports `WHAT 12.3 of 45.6 MB, 7.8 MB/s, 4 s left` as work is done. A context manager.

    A terminal shows one line, which is cleared at the end. Elsewhere a line is printed now and
    then. `total` and the work done are in `unit` / `scale`. With `write`, lines go to that
    function instead of stderr.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = 'MB',
        scale: float = 1e6,
        write: Callable[[str], None] | None = None,
    ):
        self.what, self.total, self.done = what, total, 0
        self.unit, self.scale, self.write = unit, scale, write
        self.began = self.reported = time.monotonic()
        self.on_terminal = not write and sys.stderr is not None and sys.stderr.isatty()

    def add(self, amount: int) -> None:
        """Counts work done, and reports if it is time."""
        self.done += amount
        now = time.monotonic()
        passed = now - self.began
        wait = LINE_SECONDS if self.on_terminal else max(LOG_SECONDS, passed / 10)
        if now - self.reported >= wait:
            self.reported = now
            self._report(self.done / passed)

    def _report(self, speed: float) -> None:
        left = max(0, self.total - self.done) / speed if speed else 0
        digits = 1 if self.scale > 1 else 0
        done, total, rate = (
            f'{amount / self.scale:,.{digits}f}' for amount in (self.done, self.total, speed)
        )
        line = f'{self.what} {done} of {total} {self.unit}, {rate} {self.unit}/s, '
        line += f'{_duration(left)} left'
        if self.write:
            self.write(line)
        elif self.on_terminal:
            print(f'\r\x1b[K{line}', end='', file=sys.stderr, flush=True)
        elif sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_) -> None:
        if self.on_terminal:
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'
