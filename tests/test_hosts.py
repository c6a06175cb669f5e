"""Several processes equal one: rows, saves, signals, and the death of a process."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import together

from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.parallel import hosts, mesh
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

STEPS, SAVE = 40, 10
SETTINGS = runs.SMALL | {
    'model.embd_pdrop': 0.1,
    'model.resid_pdrop': 0.0,
    'train.steps': STEPS,
    'train.grad_accum_steps': 1,
    'optim.learning_rate': 1e-3,
    'checkpoint.every': SAVE,
    'eval.every': STEPS,
    'eval.sample_tokens': 3,
    'log.every': 1,
}
END_SECONDS = 15  # within which the others end if one process dies

# As on a GPU whose collective waits for ever, the main thread is not the one to notice a loss.
WAIT = """
import faulthandler
import sys
import time

from gpt2_jax.parallel import hosts

faulthandler.enable()
with hosts.joined(sys.argv[1], 2, int(sys.argv[2])):
    print('joined', flush=True)
    time.sleep(60)
"""


# Process 1 comes to the end later than the service would wait for it.
LATE = """
import sys
import time

import jax

from gpt2_jax.parallel import hosts

with hosts.joined(sys.argv[1], 2, int(sys.argv[2])):
    jax.devices()  # as every run does; it takes all processes
    time.sleep((hosts.HEARTBEAT_SECONDS + 2) * int(sys.argv[2]))
sys.exit(0)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('hosts')
    runs.write_text(folder / 'text.txt', words=300)
    (folder / 'defaults.py').write_text(
        'from gpt2_jax.config import default_config as get_config\n'
    )
    return folder


@pytest.fixture(scope='module')
def starter(folder):
    """Starts processes with two simulated devices each."""
    with together.Starter(folder, JAX_NUM_CPU_DEVICES='2') as starter:
        yield starter


def arguments(folder: Path, run: str, **changes) -> list[str]:
    """A command line. No process holds a whole matrix: each has two of four shards."""
    settings = SETTINGS | {'data.corpus': folder / 'text.txt', 'mesh.fsdp': 4}
    settings |= {key.replace('__', '.'): value for key, value in changes.items()}
    return [
        f'--config={folder / "defaults.py"}',
        f'--workdir={folder / run}',
        '--platform=cpu',
        *(f'--config.{key}={value}' for key, value in settings.items()),
    ]


def wait_until(happened, group) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, group.output(0)
        time.sleep(0.01)


@pytest.fixture(scope='module')
def undisturbed(folder, starter) -> Path:
    """The run of two processes that nothing interrupts."""
    group = starter.start(together.as_processes(arguments(folder, 'undisturbed'), 2))
    assert group.wait() == [0, 0], group.output(0) + group.output(1)
    assert 'in 2 processes' in group.output(0)
    assert 'finished 40 steps' in group.output(0)
    assert 'step' not in group.output(1), 'one process speaks'
    return folder / 'undisturbed'


@pytest.mark.long
def test_all_processes_train_the_same_model_in_the_same_folder(folder, starter):
    """Else nothing is written, and each says what differs."""
    commands = together.as_processes(arguments(folder, 'here'), 2)
    commands[1] += [f'--workdir={folder / "there"}', '--config.optim.learning_rate=2e-3']
    group = starter.start(commands)
    assert group.wait() == [2, 2], group.output(0)
    for index, (name, rate) in enumerate((('here', 0.001), ('there', 0.002))):
        assert (
            'error: not the same in all processes of this run: '
            f'optim.learning_rate = {rate} in this process; the folder {folder / name}, which '
            'all must share\n'
        ) in group.output(index)
    assert not (folder / 'here' / 'config.json').exists()


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ((None, 2, None), '--num_processes needs --coordinator=HOST:PORT'),
        (('auto', None, 1), '--process_id needs --coordinator=HOST:PORT'),
        (('a:1', None, 0), '--coordinator=a:1 needs --num_processes too'),
        (('a:1', None, None), 'needs --num_processes and --process_id too'),
        (('a', 2, 0), '--coordinator=a: expected HOST:PORT, or auto'),
        (('a:1', 2, 2), '--process_id=2 with --num_processes=2: expected one of 0 .. 1'),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(UsageError, match=re.escape(words)), hosts.joined(*flags):
        pass


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '1'}
OPEN_MPI = {'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}
KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


@pytest.mark.parametrize(
    ('environment', 'joins'),
    [
        ({}, False),
        (SLURM | {'SLURM_NTASKS': '2'}, True),
        (SLURM | {'SLURM_NTASKS': '1'}, False),
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}, False),  # in a batch script, without srun
        (OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '4'}, True),
        (OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '1'}, False),
        (KUBERNETES, True),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ],
)
def test_launchers_are_recognised(environment, joins, monkeypatch):
    """JAX reads the address, the number and the id from the environment, if there are several."""
    for name in os.environ.keys() & {
        *(*SLURM, *OPEN_MPI, *KUBERNETES),
        *('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES'),
    }:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: name == 'kubernetes' or None)
    calls = []
    monkeypatch.setattr('jax.distributed.initialize', lambda **options: calls.append(options))
    monkeypatch.setattr(hosts, '_end_instead_of_abort', lambda: None)
    with preserved('jax_enable_preemption_service'), hosts.joined(None, None, None):
        pass
    assert len(calls) == joins
    assert 'coordinator_address' not in dict(*calls)


