"""The pages of runs: their numbers against the library, in Python and, if there is one, in a
Chromium that moves the slider, picks a head and opens a step."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import runs
from browser import CHROMIUM, browser

from gpt2_jax import lens
from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.autopsy import examine
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.reports import autopsy, compare, over_time, run
from gpt2_jax.workdir.checksums import FOLDER, committed_steps
from gpt2_jax.workdir.history import read_records
from gpt2_jax.workdir.restore import load

needs_browser = pytest.mark.skipif(not CHROMIUM, reason='no Chromium')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('pages')


@pytest.fixture(scope='module')
def trained(folder):
    """A run with probes and kept checkpoints."""
    text = runs.write_text(folder / 'text.txt')
    config = runs.make_config(
        text, train__probe=6, eval__every=9, checkpoint__keep='log', log__every=1
    )
    assert runs.quiet_train(config, folder / 'run')[0] == 0
    return folder / 'run'


@pytest.fixture(scope='module')
def page(trained, folder):
    """The page of the run, with step 4 opened beside it."""
    out = folder / 'page.html'
    (line,) = run.write_steps(trained, out, ['4'], notify=lambda text: None)
    assert 'page_step_4.html' in line
    run.write_run(trained, out, notify=lambda text: None)
    return out


@pytest.fixture(scope='module')
def tab():
    with browser() as tab:
        yield tab


def facts(page):
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text('utf-8'))[1])


def test_the_page_holds_what_the_run_recorded(trained, page):
    found = facts(page)
    assert found['checkpoints'] == committed_steps(trained / FOLDER)
    losses = [record['loss'] for record in read_records(trained, 'train')]
    assert found['curves']['train']['loss'] == losses
    assert set(found['baselines']) == {'uniform', 'unigram', 'bigram', 'trigram'}
    assert found['dynamics']['steps'] == [0, 1, 2, 4, 8, 16]
    assert found['opened'] == {'4': 'page_step_4.html'}
    assert page.stat().st_size < 10e6
    assert '//' not in re.sub(r'http://www\.w3\.org/2000/svg|//.*', '', page.read_text('utf-8'))


@needs_browser
def test_the_slider_moves_everything(trained, page, tab):
    tab.open(page)
    found = facts(page)
    tokens = np.array(found['tokens'], np.int32)
    for at in (0, found['checkpoints'].index(8), len(found['checkpoints']) - 1):
        step = found['checkpoints'][at]
        tab.run(
            f'(s => {{ s.value = {at}; s.dispatchEvent(new Event("input")) }})'
            '(document.querySelector("#slider"))'
        )
        restored = load(trained, str(step))
        model = restored.model, restored.params
        mean = lens.token_losses(model, tokens).mean()
        assert tab.text('#step') == f'step {step}'
        assert float(tab.text('#text-loss').split()[0]) == pytest.approx(mean, abs=2e-4)
        # Picking a head shows its pattern.
        tab.click('[data-head="h_0.attn.1"]')
        assert tab.text('#head') == 'h_0.attn.1'
        pattern = lens.capture(model, tokens, 'h_0.pattern.1')['h_0.pattern.1'][0]
        shown = tab.run('[weight(0, 1, 3, 0), weight(0, 1, 7, 6), weight(0, 1, 2, 2)]')
        expected = [pattern[3, 0], pattern[7, 6], pattern[2, 2]]
        np.testing.assert_allclose(shown, expected, atol=5e-3)  # a byte each
        assert tab.text('#sample') == found['looks']['samples'][at]
    assert tab.errors() == []
    assert [r for r in tab.requests() if not r.startswith(('file:', 'about:'))] == []


@needs_browser
def test_the_page_says_how_far_the_run_came(page, tab, tmp_path):
    other = tmp_path / 'other.html'
    before, _, rest = page.read_text('utf-8').partition('id="data">')
    after = rest[rest.index('</script>') :]
    steps = facts(page)['steps']
    for finished, done, said in (
        (True, 1, '\u2713 finished: 1 step'),
        (True, 16, '\u2713 finished: 16 steps'),
        (False, 3, f'not finished: step 3 of {steps}'),  # whether it still trains is not known
    ):
        data = json.dumps(facts(page) | {'finished': finished, 'done': done})
        data = data.replace('<', '\\u003c')
        other.write_text(f'{before}id="data">{data}{after}', 'utf-8')
        tab.open(other)
        assert tab.text('.pill') == said


@needs_browser
def test_an_opened_step_shows_its_rows(trained, page, tab):
    tab.open(page.with_name('page_step_4.html'))
    assert 'equal the recorded ones to the last digit' in tab.text('#verdict')
    found = facts(page.with_name('page_step_4.html'))
    worst = tab.run('Number(document.querySelector("[data-row]").dataset.row)')
    assert worst == max(found['rows'], key=lambda row: row['before_mean'])['row']
    assert tab.run('document.querySelectorAll("[data-row]").length') == len(found['rows'])
    figures = '[...document.querySelectorAll(".fact b")].map(e => e.textContent)'
    shown = tab.run(figures)
    assert tab.errors() == []
    # The page that examines the same update shows its metrics in the same format.
    _, examined = autopsy.explain(trained, 4)
    tab.open(examined)
    metrics = tab.run(figures)
    assert len(metrics) == len(found['replayed'])
    assert set(metrics) <= set(shown)
    assert tab.run('[number(-49.44, 3), number(-2), fixed(-0.5, 1)]') == [
        '\N{MINUS SIGN}49.4',
        '\N{MINUS SIGN}2',
        '\N{MINUS SIGN}0.5',
    ]
    assert tab.errors() == []


@needs_browser
def test_metrics_have_as_many_digits_as_they_need(page, tab):
    """Six of the loss, four of the learning rate, five of a norm; three of a very small number."""
    step = page.with_name('page_step_4.html')
    tab.open(step)
    found, shown = facts(step)['replayed'], tab.text('.facts')
    for name, digits in {'loss': 6, 'learning_rate': 4, 'grad_norm': 5, 'param_norm': 5}.items():
        assert f'{found[name]:.{digits}g}' in shown
    values = {
        'loss': (4.1234567, 2, None),
        'learning_rate': (0.00298765, 0.0006),
        'update_norm': (0.0123456, 49.4444444, 1234.567),
    }
    calls = [f'metric("{name}", {json.dumps(x)})' for name, xs in values.items() for x in xs]
    assert tab.run(f'[{", ".join(calls)}]') == [
        '4.12346',
        '2',
        'not finite',
        '0.002988',
        '6.00e-4',
        '0.012346',
        '49.444',
        '1,234.6',
    ]


@needs_browser
def test_runs_are_compared(trained, folder, tab):
    out = folder / 'compare.html'
    (folder / 'other').symlink_to(trained)
    compare.write_comparison([trained, folder / 'other'], out, notify=lambda text: None)
    found = facts(out)
    restored = load(trained, 'best')
    (loss,) = lens.token_losses((restored.model, restored.params), restored_tokens(found, restored))
    for entry in found['runs']:
        np.testing.assert_allclose(entry['loss'], loss, rtol=1e-4)
    assert found['settings'] == {}
    tab.open(out)
    assert 'null' not in tab.text('main')
    assert tab.run('document.querySelectorAll("#summary tbody tr").length') == 2
    best = min(record['loss'] for record in read_records(trained, 'val'))
    assert f'{best:.4f}' in tab.text('#summary')
    assert tab.errors() == []


def restored_tokens(found, restored):
    return restored.tokenizer.encode(''.join(found['runs'][0]['tokens']))


def test_wrong_questions_are_one_line(trained, folder):
    for arguments, said in (
        ((), 'expected a command, report or compare; got none'),
        (('report',), "report needs --workdir=DIR: the run's folder"),
        (('report', 'runs/x'), "report needs --workdir=DIR: the run's folder"),
        (('compare', 'a', '--steps=1'), '--steps means nothing with compare'),
    ):
        code, _, err = runs.script('runs', *arguments, f'--out={folder / "x.html"}')
        assert code == 2
        assert said in err
    with pytest.raises(UsageError, match='compare needs two runs or more, and got 1'):
        compare.write_comparison([trained], folder / 'x.html')
    with pytest.raises(
        UsageError, match=f'different runs, and {trained.absolute()} is given twice'
    ):
        compare.write_comparison([folder, trained, trained], folder / 'x.html')
    with pytest.raises(UsageError, match='the text has 1 token: expected 2 to 16'):
        run.write_run(trained, folder / 'x.html', text='a', notify=lambda text: None)
    one = dataclasses.make_dataclass('Setup', ['config'])(runs.make_config(None, train__seq_len=1))
    with pytest.raises(UserError, match=r'trained on single tokens \(train\.seq_len = 1\): a page'):
        over_time.text_tokens(ledger.open_run(trained), one, None)
    with pytest.raises(UsageError, match="--steps has 'x'"):
        list(run.write_steps(trained, folder / 'x.html', ['x']))
    with pytest.raises(UserError, match='has no update 999: it has done'):
        next(run.write_steps(trained, folder / 'x.html', ['1', '999']))

    for arguments, said in (
        (('draw',), 'expected a command, report or compare; got draw'),
        (('report', f'--workdir={trained}'), 'report needs --out: the HTML file to write'),
    ):
        code, _, err = runs.script('runs', *arguments)
        assert code == 2
        assert said in err


def test_a_run_that_is_not_there_is_reported_before_the_work(trained, folder):
    notes = []
    with pytest.raises(UserError, match=r'nowhere holds no config\.json'):
        compare.write_comparison(
            [trained, folder / 'nowhere'], folder / 'x.html', notify=notes.append
        )
    assert notes == []


def test_an_examined_step_says_which_passage_costs_most(trained):
    """The row of that passage comes first on the page, whichever row costs most as a whole."""
    replay = Replay(trained)
    found = examine(replay, 4)
    mean_B = found.losses_BT.mean(1)
    row = int(mean_B.argmin())
    found = dataclasses.replace(found, passage=found.passage._replace(row=row, loss=9.0))
    _, said = autopsy.sentences(replay.run, found)
    assert said.startswith(f'Of all passages of 16 tokens, this one in row {row} costs most, 9.00 ')
    assert f'The whole row costs {mean_B[row]:.2f}, the other rows ' in said
    rows = [entry['row'] for entry in autopsy.to_json(replay.run, found)['rows']]
    assert rows[0] == row
    assert list(mean_B[rows[1:]]) == sorted(mean_B[rows[1:]], reverse=True)


def test_a_page_that_cannot_be_written_is_reported_before_the_work(trained, monkeypatch):
    notes = []
    monkeypatch.setattr(autopsy.os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match=r'cannot write .*step_4\.html: no permission to write in'):
        autopsy.explain(trained, 4, notes.append)
    assert notes == []


@needs_browser
@pytest.mark.parametrize(
    ('values', 'ticks'),
    [
        ([0.0031, 0.0034], ['0.0031', '0.0032', '0.0033', '0.0034']),
        ([60.5, 61.5], ['60.6', '60.8', '61', '61.2', '61.4']),
        ([3.0, 3.0], ['3']),
        ([1.0, 100.0], ['1', '10', '100']),
    ],
)
def test_every_logarithmic_axis_has_numbers(values, ticks, page, tab):
    tab.open(page)
    low, high = values
    shown = tab.run(f"axis({low}, {high}, 'log').ticks(5).map((x) => number(x))")
    assert shown == ticks


@needs_browser
def test_a_chart_without_a_value_says_so(page, tab):
    """A run of one step has no speed: its first update is compiled."""
    tab.open(page)
    chart = 'lineChart({title: "Tokens", series: [{name: "a", x: [1], y: [%s]}]}).node'
    assert tab.run(f'{chart % "null"}.textContent') == 'Tokensno value to show'
    assert 'no value' not in tab.run(f'{chart % "1"}.textContent')


@needs_browser
def test_numbers_beside_an_axis_are_short(page, tab):
    tab.open(page)
    values = [100000, 1000000, -2.5e7, 4e16, 0.001, 0.00025]
    shown = tab.run(f'axisNumbers({json.dumps(values)})')
    assert shown == ['100,000', '1e6', '\u22122.5e7', '4e16', '0.001', '2.50e-4']
    shown = tab.run('axisNumbers([7.041, 7.043, 7.045])')
    assert shown == ['7.041', '7.043', '7.045']  # and not 7.04, 7.04, 7.05
    shown = tab.run('[99999.5, -1.5, null, 2.939e17].map((x) => fixed(x))')
    assert shown == ['99999.5000', '\u22121.5000', 'not finite', '2.94e+17']


@needs_browser
def test_names_of_reference_lines_do_not_cover_one_another(page, tab):
    tab.open(page)
    references = [{'name': name, 'y': y} for name, y in (('a', 1), ('b', 1.001), ('c', 3))]
    options = {'title': '', 'series': [{'name': 's', 'x': [1, 2], 'y': [1, 3]}]}
    drawn = tab.run(
        f"""(() => {{
          const chart = lineChart({json.dumps(options | {'references': references})});
          document.body.append(chart.node);
          return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(
            [...chart.node.querySelectorAll('[data-reference]')].map((e) => e.dataset.reference)
          ))));
        }})()"""
    )
    assert drawn == ['a', 'c']


@needs_browser
def test_the_middle_of_a_distribution_is_zero(page, tab):
    tab.open(page)
    labels = tab.run(
        "[...document.querySelectorAll('.heat .labels span')].map((e) => e.textContent)"
    )
    assert '0' in labels
    assert not [label for label in labels if 'e-' in label or 'e\u2212' in label]


def test_a_text_that_was_moved(trained, folder):
    text, gone = folder / 'text.txt', folder / 'gone.txt'
    copies = [folder / 'moved', folder / 'moved_too']
    for copy in copies:
        shutil.copytree(trained, copy)
        config = (copy / 'config.json').read_text()
        (copy / 'config.json').write_text(config.replace(str(text), str(gone)))
    out = folder / 'moved.html'
    for arguments, pages in (
        (('report', f'--workdir={copies[0]}', '--steps=4'), [out, folder / 'moved_step_4.html']),
        (('compare', *copies), [out]),
    ):
        code, printed, err = runs.script('runs', *arguments, f'--out={out}')
        assert (code, printed) == (1, '')
        assert err.endswith(f'; --corpus=PATH says where {gone} is now\n')
        lost = f'--corpus={gone}'
        code, _, err = runs.script('runs', *arguments, f'--out={out}', lost)
        assert (code, '--corpus=PATH' in err) == (1, False)  # it is given
        code, printed, err = runs.script('runs', *arguments, f'--out={out}', f'--corpus={text}')
        assert code == 0, err
        assert {line.split()[1] for line in printed.splitlines()} == set(map(str, pages))


def test_a_head_is_what_its_scores_say():
    """Since the step from which the score stays above half of its last value."""
    steps = np.array([0, 1, 2, 4, 8])
    score = np.zeros((5, 1, 2))
    score[:, 0, 0] = 0.1, 0.6, 0.2, 0.5, 0.8
    dynamics = {'steps': steps, 'previous': score, 'duplicate': score / 9, 'induction': score / 9}
    looks = {name: np.full((2, 1, 2), 0.1) for name in ('itself', 'first')}
    first, second = run.head_names(dynamics, looks, [0, 8], 2)
    assert (first['kind'], first['step'], first['before']) == ('previous', 4, 2)
    assert second['kind'] is None


def test_spikes_stand_out():
    records = [{'step': i, 'loss': 2 + 0.01 * (i % 3), 'grad_norm': 1.0} for i in range(60)]
    records[40]['loss'] = 4.0
    (spike, *_) = run.spikes(records)
    assert (spike['step'], spike['what']) == (40, 'loss')
