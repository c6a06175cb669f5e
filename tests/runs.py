"""Helpers for tests of whole runs: a text, a short run on it, and a comparison of two runs."""

import collections
import contextlib
import io
import json
import os
import random
import runpy
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from tensorboard.compat.proto.event_pb2 import Event

from gpt2_jax import config as config_lib
from gpt2_jax import train as train_lib
from gpt2_jax.config import default_config
from gpt2_jax.inference import evaluate
from gpt2_jax.train import train
from gpt2_jax.training import programs
from gpt2_jax.training.setup import build
from gpt2_jax.workdir.checkpoints import Checkpoints
from gpt2_jax.workdir.checksums import FOLDER, committed_steps
from gpt2_jax.workdir.history import read_probes

# With dropout, so that another mask would show; saves and evaluations rarely coincide.
SETTINGS = {
    'model.n_layer': 2,
    'model.n_head': 2,
    'model.n_embd': 32,
    'model.n_positions': 16,
    'train.steps': 60,
    'train.batch_size': 4,
    'optim.learning_rate': 3e-3,
    'optim.warmup_steps': 10,
    'eval.every': 7,
    'eval.sample_tokens': 20,
    'checkpoint.every': 5,
    'log.every': 3,
}
# For the suite: quick to compile and to save, with as few steps as show a save of each kind.
SMALL = SETTINGS | {
    'model.n_layer': 1,
    'model.bias': False,
    'model.attn_pdrop': 0.0,
    'train.steps': 18,
}


def write_text(path: Path, words: int = 1200) -> Path:
    """A text of made-up words, a few thousand characters long."""
    draw = random.Random(0)
    syllables = [a + b for a in 'bdfgklmnprst' for b in 'aeiou']
    text = ' '.join(
        ''.join(draw.choices(syllables[:20], k=draw.randint(1, 3))) for _ in range(words)
    )
    path.write_text(text.replace(' ba ', '.\n'), encoding='utf-8')
    return path


def make_config(text: Path, **changes):
    """The configuration of a small run on `text`; train__steps=10 changes train.steps."""
    config = default_config()
    changed = {key.replace('__', '.'): value for key, value in changes.items()}
    for key, value in (SMALL | {'data.corpus': str(text)} | changed).items():
        section, name = key.split('.')
        config[section][name] = value
    return config


def quiet_train(config, workdir: Path, **options) -> tuple[int, str]:
    """Trains in this process; returns the exit code and the printed text."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = train(config, workdir, **options)
    return code, out.getvalue()


def compile_cache() -> Path:
    """The cache of compiled programs of this session of tests: see conftest.py."""
    return Path(os.environ['JAX_COMPILATION_CACHE_DIR'])


@contextlib.contextmanager
def trace_once():
    """Runs inside with the same model and training share their first state and their programs.

    To trace a program again takes longer than the few updates of a run. Runs in processes of their
    own, as test_resume.py kills them, trace each time.
    """
    made, new_state = {}, programs.new_state

    def key(setup, name):
        config = json.loads(config_lib.to_json(setup.config))
        parts = [config[part] for part in ('model', 'optim', 'train', 'mesh')]
        return name, setup.model.cfg, json.dumps(parts)

    def first_state(setup):
        name = key(setup, 'state')
        if name not in made:
            made[name] = jax.device_get(new_state(setup))
        return jax.device_put(made[name], setup.layout)

    def shared(make):
        def make_or_take(setup, *args):
            name = key(setup, make.__name__)
            if name in made:
                return made[name]
            program = make(setup, *args)

            def run(*args):
                result = program(*args)
                made[name] = program  # not before: a run may end before its program is compiled
                return result

            return run

        return make_or_take

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, 'new_state', first_state)
        for module, name in (
            (programs, 'compile_train_step'),
            (train_lib, 'compile_train_step'),
            (evaluate, 'make_jitted_eval_step'),
        ):
            patch.setattr(module, name, shared(getattr(module, name)))
        yield


def script(name: str, *arguments) -> tuple[int, str, str]:
    """Runs scripts/NAME.py as a user would, in this process; returns exit code, stdout, stderr."""
    path, known = Path(__file__).parents[1] / 'scripts' / f'{name}.py', set(flags.FLAGS)
    argv, out, err = [str(path), *map(str, arguments)], io.StringIO(), io.StringIO()
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with (
            open(os.devnull) as nothing,
            warnings.catch_warnings(),
            # It may end this process, without waiting for threads of other tests.
            mock.patch('gpt2_jax.cli.end_process', sys.exit),
            mock.patch.multiple(
                sys,
                argv=argv,
                stdin=nothing,
                stdout=out,
                stderr=err,
                unraisablehook=sys.unraisablehook,
            ),
        ):
            # ml_collections calls it.
            warnings.filterwarnings('ignore', r'the load_module\(\) method', DeprecationWarning)
            runpy.run_path(str(path), run_name='__main__')
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        signal.signal(signal.SIGINT, on_ctrl_c)
        for added in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, added)
        flags.FLAGS.unparse_flags()
        sys.modules.pop('config_config', None)  # else the next --config is loaded on top of it
    raise AssertionError('a script ends with sys.exit')


def before_updates(patch, change) -> None:
    """Makes every update begin with change(state), which returns the state to update."""
    make = programs.compile_train_step

    def with_change(*args):
        update = make(*args)
        return lambda state, batch: update(change(state), batch)

    patch.setattr(train_lib, 'compile_train_step', with_change)


def metrics(run: Path) -> list[dict]:
    """The records of a run, without times and rates."""
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text('utf-8').splitlines()]
    return [
        {
            key: value
            for key, value in record.items()
            if key not in ('tokens_per_second', 'mfu', 'seconds')
        }
        for record in records
    ]


def events(run: Path) -> collections.Counter:
    """How often each (tag, step) occurs in a run's TensorBoard files."""
    return collections.Counter((value.tag, step) for step, value in event_values(run))