@contextlib.contextmanager
def preserved(setting: str):
    """Gives a setting of JAX its value back."""
    before = getattr(jax.config, setting)
    yield
    jax.config.update(setting, before)


@pytest.mark.parametrize(
    ('error', 'words'),
    [
        (ValueError('coordinator_address should be defined.'), 'coordinator_address should'),
        (RuntimeError('std::bad_cast'), 'not all came within 600 s, or their flags differ'),
    ],
)
def test_processes_that_cannot_join_say_so(error, words, monkeypatch):
    def fail(**options):
        raise error

    monkeypatch.setattr('jax.distributed.initialize', fail)
    monkeypatch.setattr(hosts, '_end_instead_of_abort', lambda: None)
    refused = pytest.raises(UserError, match=f'could not join the others of its run: {words}')
    with preserved('jax_enable_preemption_service'), refused, hosts.joined('auto', None, None):
        pass


def test_a_process_that_is_lost_at_the_end_is_reported(monkeypatch):
    def fail():
        raise RuntimeError('std::bad_cast')

    monkeypatch.setattr('jax.distributed.initialize', lambda **options: None)
    monkeypatch.setattr('jax.distributed.shutdown', fail)
    monkeypatch.setattr(hosts, '_end_instead_of_abort', lambda: None)
    monkeypatch.setattr(hosts.distributed.global_state, 'num_processes', 2)
    lost = pytest.raises(hosts.LostProcess, match='process 0 of 2 lost process 1, whose own')
    with preserved('jax_enable_preemption_service'), lost, hosts.joined('auto', None, None):
        pass


def test_a_mesh_has_all_devices_of_all_processes(monkeypatch):
    monkeypatch.setattr('jax.process_count', lambda: 2)
    monkeypatch.setattr('jax.devices', lambda: [None] * 4)
    with pytest.raises(UsageError, match=r'= 2, but the 2 processes have 4 devices: .*data=4'):
        mesh.make_mesh(data=2, fsdp=1, tensor=1)


def test_signals_are_compared_once_a_second(monkeypatch):
    """With calls 10 ms apart: after 1, 2, 4, .. more calls, and then after every 100."""
    clock, number, compared = [0.0], [0], []

    def allgather(mine):
        compared.append(clock[0])
        return np.stack([mine, np.float32([number[0], 0])])

    monkeypatch.setattr('jax.process_count', lambda: 2)
    monkeypatch.setattr('gpt2_jax.parallel.hosts.time.monotonic', lambda: clock[0])
    monkeypatch.setattr('jax.experimental.multihost_utils.process_allgather', allgather)
    agreement, seen = hosts.Agreement(), []
    for call in range(1, 600):
        clock[0] = call / 100
        number[0] = signal.SIGTERM if call >= 300 else 0  # of the other process
        seen.append(agreement(None))
    at = np.round(100 * np.array(compared)).astype(int)
    assert list(np.diff(at)[:6]) == [2, 4, 8, 16, 32, 64]
    assert 99 <= np.diff(at)[6] <= 100
    assert 300 <= at[-1] < 400, 'after an agreement nothing is compared'
    assert seen == [None] * (at[-1] - 1) + [signal.SIGTERM] * (600 - at[-1])


