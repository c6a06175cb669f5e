"""Starts a program in several processes at once, which share one import of all libraries.

    with Starter(folder) as starter:
        group = starter.start([['--config=..', '--process_id=0'], ['--config=..', ..]])
        os.kill(group.pids[1], signal.SIGKILL)
        group.wait()

Run as a program it is the starter: it reads one list of command lines at a time, as JSON, starts a
fork of itself for each, and answers with their ids and, once they have ended, their exit codes.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / 'scripts' / 'train.py'


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def as_processes(arguments: list[str], n: int) -> list[list[str]]:
    """The command lines of a run of n processes on this machine; of one process, as it is."""
    if n == 1:
        return [arguments]
    shared = [*arguments, f'--coordinator=127.0.0.1:{free_port()}', f'--num_processes={n}']
    return [[*shared, f'--process_id={i}'] for i in range(n)]


class Group:
    """Processes that were started together."""

    def __init__(self, starter: subprocess.Popen, pids: list[int], outputs: list[Path]):
        self.pids, self._starter, self._outputs = pids, starter, outputs

    def output(self, index: int) -> str:
        """What a process has printed so far, stdout and stderr together."""
        return self._outputs[index].read_text('utf-8', 'replace')

    def wait_for(self, text: str, index: int = 0, seconds: float = 120) -> None:
        """Waits until a process has printed a text."""
        end = time.monotonic() + seconds
        while text not in self.output(index):
            assert time.monotonic() < end, self.output(index)
            time.sleep(0.01)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes, minus the number of the signal for a process that was killed.

        Kills the processes, and fails, if they take longer.
        """
        if not select.select([self._starter.stdout], [], [], seconds)[0]:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            outputs = '\n'.join(map(self.output, range(len(self.pids))))
            raise AssertionError(f'still running after {seconds} s:\n{outputs}')
        return json.loads(self._starter.stdout.readline())


class Starter:
    """Starts groups of processes, one after another. Use as a context manager."""

    def __init__(self, folder: Path, **env: str):
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def start(self, commands: list[list[str]], program: Path = TRAIN) -> Group:
        """Starts the program with each list of arguments."""
        self._count += 1
        outputs = [self._folder / f'output.{self._count}.{i}' for i in range(len(commands))]
        for output in outputs:
            output.touch()
        self._process.stdin.write(
            json.dumps([str(program), commands, list(map(str, outputs))]) + '\n'
        )
        self._process.stdin.flush()
        return Group(self._process, json.loads(self._process.stdout.readline()), outputs)


def run(program: str, arguments: list[str], output: str) -> None:
    """In a fork: runs the program as a user would, and ends."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [program, *arguments]
    code = 1
    try:
        runpy.run_path(program, run_name='__main__')
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # As the end of a process does, without what belongs to the starter.
    os._exit(code or 0)


def serve() -> None:
    """The starter."""
    import gpt2_jax.train  # noqa: F401 (for all forks)

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        program, commands, outputs = json.loads(line)
        pids = []
        for arguments, output in zip(commands, outputs, strict=True):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    run(program, arguments, output)
                os._exit(1)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == '__main__':
    serve()
