"""Kills runs with SIGKILL repeatedly; each must end bit-equal to an uninterrupted run.

    python tests/kill_runs.py --runs=20
    python tests/kill_runs.py --runs=20 --jobs=10       # ten at a time, on many cores

Half of the kills come at a random moment, half of them while a checkpoint is being saved. The exit
code is 1 if any run differs in its parameters, optimizer state, metrics, probes, samples, summary
or TensorBoard events.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import runs

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300  # for one start of a run
SETTINGS = runs.SETTINGS | {'train.probe': 20}


def start(
    workdir: Path, text: Path, cache: Path, settings=SETTINGS, terminal: int | None = None
) -> subprocess.Popen:
    """Starts the run as a user would, in a terminal if one is given by its file descriptor.

    The compilation cache only saves time.
    """
    config = text.with_name('defaults.py')
    if not config.exists():  # written while another run reads it, it would be empty
        config.write_text('from gpt2_jax.config import default_config as get_config\n')
    command = [
        sys.executable,
        ROOT / 'scripts/train.py',
        f'--config={config}',
        f'--workdir={workdir}',
        '--platform=cpu',
        f'--config.data.corpus={text}',
        *(f'--config.{key}={value}' for key, value in settings.items()),
    ]
    env = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    if terminal is not None:
        # The new process takes the terminal itself: JAX warns of work between a fork and an exec.
        take = (
            'import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); '
            'signal.signal(signal.SIGHUP, signal.SIG_DFL); '  # nohup pytest ignores it
            'os.execv(sys.executable, sys.argv[1:])'
        )
        streams = {'stdin': terminal, 'stdout': terminal, 'stderr': terminal}
        command = [sys.executable, '-c', take, *command]
        return subprocess.Popen(command, env=env, **streams, start_new_session=True)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """The checkpoints whose save is in progress or was cut short: name and inode."""
    folder = workdir / 'checkpoints'
    return {
        (entry.name, entry.inode())
        for entry in (os.scandir(folder) if folder.is_dir() else [])
        if re.fullmatch(r'\d+(\.orbax-checkpoint-tmp.*)?', entry.name)
        and not os.path.exists(os.path.join(entry.path, 'SHA256SUMS'))
    }


def kill(
    process: subprocess.Popen,
    workdir: Path,
    draw: random.Random,
    *,
    in_save: bool,
    seconds: float = 0,
    delay: float = 0.05,
) -> str | None:
    """Kills the run in one of its next saves, or at a random moment.

    Returns the moment in words, or None if the run ended before.
    """
    began, seen = time.monotonic(), unfinished(workdir)
    before = set(seen)
    if not in_save:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds))
    else:
        saves = draw.randint(1, 5)
        while process.poll() is None and saves:
            time.sleep(0.001)
            new = unfinished(workdir) - seen
            saves, seen = saves - bool(new), seen | new
        time.sleep(draw.uniform(0, delay))
    if process.poll() is not None:
        return None
    process.kill()
    process.communicate()
    left = ', '.join(
        name.replace('.orbax-checkpoint-tmp', '.tmp') for name, _ in unfinished(workdir) - before
    )
    return f'{time.monotonic() - began:.2f} s' + (f' (in the save of {left})' if left else '')


def finish(process: subprocess.Popen) -> str:
    """Waits until the run ends by itself; returns its output."""
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode:
        raise RuntimeError(f'a run ended with {process.returncode}:\n{output}')
    return output


def kill_and_finish(
    workdir: Path, text: Path, cache: Path, draw: random.Random, kills: int, seconds: float
) -> tuple[list[str], str]:
    """Kills a run up to `kills` times, then lets it end; returns the moments and its last output.

    `seconds` is how long an uninterrupted run takes.
    """
    moments = []
    while len(moments) < kills:
        began = time.monotonic()
        process = start(workdir, text, cache)
        in_save = draw.random() < 0.5
        when = kill(process, workdir, draw, in_save=in_save, seconds=seconds)
        if when:
            moments.append(when)
        elif moments:
            break
        else:  # the machine became faster: run again, since every run must be killed
            seconds = min(seconds, time.monotonic() - began)
            shutil.rmtree(workdir)
    return moments, finish(start(workdir, text, cache))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', type=int, default=20, help='how many runs to kill')
    parser.add_argument(
        '--kills', type=int, default=4, help='how often each is killed before it may finish'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--jobs', type=int, default=1, help='how many runs at a time')
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='kill_runs.'))
    text, cache, reference = (
        runs.write_text(folder / 'text.txt'),
        folder / 'cache',
        folder / 'reference',
    )
    finish(start(folder / 'warm', text, cache))
    began = time.monotonic()
    finish(start(reference, text, cache))
    seconds = time.monotonic() - began
    print(f'uninterrupted: {SETTINGS["train.steps"]} steps in {seconds:.1f} s', flush=True)
    bad = kills = in_saves = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = {}
        for number in range(1, args.runs + 1):
            draw = random.Random(f'{args.seed} {number}')
            workdir = folder / f'run_{number}'
            result = pool.submit(kill_and_finish, workdir, text, cache, draw, args.kills, seconds)
            results[result] = workdir
        for result in as_completed(results):
            workdir, (moments, output) = results[result], result.result()
            kills, in_saves = kills + len(moments), in_saves + sum('save' in w for w in moments)
            wrong = runs.differences(workdir, reference)
            bad += bool(wrong)
            last = re.search(r'resuming from checkpoint (\d+)|is (finished)', output)
            print(
                f'{workdir.name}: killed after {", ".join(moments)}; last start from '
                f'{last[1] or last[2] if last else 0}: {"; ".join(wrong) or "identical"}',
                flush=True,
            )
    print(
        f'{args.runs - bad} of {args.runs} runs are bit-equal to the uninterrupted run, after '
        f'{kills} kills, {in_saves} of them in a save'
    )
    if bad:
        print(f'kept for inspection: {folder}')
    else:
        shutil.rmtree(folder)
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
