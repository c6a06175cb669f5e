"""What goes wrong is explained: planted faults are found at their layer, step and line of text."""

import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import runs
from browser import CHROMIUM, browser

from gpt2_jax.config import default_config
from gpt2_jax.data.dataset import n_train_characters
from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.errors import DivergedError, UserError
from gpt2_jax.model import gpt2
from gpt2_jax.reports import autopsy

TRAP = '§'
QUIET = {'eval__every': 1000, 'eval__sample_tokens': 0, 'log__every': 1}


def first_step_that_reads(addressing, position):
    """(step, row, place among the inputs) by a search through the batches."""
    T = addressing.seq_len
    for step in range(1, 1000):
        for row, start in enumerate(ledger.row_starts(addressing, step)):
            if start <= position < start + T:
                return step, row, position - start
    raise AssertionError('never read')


def plant(patch, name, layer, head, token):
    """Makes a head of a layer give nan at a token, in training and in replays."""
    embed, tap, planted = gpt2.embed, gpt2.tap, threading.local()  # programs compile on threads

    def embed_and_note(wte_VD, wpe_PD, tokens_BT, pos):
        planted.here_BT = tokens_BT == token
        return embed(wte_VD, wpe_PD, tokens_BT, pos)

    def tap_and_spoil(module, at, x):
        if at == name and module.path[:1] == (f'h_{layer}',):
            here_BT1 = planted.here_BT[..., None]
            x = x.at[:, :, head].set(jnp.where(here_BT1, jnp.nan, x[:, :, head]))
        return tap(module, at, x)

    patch.setattr(gpt2, 'embed', embed_and_note)
    patch.setattr(gpt2, 'tap', tap_and_spoil)


@pytest.mark.long
def test_a_nan_is_found_at_its_layer_head_position_and_line(tmp_path, monkeypatch):
    lines = runs.write_text(tmp_path / 'text.txt', words=300).read_text().splitlines()
    lines[4] = lines[4][:9] + TRAP + lines[4][10:]
    (tmp_path / 'text.txt').write_text('\n'.join(lines))
    settings = QUIET | {'train__grad_accum_steps': 2, 'model__n_layer': 2, 'model__n_embd': 8}
    settings |= {'model__n_head': 4}
    config = runs.make_config(tmp_path / 'text.txt', **settings)
    trap = sorted(set('\n'.join(lines))).index(TRAP)
    plant(monkeypatch, 'z', layer=1, head=2, token=trap)
    with pytest.raises(DivergedError) as error:
        runs.quiet_train(config, tmp_path / 'run')
    run = ledger.open_run(tmp_path / 'run')
    assert run.dataset.tokenizer.decode([trap]) == TRAP
    step, row, place = first_step_that_reads(run.addressing, '\n'.join(lines).index(TRAP))
    message = str(error.value)
    assert f'training diverged at step {step}: loss = nan' in message
    assert 'is too high' not in message  # the learning rate is not to blame
    place = f'head 2, row {row}, position {place}'
    assert f'is nan in the activation h_1.z, {place} (' in message
    assert f'{tmp_path / "text.txt"}:5, byte ' in message
    page = tmp_path / 'run' / 'autopsies' / f'step_{step}.html'
    assert f'{page} shows all of it' in message
    if CHROMIUM:
        with browser() as tab:
            tab.open(page)
            assert 'head 2' in tab.text('#said')
            assert tab.text('[data-bad=forward]') == 'h_1.z'
            assert tab.run('Number(document.querySelector("[data-row]").dataset.row)') == row
            assert tab.text('.chosen') == TRAP
            assert tab.errors() == []


@pytest.mark.long
def test_a_huge_learning_rate_is_named(tmp_path):
    text = runs.write_text(tmp_path / 'text.txt', words=300)
    changes = {'optim__learning_rate': 1e30, 'optim__clip_norm': 0.0, 'optim__warmup_steps': 0}
    changes['optim__weight_decay'] = 0.0
    with pytest.raises(DivergedError) as error:
        runs.quiet_train(runs.make_config(text, **QUIET, **changes), tmp_path / 'run')
    assert 'Step 1 changed the parameters beyond the range of fp32' in str(error.value)
    assert 'a learning rate of 1e+30 is too high' in str(error.value)
    assert 'nan%' not in str(error.value)


@pytest.mark.long
def test_a_corrupted_passage_is_found_while_the_run_continues(tmp_path):
    lines = runs.write_text(tmp_path / 'text.txt', words=2400).read_text().splitlines()
    spoilt = 'qzxjvwqxzjvwzqjxwvzxqjvw'
    lengths = np.cumsum([0, *(len(line) + 1 for line in lines)])
    # One epoch has 170 steps of 4 rows. The model has to learn what is usual first, and a model
    # that has read one half of the passage is less surprised by the other.
    n_tokens = n_train_characters(int(lengths[-1]) + len(spoilt), 0.1)
    addressing = ledger.Addressing(n_tokens, default_config().train.seed, 4, 16)

    def steps_that_read(line):
        positions = range(lengths[line], lengths[line] + len(spoilt))
        return {first_step_that_reads(addressing, position)[0] for position in positions}

    number = next(i for i in range(len(lines) // 2, len(lines)) if min(steps_that_read(i)) > 80)
    lines.insert(number, spoilt)
    (tmp_path / 'text.txt').write_text('\n'.join(lines))
    settings = QUIET | {'train__steps': 165, 'checkpoint__every': 20, 'optim__learning_rate': 1e-2}
    settings |= {'model__embd_pdrop': 0.0, 'model__resid_pdrop': 0.0, 'model__bias': True}
    config = runs.make_config(tmp_path / 'text.txt', **settings, train__spike=5)
    code, printed = runs.quiet_train(config, tmp_path / 'run')
    assert code == 0
    run = ledger.open_run(tmp_path / 'run')
    assert run.addressing == addressing
    found = re.findall(r'\nstep (\d+): loss = .* deviations above .*text\.txt:(\d+), byte', printed)
    assert found
    for step, line in found:
        assert int(step) in steps_that_read(number)
        assert int(line) == number + 1
        assert (tmp_path / 'run' / 'autopsies' / f'step_{step}.html').exists()
    # Looking changed nothing.
    config = runs.make_config(tmp_path / 'text.txt', **settings)
    assert runs.quiet_train(config, tmp_path / 'other')[0] == 0
    assert runs.different_states(tmp_path / 'run', tmp_path / 'other') == []
    with pytest.raises(UserError, match='plans 165 updates, and none is 166'):
        autopsy.explain(tmp_path / 'run', 166)
    assert autopsy.sentences(run, autopsy.examine(Replay(tmp_path / 'run'), 2))[0] == (
        'Every value of step 2 is finite when it is computed again.'
    )
