"""JAX's switches for debugging, as people use them: a run works, or is refused in one line."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from gpt2_jax import cli, library, look
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.errors import UsageError
from gpt2_jax.inference import decoding
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.params import init_params
from gpt2_jax.parallel import devices, faults
from gpt2_jax.reports.autopsy import explain
from gpt2_jax.reports.compare import write_comparison
from gpt2_jax.reports.run import write_run

SHORT = {
    'model__n_layer': 1,
    'model__n_embd': 8,
    'model__n_positions': 8,
    'train__steps': 2,
    'train__batch_size': 2,
    'log__every': 1,
    'eval__sample_tokens': 2,
    'eval__tokens': 16,
}


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt', words=150)


@pytest.fixture(scope='module')
def plain(text, tmp_path_factory):
    """The run without any switch."""
    folder = tmp_path_factory.mktemp('plain')
    assert runs.quiet_train(runs.make_config(text, **SHORT), folder)[0] == 0
    return folder


@contextlib.contextmanager
def switched(name, value):
    """A switch as the environment sets it: for all threads."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def check_that_a_run_can_be_looked_at(folder, switch, value):
    with switched(switch, value):
        explain(folder, 2)
        Replay(folder).open(2)
        write_run(folder, folder / 'run.html')
        write_comparison([folder, shutil.copytree(folder, folder / 'copy')], folder / 'two.html')
        loaded = library.load(folder)
        look.show(loaded, 'b')
        look.report(loaded, 'b', folder / 'model.html', skip=('curvature', 'shapes', 'jacobian'))


@pytest.mark.parametrize(
    ('switch', 'value', 'optimizer'),
    [
        pytest.param('jax_disable_jit', True, 'optax', marks=pytest.mark.long),
        pytest.param('jax_enable_x64', True, 'optax', marks=pytest.mark.long),
        pytest.param('jax_enable_x64', True, 'explicit', marks=pytest.mark.long),
        ('jax_debug_nans', True, 'optax'),
        ('jax_transfer_guard', 'disallow', 'optax'),
    ],
)
def test_a_run_works_under_a_switch(switch, value, optimizer, text, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, 'CHUNK', 2)
    config = runs.make_config(text, **SHORT, optim__implementation=optimizer)
    if switch == 'jax_disable_jit':  # each operation of each shape is compiled by itself
        config.eval.sample_tokens = 0
    with switched(switch, value):
        assert runs.quiet_train(config, tmp_path)[0] == 0
    ours, theirs = runs.metrics(tmp_path), runs.metrics(plain)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine['loss'] == pytest.approx(other['loss'], rel=1e-3)
    if switch == 'jax_transfer_guard':
        check_that_a_run_can_be_looked_at(tmp_path, switch, value)
    state = runs.final_state(tmp_path)
    assert {leaf.dtype for leaf in state.values()} == {np.dtype('float32'), np.dtype('int32')}


def test_the_line_of_a_nan_is_named(capsys, monkeypatch):
    cfg = GPT2Config(vocab_size=5, n_layer=1, n_head=1, n_embd=8, n_positions=4)

    def main(arguments):
        params = jax.jit(lambda: init_params(cfg, 0))()
        params['ln_f']['bias'] += jnp.nan
        with switched('jax_debug_nans', True):
            jax.jit(GPT2(cfg).apply)({'params': params}, jnp.zeros((1, 2), jnp.int32))

    monkeypatch.setattr('sys.argv', ['x'])
    monkeypatch.setattr(cli, 'end_process', lambda code: None)
    cli.run(main)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: invalid value (')
    assert 'gpt2_jax/model/' in line
    assert ', line ' in line


@pytest.mark.parametrize('switch', devices.UNSUPPORTED_SWITCHES)
def test_a_switch_that_the_libraries_do_not_support_is_refused(switch):
    message = rf'{switch.upper()}=.* Flax and Optax'
    value = devices.UNSUPPORTED_SWITCHES[switch]
    with switched(switch, value), pytest.raises(UsageError, match=message):
        devices.select_platform('auto')


@pytest.mark.parametrize(
    ('variable', 'value'), [('JAX_ENABLE_X64', 'maybe'), ('JAX_NUM_CPU_DEVICES', 'two')]
)
def test_a_value_that_jax_cannot_read_is_one_line(variable, value, tmp_path):
    script = Path(__file__).parents[2] / 'scripts/sample.py'
    done = subprocess.run(
        [sys.executable, script, f'--ckpt_dir={tmp_path}'],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ')
    assert value in line
    assert variable.lower() in line.lower()
    assert line.endswith('correct this variable of the environment, or unset it')


@pytest.mark.parametrize(
    'error', [AssertionError(), RuntimeError("Unable to initialize backend 'x': y. (set JAX_PL")]
)
def test_a_platform_that_is_not_there(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, 'default_backend', fail)
    message = r'JAX cannot use JAX_PLATFORMS=cuda: .*--platform=cpu'
    with switched('jax_platforms', 'cuda'):
        with pytest.raises(UsageError, match=message):
            devices.select_platform('auto')
        done = []
        with pytest.raises(UsageError, match=message), devices.selecting_platform('auto'):
            done.append('imports')  # on a thread beside this, and the error comes at the end
        assert done
    with (
        switched('jax_platforms', None),
        pytest.raises(UsageError, match=r'JAX cannot start: .* that begin with JAX_$'),
    ):
        devices.select_platform('auto')


@pytest.mark.parametrize(('free', 'warned'), [(10**12, False), (100, True), (None, False)])
def test_memory_is_estimated_before_training(free, warned, text, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, 'free_memory', lambda device: free)
    config = runs.make_config(text, **SHORT | {'eval__sample_tokens': 0})
    _, printed = runs.quiet_train(config, tmp_path)
    assert 'for parameters, moments, gradients and saving' in printed
    assert ('warning: this may run out of memory: lower --config.train.batch' in printed) == warned
    assert (' for activations, and ' in printed) == warned
