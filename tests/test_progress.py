"""Progress: one line on a terminal, lines now and then elsewhere, with speed and time left."""

import io
import sys

import pytest

from gpt2_jax import progress
from gpt2_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def test_lines_in_a_log(clock, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with Progress('read', 40_000_000) as work:
        for _ in range(8):
            clock[0] += 2
            work.add(5_000_000)
    assert sys.stderr.getvalue() == (
        'read 15.0 of 40.0 MB, 2.5 MB/s, 10 s left\nread 30.0 of 40.0 MB, 2.5 MB/s, 4 s left\n'
    )


def test_lines_get_rarer(clock, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with Progress('read', 10**12) as work:
        for _ in range(3600):
            clock[0] += 1
            work.add(1000)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[0] == 'read 0.0 of 1000000.0 MB, 0.0 MB/s, 277777.8 h left'
    assert 40 < len(lines) < 60


def test_one_line_on_a_terminal(clock, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with Progress('read', 200_000_000) as work:
        for _ in range(3):
            clock[0] += 0.4
            work.add(400_000)
    assert sys.stderr.getvalue() == '\r\x1b[Kread 0.8 of 200.0 MB, 1.0 MB/s, 3 min left\r\x1b[K'


def test_without_a_standard_error(clock, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', None)
    with Progress('read', 1) as work:
        clock[0] += 100
        work.add(1)
