"""Progress: one line on a terminal, lines now and then elsewhere, with speed and time left."""

import io
import sys
import threading

import pytest

from gpt2_jax import progress
from gpt2_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def every_five_seconds(machine_of_any_speed, monkeypatch):
    monkeypatch.setattr(progress, 'LOG_SECONDS', 5)


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
    assert lines[0] == 'read 0.0 of 1,000,000.0 MB, 0.0 MB/s, 277777.8 h left'
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


@pytest.mark.parametrize('terminal', [True, False])
def test_time_passes_while_no_work_is_done(terminal, clock, monkeypatch):
    """As while a program is compiled."""
    monkeypatch.setattr(progress, 'TICK_SECONDS', 0.001)
    stream, written = (Terminal if terminal else io.StringIO)(), threading.Event()
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setattr(
        stream, 'write', lambda text: (io.StringIO.write(stream, text), written.set())
    )
    for total, line in ((None, 'compiling, 6 s'), (9000, 'compiling 0 of 9,000 tokens, 6 s')):
        written.clear()
        with Progress('compiling', total, 'tokens', 1):
            clock[0] += 6
            assert written.wait(20)
        shown = stream.getvalue()
        assert shown.count(line) == 1
        assert shown.endswith('\r\x1b[K' if terminal else '\n')


def test_lines_for_another_writer(clock):
    lines = []
    report = Progress('evaluated', 900, 'tokens', 1, lines.append, every=2)
    for _ in range(4):
        clock[0] += 1
        report.add(100)
    assert lines == [
        'evaluated 200 of 900 tokens, 100 tokens/s, 7 s left',
        'evaluated 400 of 900 tokens, 100 tokens/s, 5 s left',
    ]
