"""The package as a library: gpt2_jax.load, and the ten lines that help and the page begin with."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import make_config, quiet_train, write_text

import gpt2_jax
from gpt2_jax import lens
from gpt2_jax.errors import UsageError, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with runs/quickstart in it: two updates of a small model, on bytes."""
    path = tmp_path_factory.mktemp('library')
    text = write_text(path / 'words.txt')
    config = make_config(
        text,
        data__tokenizer='byte',
        model__n_positions=32,
        model__embd_pdrop=0.0,
        model__resid_pdrop=0.0,
        train__steps=2,
        eval__every=1,
    )
    assert quiet_train(config, path / 'runs/quickstart')[0] == 0
    return path


@pytest.fixture(scope='module')
def loaded(folder):
    return gpt2_jax.load(folder / 'runs/quickstart')


def ten_lines(text: str) -> str:
    """The first indented or fenced block of code."""
    block = re.search(r'```python\n((?:.|\n)*?)```|\n\n((?:    .*\n|\n)+)', text)
    return textwrap.dedent(block[1] or block[2]).strip()


@pytest.mark.long
def test_the_first_ten_lines_of_help_and_of_the_page_work(folder):
    program = ten_lines(gpt2_jax.__doc__)
    assert program == ten_lines((ROOT / 'docs/library.md').read_text('utf-8'))
    assert 10 <= len([line for line in program.splitlines() if line]) <= 12
    (folder / 'ten.py').write_text(program)
    done = subprocess.run(
        [sys.executable, 'ten.py'],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert 'ROMEO:' in done.stdout
    assert '(1, 27, 256)' in done.stdout
    assert re.search(
        r"^\{'h_0.attn.0': \d\.\d{1,3}, 'h_0.attn.1': \d\.\d{1,3}\}$", done.stdout, re.M
    )


def test_importing_the_package_loads_no_jax():
    program = 'import sys, gpt2_jax; gpt2_jax.GPT2Config; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60).returncode == 0


def test_names_of_the_package():
    assert set(gpt2_jax.__all__) <= set(dir(gpt2_jax))
    for name in gpt2_jax.__all__:
        assert getattr(gpt2_jax, name) is not None
    cfg = gpt2_jax.GPT2Config(vocab_size=65)
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.n_positions) == (12, 12, 768, 1024)
    with pytest.raises(AttributeError, match='has no attribute'):
        _ = gpt2_jax.nothing
    for name in lens.__all__:
        assert name in lens.__doc__
        assert inspect.getdoc(getattr(lens, name))


@pytest.mark.long
def test_a_loaded_model_fits_a_line(loaded, folder):
    shown = repr(loaded)
    assert '\n' not in shown
    assert len(shown) - len(str(loaded.path)) < 100
    for part in (': 1 layer,', '2 heads', 'width 32', '256 byte tokens', 'step 2', str(folder)):
        assert part in shown


def test_loading_says_nothing_and_takes_text_or_path(folder, capfd):
    for path in (folder / 'runs/quickstart', str(folder / 'runs/quickstart')):
        assert gpt2_jax.load(path, step=2).step == gpt2_jax.load(path, 'latest').step == 2
    assert capfd.readouterr() == ('', '')
    with pytest.raises(UserError, match='nowhere'):
        gpt2_jax.load('nowhere')


def test_a_loaded_model_equals_itself_and_can_be_a_key(loaded, folder):
    again = gpt2_jax.load(folder / 'runs/quickstart')
    assert loaded in [again, loaded]
    assert loaded != again
    assert len({loaded: 1, again: 2}) == 2


def test_generated_text_depends_on_the_seed_alone(loaded):
    first = loaded.generate('ba', max_new_tokens=8, seed=1)
    assert first.startswith('ba')
    assert first == loaded.generate('ba', max_new_tokens=8, seed=1)
    assert first != loaded.generate('ba', max_new_tokens=8, seed=2)
    greedy = [*loaded.generate('ba', max_new_tokens=3, temperature=0).encode()]
    likeliest_T = loaded.logits(np.array(greedy))[0].argmax(-1)
    np.testing.assert_array_equal(greedy[2:], likeliest_T[1:-1])
    assert loaded.generate(max_new_tokens=2)


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'max_new_tokens': -1}, 'max_new_tokens = -1 is not allowed; expected a whole number'),
        ({'max_new_tokens': 2.5}, 'max_new_tokens = 2.5 is not allowed'),
        ({'prompt': ['a', 'b']}, r"prompt = \['a', 'b'\] is not allowed; expected one text"),
        ({'prompt': 123}, 'prompt = 123 is not allowed'),
        ({'temperature': 'hot'}, "temperature = 'hot' is not allowed; expected a number"),
        ({'top_k': 2.5}, 'top_k = 2.5 is not allowed; expected a whole number'),
        ({'max_new_tokens': True}, 'max_new_tokens = True is not allowed; expected a whole number'),
        ({'top_k': float('nan')}, 'top_k = nan is not allowed; expected a whole number'),
        ({'seed': -1}, 'seed = -1 is not allowed'),
        ({'top_k': 1.5}, 'top_k = 1.5 is not allowed; expected a whole number'),
    ],
)
def test_values_that_generate_cannot_use(loaded, wrong, said):
    with pytest.raises(UsageError, match=said):
        loaded.generate(**{'prompt': 'ba', 'max_new_tokens': 2} | wrong)


def test_the_model_is_a_plain_flax_module(loaded):
    tokens_BT = np.array([[1, 2, 3]])
    logits_BTV = jax.jit(loaded.model.apply)({'params': loaded.params}, tokens_BT)
    np.testing.assert_allclose(logits_BTV, loaded.logits(tokens_BT), atol=1e-6)
    with pytest.raises(UserError, match='token 256 at position 1 is outside the vocabulary'):
        loaded.logits([0, 256])
    with pytest.raises(UserError, match='a text of 33 tokens: expected 1 to 32'):
        loaded.logits('x' * 33)


def test_a_folder_can_be_looked_into_by_its_name(folder, loaded):
    (by_name,) = lens.capture(str(folder / 'runs/quickstart'), 'abc', 'h_0.attn.1').values()
    (by_model,) = lens.capture(loaded, 'abc', 'h_0.attn.1').values()
    np.testing.assert_array_equal(by_name, by_model)
