"""Settings made before JAX starts: test programs compile in half the time, and once a session."""

import gc
import os
import sys
import tempfile
from importlib.metadata import version

import pytest

FLAGS = ['--xla_backend_optimization_level=0']
if version('jaxlib').startswith('0.10.'):  # later versions have no such flag
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))  # reaches the processes that tests start, too

# One cache of compiled programs for all processes of a session, those of the tests included. The
# first process makes it, and removes it when it ends.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix='compiled.', ignore_cleanup_errors=True)
    os.environ |= {
        'JAX_COMPILATION_CACHE_DIR': CACHE.name,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

# Compiled modules are kept, also where the environment says no: tests start many processes, and
# each would compile the package again.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False

# Tracing makes many objects that live long: looking for garbage less often saves 4 % of the time.
gc.set_threshold(200_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also the tests that take longest')


# The files that take longest start first, so that none is left to one process at the end.
FIRST = ('parallel', 'kernels', 'ops', 'docs', 'errors', 'lens', 'decode_kernels', 'resume')


def pytest_collection_modifyitems(config, items):
    """Orders the files, and leaves out the tests marked long.

    They run if --long is given or a test is named by itself.
    """
    rank = {f'test_{name}.py': place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))
    if config.getoption('--long') or any('::' in argument for argument in config.args):
        return
    long = [item for item in items if item.get_closest_marker('long')]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def machine_of_any_speed(monkeypatch):
    """No line that says how long something takes, which only a slow or busy machine prints."""
    monkeypatch.setattr('gpt2_jax.progress.LOG_SECONDS', 3600)


@pytest.fixture(scope='module')
def trace_once():
    """All runs of a module with the same settings share their programs: see runs.py."""
    import runs  # loads JAX, which has to see the settings above

    with runs.trace_once():
        yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """The text of a module's runs."""
    import runs

    return runs.write_text(tmp_path_factory.mktemp('text') / 'text.txt')