def event_values(run: Path) -> Iterator[tuple[int, Any]]:
    """(step, value) of everything in a run's TensorBoard files."""
    for path in sorted((run / 'tensorboard').iterdir()):
        data = path.read_bytes()
        while data:  # length, checksum of the length, event, checksum of the event
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[12 + length + 4 :]


def final_state(run: Path):
    """The leaves of the state in a run's latest checkpoint, on one device: step, parameters, .."""
    config = config_lib.from_json((run / 'config.json').read_text('utf-8'))
    config.mesh.update(data=1, fsdp=1, tensor=1)
    setup = build(config)
    with Checkpoints(run / FOLDER) as checkpoints:
        state = checkpoints.restore(
            committed_steps(run / FOLDER)[-1], programs.abstract_state(setup)
        )
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def different_states(run: Path, other: Path) -> list[str]:
    """The leaves that are not bit-equal, in words."""
    a, b = final_state(run), final_state(other)
    return [
        f'{name} differs'
        for name in a | b
        if name not in a or name not in b or a[name].tobytes() != b[name].tobytes()
    ]


def different_probes(run: Path, other: Path) -> list[str]:
    """The arrays of probes.npz that are not equal."""
    a, b = (read_probes(folder) or {} for folder in (run, other))
    return [
        f'probes.npz: {name} differs'
        for name in a | b
        if name not in a
        or name not in b
        or not np.array_equal(*map(str_or_bits, (a[name], b[name])))
    ]


def str_or_bits(array: np.ndarray) -> np.ndarray:
    """An array in which nan equals nan."""
    return array if array.dtype.kind == 'U' else np.frombuffer(array.tobytes(), np.uint8)


def differences(run: Path, other: Path) -> list[str]:
    """The differences of two finished runs, in words."""
    wrong = different_states(run, other)
    ours, theirs = metrics(run), metrics(other)
    twice = [
        key
        for key, n in collections.Counter(
            (record['step'], record['split']) for record in ours
        ).items()
        if n > 1
    ]
    if twice or ours != theirs:
        wrong.append(
            f'metrics.jsonl differs, {len(ours)} records instead of {len(theirs)}, twice: {twice}'
        )
    if (run / 'samples.txt').read_bytes() != (other / 'samples.txt').read_bytes():
        wrong.append('samples.txt differs')
    a, b = (json.loads((folder / 'summary.json').read_text('utf-8')) for folder in (run, other))
    wrong += [
        f'summary.json: {key} is {a[key]!r}, not {b[key]!r}'
        for key in b
        if 'seconds' not in key and key not in ('tokens_per_second', 'mfu') and a[key] != b[key]
    ]
    wrong += different_probes(run, other)
    ours, theirs = events(run), events(other)
    wrong += [f'TensorBoard has {key} {n} times' for key, n in ours.items() if n > 1]
    # After a restart the first record may lack a rate: rates are not compared.
    clock = ('train/tokens_per_second', 'train/mfu')
    if {key for key in ours if key[0] not in clock} != {
        key for key in theirs if key[0] not in clock
    }:
        wrong.append(f'TensorBoard differs, {len(ours)} figures instead of {len(theirs)}')
    return wrong


def state_at(run: Path, setup, step: int):
    """The state in a checkpoint of a run."""
    with Checkpoints(run / FOLDER) as checkpoints:
        return checkpoints.restore(step, programs.abstract_state(setup))
