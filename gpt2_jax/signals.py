"""The signals that ask a process to end."""

import signal
import threading
from typing import Any

# Ctrl-C, kill, a closed terminal, what Slurm, LSF and Grid Engine send before a time limit (SIGUSR1
# and SIGUSR2), and a limit of CPU seconds.
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
Handlers = dict[signal.Signals, Any]


def handle(handler) -> Handlers:
    """Sets the handler of SIGNALS; returns the handlers before, for `restore`.

    Under nohup SIGHUP stays ignored. Python sets handlers in the main thread only: in another one
    nothing is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in numbers}


def restore(before: Handlers) -> None:
    """Sets the handlers that `handle` replaced."""
    for number, handler in before.items():
        signal.signal(number, handler)
