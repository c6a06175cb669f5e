"""How far long work has come: on stderr, with its speed and the time left."""

import sys
import time

LINE_SECONDS = 0.5  # between updates of a line on a terminal
LOG_SECONDS = 5  # between lines in a log; later, a tenth of the time that has passed


class Progress:
    """Reports `WHAT 12.3 of 45.6 MB, 7.8 MB/s, 4 s left` while bytes are added. A context manager.

    A terminal shows one line, cleared at the end. Elsewhere a line is printed now and then.
    """

    def __init__(self, what: str, n_bytes: int):
        self.what, self.n_bytes, self.done = what, n_bytes, 0
        self.began = self.reported = time.monotonic()
        self.on_terminal = sys.stderr is not None and sys.stderr.isatty()

    def add(self, n_bytes: int) -> None:
        """Counts bytes, and reports if it is time."""
        self.done += n_bytes
        now = time.monotonic()
        passed = now - self.began
        wait = LINE_SECONDS if self.on_terminal else max(LOG_SECONDS, passed / 10)
        if now - self.reported >= wait and sys.stderr is not None:
            self.reported, speed = now, self.done / passed
            left = max(0, self.n_bytes - self.done) / speed if speed else 0
            line = (
                f'{self.what} {self.done / 1e6:.1f} of {self.n_bytes / 1e6:.1f} MB, '
                f'{speed / 1e6:.1f} MB/s, {_duration(left)} left'
            )
            end = '' if self.on_terminal else '\n'
            print(
                f'\r\x1b[K{line}' if self.on_terminal else line,
                end=end,
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_) -> None:
        if self.on_terminal:
            print('\r\x1b[K', end='', file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'
