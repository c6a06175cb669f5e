"""A run of several processes: how they join, agree, and end together if one of them dies.

Every process runs the same program on its own devices, and the collectives of jitted functions
connect them. Process 0 alone writes to the run's folder and to the console. JAX's coordination
service, which runs in process 0, knows which processes are alive. With a single process nothing
here does anything.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # for what jax.distributed does not offer
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.progress import Progress

# A process without a sign of life for this long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 600  # for all processes to start: Kubernetes may wait 300 s before a restart
SAME_ERROR_SECONDS = 2  # within which all processes find the same error
BARRIER_SECONDS = 24 * 3600  # a process that died ends the wait long before
AGREE_SECONDS = 1  # between comparisons of the signals that arrived, about
ANSWER_SECONDS = 1  # for JAX's service to answer, if it is not the cause of an abort
MAX_CALLS = 100  # until the next comparison: an update may be followed by slow batches to evaluate
AUTO = 'auto'  # as --coordinator: JAX finds the address, the number and the id by itself

# What the error of a collective says if a process at the other end is gone.
LOST = 'Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Cc]oordination|[Hh]eartbeat|[Bb]arrier'


class LostProcess(UserError):
    """Another process of the run has ended, so that this one cannot continue."""


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Joins this process to the others of its run, if there are any, and leaves at the end.

    `coordinator` is HOST:PORT of process 0, and then `num_processes` and `process_id` are needed
    too. 'auto': JAX finds all three. None: the same if a launcher that JAX knows started more than
    one process, else a run of one process. Call it before JAX is used. Raises UsageError for
    flags that do not go together, and UserError if the processes do not find each other.
    """
    options = _options(coordinator, num_processes, process_id)
    if options is None:
        yield
        return
    # JAX's own service waits for SIGTERM alone: training/loop.py waits for all signals.
    jax.config.update('jax_enable_preemption_service', False)
    _end_instead_of_abort()
    try:
        with Progress('waiting for the other processes'):
            jax.distributed.initialize(
                **options,
                initialization_timeout=JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = ' '.join(str(error).split())[:500]
        if 'bad_cast' in reason:  # see _end_instead_of_abort
            reason = f'not all came within {JOIN_SECONDS} s, or their flags differ'
        raise UserError(
            f'this process could not join the others of its run: {reason}; check --coordinator, '
            '--num_processes and --process_id, or the launcher'
        ) from None
    try:
        yield
    except LostProcess:
        raise
    except UserError:
        # If all have the error, each reports it; else the others end because this process does.
        with contextlib.suppress(RuntimeError):
            barrier('all have an error', SAME_ERROR_SECONDS)
            jax.distributed.shutdown()
        raise
    try:
        if several():
            barrier('the end')  # shutdown waits only HEARTBEAT_SECONDS for a process that is slower
        jax.distributed.shutdown()
    except RuntimeError:
        raise _lost('it did not come to the end') from None


def _options(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize; None for a run of one process."""
    numbers = {'--num_processes': num_processes, '--process_id': process_id}
    given = [name for name, value in numbers.items() if value is not None]
    if coordinator in (None, AUTO):
        if given:
            raise UsageError(f'{given[0]} needs --coordinator=HOST:PORT, the address of process 0')
        return {} if coordinator == AUTO or _launched() else None
    if missing := [name for name in numbers if name not in given]:
        raise UsageError(f'--coordinator={coordinator} needs {" and ".join(missing)} too')
    if not re.fullmatch(r'\S+:\d+', coordinator):
        raise UsageError(f'--coordinator={coordinator}: expected HOST:PORT, or {AUTO}')
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f'--process_id={process_id} with --num_processes={num_processes}: expected one of '
            f'0 .. {num_processes - 1}'
        )
    return {
        'coordinator_address': coordinator,
        'num_processes': num_processes,
        'process_id': process_id,
        'cluster_detection_method': 'deactivate',
    }


def _launched() -> bool:
    """Whether a launcher that JAX knows started this process as one of several."""
    env = os.environ
    if 'SLURM_STEP_NODELIST' in env:  # by srun
        return int(env.get('SLURM_NTASKS', 1)) > 1
    if 'OMPI_COMM_WORLD_SIZE' in env:  # by mpirun of Open MPI
        return int(env['OMPI_COMM_WORLD_SIZE']) > 1
    if 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env:
        # JAX asks the cluster by this package. Without it, pod 0 may be the only one.
        package = importlib.util.find_spec('kubernetes')
        return package is not None or env['JOB_COMPLETION_INDEX'] != '0'
    return ',' in env.get('TPU_WORKER_HOSTNAMES', '')


@functools.cache  # once in a process
def _end_instead_of_abort() -> None:
    """Makes this process end with one line if JAX's service misses another process.

    By default JAX prints a stack trace and aborts. With a callback it only throws std::bad_cast: it
    cannot call Python, which has no type for a C++ status. In a call from Python this becomes a
    RuntimeError. In a thread of JAX it is an abort, and the handler of SIGABRT runs in that thread,
    even while the main thread waits for a collective that will never end.
    """
    distributed._jax.get_distributed_runtime_client = functools.partial(
        distributed._jax.get_distributed_runtime_client, missed_heartbeat_callback=_end
    )
    _handle_abort.before = _set_abort_handler(_handle_abort)


def _set_abort_handler(handler: Any) -> int | None:
    """Sets the handler of SIGABRT, and returns the address of the one before; None: the default.

    In C, because Python runs a handler of its own in the main thread only.
    """
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return set_handler(signal.SIGABRT, handler)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handle_abort(_number: int) -> None:
    """Ends this process; by an abort only if JAX's service answers and so is not the cause.

    While it waits, the main thread may report the error of a collective. The handler that was there
    before runs at an abort, such as faulthandler's, which prints where it happened.
    """
    client, answered = distributed.global_state.client, threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            if client:  # else the run is over
                client.key_value_set('gpt2_jax: an answer', '', allow_overwrite=True)
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(ANSWER_SECONDS):
        _end()
    _set_abort_handler(_handle_abort.before)
    signal.raise_signal(signal.SIGABRT)  # arrives when this handler has returned


def _end(_status: Any = None) -> NoReturn:
    """Reports that another process is lost and ends this one, in any thread."""
    error = _lost("JAX's coordination service misses it")
    with contextlib.suppress(OSError):
        os.write(2, f'error: {error}\n'.encode())  # no lock, which another thread might hold
    os._exit(error.exit_code)


def _lost(reason: str) -> LostProcess:
    """The error of this process if another one is gone."""
    index, count = distributed.global_state.process_id, distributed.global_state.num_processes
    other = f'process {1 - index}' if count == 2 else 'another one'
    return LostProcess(
        f'process {index} of {count} lost {other}, whose own output says why it ended ({reason}); '
        'the same command resumes from the latest checkpoint'
    )


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the run's folder and speaks on the console."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Only process 0 prints inside; errors of the others appear as ever."""
    if is_first():
        yield
        return
    Progress.silent = True
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits until all processes are here; no two calls may have the same name.

    It occupies no device, and may be called in a thread. Raises JaxRuntimeError after `seconds`.
    """
    wait = multihost.get_barrier_sync_fn()
    wait(key=f'gpt2_jax: {name}', timeout_ms=seconds * 1000)


def differing(values: dict[str, Any]) -> list[str]:
    """The names whose values are not equal in all processes; each gives them in the same order."""
    if not several():
        return []
    codes = np.array([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
    codes_PN = multihost_utils.process_allgather(codes)
    same = (codes_PN == codes_PN[0]).all(0)
    return [name for name, equal in zip(values, same, strict=True) if not equal]


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turns the error of a collective into LostProcess if another process is gone."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # of JAX, or of Orbax around it
        if not several() or not re.search(LOST, str(error)):
            raise
        reason = ' '.join(str(error).split())[:300]
        raise _lost(reason) from None


class Agreement:
    """Makes all processes of a run learn at the same point of a signal that reached one of them.

    Every process calls it at the same points. About once in AGREE_SECONDS the call is a collective,
    for which the host waits until its devices have done all updates dispatched so far; the
    other calls only count. The interval, in calls, is agreed on in the same collective.
    """

    def __init__(self):
        self.agreed: signal.Signals | None = None
        self._calls, self._interval, self._began = 0, 1, time.monotonic()

    def __call__(self, arrived: signal.Signals | None) -> signal.Signals | None:
        """The signal that all processes know of. A single process knows its own at once."""
        if not several():
            return arrived
        self._calls += 1
        if self._calls < self._interval or self.agreed:
            return self.agreed
        seconds = (time.monotonic() - self._began) / self._calls
        everyone_P2 = multihost_utils.process_allgather(np.float32([arrived or 0, seconds]))
        number, slowest = everyone_P2.max(0)
        if number:
            self.agreed = signal.Signals(int(number))
        # At most twice as many calls as before: calls differ, the first ones compile.
        most = min(2 * self._calls, MAX_CALLS)
        self._interval = int(np.clip(AGREE_SECONDS / slowest, 1, most))
        self._calls, self._began = 0, time.monotonic()
        return self.agreed
