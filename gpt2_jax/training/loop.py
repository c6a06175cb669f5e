"""The training loop: an update, the meter, the hooks.

A hook does something now and then: evaluating, sampling and saving are the first three (hooks.py).
Checkpoint S means exactly S updates: the batch and the dropout masks of an update are functions of
its number, so a resumed run computes what the run would have computed.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from gpt2_jax import signals
from gpt2_jax.parallel.feed import Batch
from gpt2_jax.parallel.hosts import Agreement
from gpt2_jax.training.meter import Meter
from gpt2_jax.training.step import TrainState


class Hook(Protocol):
    """Something done after some of the updates."""

    def due(self, step: int) -> bool:
        """Whether to call the hook now that `step` updates are done."""

    def __call__(self, step: int, state: TrainState) -> None:
        """Sees the state after `step` updates. The next update overwrites it: copy what to keep."""


def run(
    train_step: Callable,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    start: int,
    meter: Meter,
    hooks: Sequence[Hook],
    interrupt: 'Interrupt',
) -> int:
    """Updates the state with each batch, from step `start` on; returns how many updates are done.

    An interrupt ends the loop after the hooks of the step at which it is seen.
    """
    step = start
    with quick_collections():
        for step, batch in enumerate(batches, start + 1):
            state, metrics = train_step(state, batch)
            meter.add(step, metrics)
            interrupt.poll()  # once, so that all of this iteration agrees
            for hook in hooks:
                if hook.due(step):
                    with meter.paused(step):
                        hook(step, state)
            if interrupt.seen:
                break
    return step


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Python's garbage collector skips objects that exist already: mostly modules and traces.

    The loop waits for every collection, and saving a checkpoint makes enough objects to cause a
    full one. A full collection takes 0.1 to 0.2 s without this, and 0.02 s with it (H100, 16
    cores).
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Interrupt:
    """The first signal that asks the run to end, so that the loop can save and leave.

    In a run of several processes, all see a signal that reached one of them, at the same step.
    """

    def __init__(self):
        self.arrived: signal.Signals | None = None
        self.seen: signal.Signals | None = None
        self._agree = Agreement()

    def poll(self) -> signal.Signals | None:
        """Looks for a signal; until the next poll `seen` stays what it is now."""
        self.seen = self._agree(self.arrived)
        return self.seen

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived. For long work that a resumed run repeats."""
        if self._agree(self.arrived):
            raise Interrupted


class Interrupted(Exception):
    """A signal stopped work that has changed nothing yet."""


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Notes the first of signals.SIGNALS that arrives, and says so; a second ends the process."""
    interrupt, terminals = Interrupt(), [fd for fd in (1, 2) if os.isatty(fd)]

    def note(number, frame):
        interrupt.arrived = signal.Signals(number)
        signals.restore(before)
        if number == signal.SIGXCPU:  # it comes again every second
            signal.signal(number, signal.SIG_IGN)
        if number == signal.SIGHUP:  # the terminal is gone: writing to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in terminals:
                os.dup2(nowhere, fd)
        line = f'\n{interrupt.arrived.name}: saving a checkpoint; a second one ends without it\n'
        if sys.stderr is not None:
            # Not print: the signal may have come inside a write to the same stream.
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), line.encode())

    before = signals.handle(note)
    try:
        yield interrupt
    finally:
        signals.restore(before)