@pytest.mark.parametrize(
    ('victim', 'number'),
    [
        (0, signal.SIGABRT),  # an abort that is not about a lost process remains one
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.long),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.long),
    ],
)
def test_a_process_that_waits_for_a_lost_one_ends(folder, starter, victim, number):
    """The coordination service of JAX misses the lost process, and one line says so."""
    program = folder / 'wait.py'
    program.write_text(WAIT)
    address, other = f'127.0.0.1:{together.free_port()}', 1 - victim
    group = starter.start([[address, '0'], [address, '1']], program)
    for index in range(2):
        group.wait_for('joined', index)
    os.kill(group.pids[victim], number)
    lost = time.monotonic()
    line = f'error: process {other} of 2 lost process {victim}, whose own output says why it ended'
    group.wait_for(line, other)
    assert time.monotonic() - lost < END_SECONDS
    if number == signal.SIGSTOP:
        number = signal.SIGKILL
        os.kill(group.pids[victim], number)
    codes = group.wait(5)
    assert (codes[victim], codes[other]) == (-number, 1)
    assert group.output(other).count('error:') == 1
    assert 'stack trace' not in group.output(other)
    reported = 'Fatal Python error: Aborted' in group.output(victim)  # by faulthandler
    assert reported == (number == signal.SIGABRT)


@pytest.mark.long
def test_the_end_waits_for_a_slower_process(folder, starter):
    program = folder / 'late.py'
    program.write_text(LATE)
    address = f'127.0.0.1:{together.free_port()}'
    group = starter.start([[address, '0'], [address, '1']], program)
    assert group.wait(60) == [0, 0], group.output(0)


@pytest.mark.long
def test_a_run_that_loses_a_process_ends_and_resumes(folder, starter, undisturbed):
    """One of two is killed; then one gets SIGTERM; then two finish, and one process does too."""
    run, command = folder / 'run', arguments(folder, 'run')
    group = starter.start(together.as_processes(command, 2))
    wait_until((run / FOLDER / str(SAVE) / 'SHA256SUMS').exists, group)
    time.sleep(random.uniform(0, 0.2))
    os.kill(group.pids[1], signal.SIGKILL)
    killed = time.monotonic()
    first, second = group.wait()
    assert time.monotonic() - killed < END_SECONDS
    assert (first, second) == (1, -signal.SIGKILL)
    assert 'error: process 0 of 2 lost process 1, whose own' in group.output(0), group.output(0)

    group = starter.start(together.as_processes(command, 2))
    group.wait_for('compiling the update')  # by now the logs end at the checkpoint
    start = int(re.search(r'resuming from checkpoint (\d+)', group.output(0))[1])
    assert start >= SAVE
    wait_until(lambda: (run / 'metrics.jsonl').read_bytes().count(b'\n') > start + 2, group)
    os.kill(group.pids[1], signal.SIGTERM)
    assert group.wait() == [128 + signal.SIGTERM] * 2, group.output(0)
    stopped = int(re.search(r'stopped by SIGTERM at step (\d+), which', group.output(0))[1])
    assert committed_steps(run / FOLDER)[-1] == stopped < STEPS
    shutil.copytree(run, folder / 'alone')

    group = starter.start(together.as_processes(command, 2))
    assert group.wait() == [0, 0], group.output(0) + group.output(1)
    assert f'resuming from checkpoint {stopped}' in group.output(0)
    assert runs.differences(run, undisturbed) == []

    changes = {key.replace('.', '__'): value for key, value in SETTINGS.items()}
    config = runs.make_config(folder / 'text.txt', **changes)
    code, out = runs.quiet_train(config, folder / 'alone')
    assert code == 0
    assert f'resuming from checkpoint {stopped}' in out
    assert_close(folder / 'alone', undisturbed)


def assert_close(run: Path, other: Path) -> None:
    """The records and the final parameters are equal to rounding.

    The true gradient of k's bias is 0, and AdamW makes steps of any size out of its rounding.
    """
    for ours, theirs in zip(runs.metrics(run), runs.metrics(other), strict=True):
        assert ours.pop('split') == theirs.pop('split')
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = runs.final_state(run), runs.final_state(other)
    for name, leaf in ours.items():
        rows = [0, 2] if name.endswith("['c_attn']['bias']") else ...
        np.testing.assert_allclose(
            leaf[rows], theirs[name][rows], rtol=1e-5, atol=1e-5, err_msg=name
        )
