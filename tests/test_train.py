"""Parts of a run that the tests of whole runs (test_resume.py) do not see."""

import threading

import pytest

from gpt2_jax.config import default_config, resolve
from gpt2_jax.diagnostics.describe import describe
from gpt2_jax.training import programs
from gpt2_jax.training.setup import build


def test_an_error_does_not_wait_for_the_compilation():
    done = threading.Event()
    with pytest.raises(KeyError), programs.compiling() as pool:
        compiled = pool.submit(done.wait, 5)
        raise KeyError
    assert not compiled.done()
    done.set()


@pytest.mark.parametrize(
    ('holdout', 'expected'),
    [
        (0.0, '80 training and 20 validation tokens'),
        (0.25, '60 training and 20 held-out training tokens'),
    ],
)
def test_a_run_describes_its_text(tmp_path, holdout, expected):
    (tmp_path / 'text.txt').write_text('abcde' * 20)
    config = default_config()
    config.data.update(corpus=str(tmp_path / 'text.txt'), val_fraction=0.2, holdout=holdout)
    config.model.update(n_layer=1, n_head=1, n_embd=8, n_positions=8)
    assert sum(expected in line for line in describe(build(resolve(config)))) == 1
