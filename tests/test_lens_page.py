"""The page: its numbers against the library, in Python and, if there is one, in a Chromium."""

import base64
import functools
import gzip
import io
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from browser import CHROMIUM, browser
from rich.console import Console
from tiny import rough_params, tiny

from gpt2_jax import lens
from gpt2_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt2_jax.errors import UsageError
from gpt2_jax.lens import report as report_lib
from gpt2_jax.lens.readings import residual_stream, unembed
from gpt2_jax.reports import terminal
from gpt2_jax.reports.model import render

# The end of a script and an entity in the text, a line break, a tab, characters of several bytes.
TEXT = 'ab</b>\n&lt;é\tab ab'


SMALL = dict(n_layer=1, n_head=1)


def loaded(tokenizer, **changes) -> SimpleNamespace:
    model = tiny(tokenizer.vocab_size, n_positions=20, **changes)
    return SimpleNamespace(model=model, params=rough_params(model), tokenizer=tokenizer)


@pytest.fixture(scope='module')
def source():
    return loaded(CharTokenizer(''.join(sorted(set(TEXT)))))


@pytest.fixture(scope='module')
def tokens(source):
    return source.tokenizer.encode(TEXT)


@pytest.fixture(scope='module')
def report(source):
    return report_lib.collect(source, TEXT, title='A <model>', prompt_tokens=6)


@pytest.fixture(scope='module')
def page(report):
    return render(report)


def unpacked(page: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The facts and the arrays of a page, read as the browser reads them."""
    facts = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    arrays = {}
    for name, entry in facts['arrays'].items():
        block = gzip.decompress(base64.b64decode(entry['data']))
        kind = '<u2' if entry['type'] == 'bfloat16' else np.dtype(entry['type']).newbyteorder('<')
        array = np.frombuffer(block, kind).reshape(entry['shape'])
        if entry['type'] == 'bfloat16':
            array = (array.astype('<u4') << 16).view('<f4')
        arrays[name] = array
    return facts, arrays


# The numbers


def test_arrays_equal_the_library(source, tokens, page):
    facts, arrays = unpacked(page)
    T, cfg = len(tokens), source.model.cfg
    captured = lens.capture(source, TEXT)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(arrays['loss'][:-1], lens.token_losses(source, TEXT)[0])
    targets = np.append(tokens[1:], captured['logits'][0, -1].argmax())
    np.testing.assert_array_equal(arrays['target'], targets)

    below = np.tril_indices(T)
    for i in range(cfg.n_layer):
        weights = (arrays['pattern'][i] / facts['levels']) ** 2
        expected = captured[f'h_{i}.pattern'][0][:, below[0], below[1]]
        np.testing.assert_allclose(weights, expected, atol=1 / 250)
        close(arrays['norm.attn'][i], np.linalg.norm(captured[f'h_{i}.attn_out'][0], axis=-1))

    jacobians = lens.jacobian_lens(source, TEXT)
    for name, logits in (
        ('logit', lens.logit_lens(source, TEXT)),
        ('jacobian', lens.logit_lens(source, TEXT, jacobians)),
    ):
        probs = np.asarray(jax.nn.softmax(logits[:, 0], axis=-1))
        right = probs[:, np.arange(T), targets]
        close(arrays[f'{name}.right'], right)
        ranks = (probs > right[..., None]).sum(-1) + 1
        assert (arrays[f'{name}.rank'] == ranks).mean() > 0.98  # ties may fall either way
        np.testing.assert_array_equal(arrays[f'{name}.top'][..., 0], probs.argmax(-1))
        np.testing.assert_allclose(arrays[f'{name}.prob'][..., 0], probs.max(-1), rtol=1 / 256)

    terms = lens.attribution(source, TEXT)
    close(arrays['attribution.logit.heads'][1], terms['h_1.attn'][0].T)
    total = sum(
        arrays[f'attribution.logit.{part}'].reshape(-1, T).sum(0)
        for part in ('embed', 'pos_embed', 'bias', 'heads', 'mlp')
    )
    close(total, captured['logits'][0, np.arange(T), targets])
    largest = np.abs(np.concatenate([terms['h_0.mlp'][0], terms['h_1.mlp'][0]], -1))
    neurons = arrays['attribution.logit.neuron']
    np.testing.assert_array_equal(neurons[:, 0], largest.argmax(-1))

    ablated = lens.ablate(source, TEXT, ['h_1.attn.1', 'h_0.mlp'])
    plain = lens.token_losses(source, TEXT)
    close(arrays['ablation'][1, 1, :-1], (ablated['h_1.attn.1'] - plain)[0])
    close(arrays['ablation'][0, cfg.n_head, :-1], (ablated['h_0.mlp'] - plain)[0])
    for name, scores in lens.head_scores(source)._asdict().items():
        close(arrays[f'score.{name}'], scores)


def test_gradients_equal_the_library(source, tokens, page):
    facts, arrays = unpacked(page)
    at = len(tokens) // 2
    names = ['h_0.resid_pre', 'h_0.resid_post', 'h_1.resid_post']
    gradients = lens.gradients(source, TEXT, [*names, '*/*'], at=at)
    for layer, name in enumerate(names):
        row = arrays['gradient.resid'][layer, at * (at + 1) // 2 :][: at + 1]
        expected = np.linalg.norm(gradients[name][0], axis=-1)
        np.testing.assert_allclose(row, expected[: at + 1], rtol=1 / 200, atol=1e-6)
        assert (expected[at + 1 :] == 0).all()
    for i, leaf in enumerate(facts['leaves']):
        expected = np.linalg.norm(gradients[leaf])
        assert arrays['gradient.params'][at, i] == pytest.approx(expected, rel=1e-3), leaf


def test_curvature_and_shapes_are_those_of_the_library(source, report, page):
    facts, _ = unpacked(page)
    ends = lens.curvature(source, TEXT, most=30, tolerance=1e-2)
    assert facts['curvature']['all']['top'] == pytest.approx(ends['all'].top, rel=1e-3)
    assert report.flow.n_params == facts['parameters']
    assert f'{report.flow.n_params:,} parameters' in page


def test_tokens_are_shown_as_text(source, tokens, page):
    facts, _ = unpacked(page)
    assert ''.join(facts['text'][str(token)] for token in facts['tokens']) == TEXT
    stray = report_lib.collect(loaded(ByteTokenizer(), **SMALL), 'é', skip=report_lib.SECTIONS)
    texts = [stray.facts['text'][token] for token in stray.facts['tokens']]
    assert texts == ['\\xc3', '\\xa9']
    assert stray.facts['shown'] == ['‥', 'é']
    bare = source.model, source.params
    texts = report_lib.collect(bare, tokens, skip=report_lib.SECTIONS).facts['text']
    assert texts[3] == '<3>'


# The file


def test_the_page_is_one_file(page):
    assert '<title>A &lt;model&gt;</title>' in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert len(re.findall('</script>', page)) == 2  # the text of the model closes none
    assert "default-src 'none'" in page


def test_parts_can_be_left_out(source):
    report = report_lib.collect(source, TEXT, skip=report_lib.SECTIONS)
    left = {name.partition('.')[0] for name in report.arrays}
    assert left == {'loss', 'target', 'norm', 'pattern', 'logit', 'attribution', 'score'}
    assert report.flow is None
    with pytest.raises(UsageError, match="no section 'nothing'"):
        report_lib.collect(source, TEXT, skip=['nothing'])


def test_a_large_page_has_coarser_patterns(report, monkeypatch):
    monkeypatch.setattr('gpt2_jax.reports.model.MAX_BYTES', 1000)
    facts, arrays = unpacked(render(report))
    assert facts['levels'] == 15
    fine = (report.arrays['pattern'] / 255) ** 2
    np.testing.assert_allclose((arrays['pattern'] / 15) ** 2, fine, atol=1 / 14)


# The terminal


def test_a_head_that_is_not_there_is_reported_before_anything_else(source):
    console = Console(file=io.StringIO())
    with pytest.raises(UsageError, match=r'no head h_9\.attn\.0: .* 2 layers of 2 heads, '):
        terminal.show(source, TEXT, console, head=(9, 0))
    assert console.file.getvalue() == ''


def test_the_map_of_a_head_says_what_its_signs_mean(source):
    console = Console(file=io.StringIO(), width=80)
    terminal.show(source, TEXT, console, head=(1, 1))
    last = console.file.getvalue().rpartition('\n\n')[2].splitlines()
    assert last[0].startswith('h_1.attn.1: rows look at columns; the signs " .:-=+*#%@": weight 0')
    assert len(last) == 1 + len(source.tokenizer.encode(TEXT))


def test_a_terminal_shows_a_character_of_several_tokens_whole():
    """The bytes of one that is cut off are escapes, and so are control characters."""
    console = Console(file=io.StringIO(), width=80)
    terminal.show(loaded(ByteTokenizer()), [*'é\n語!\x1b[2J'.encode(), 0xE8], console)
    assert console.file.getvalue().startswith('é⏎\n語!\\x1b[2J\\xe8\nloss: ')


def test_a_closed_pipe_is_left_to_the_script(source):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        terminal.show(source, TEXT, terminal.PipeConsole(file=Closed(), width=80))


@pytest.mark.parametrize('variables', [{'NO_COLOR': '1'}, {'TERM': 'dumb'}])
def test_a_terminal_without_colours_gets_what_a_pipe_gets(source, variables):
    shown = []
    for options in (
        {'force_terminal': True, '_environ': {'TERM': 'xterm-256color'} | variables},
        {'force_terminal': False},
    ):
        console = Console(file=io.StringIO(), width=80, **options)
        terminal.show(source, TEXT, console, head=(1, 1))
        shown.append(re.sub('\x1b\\[[0-9;]*m', '', console.file.getvalue()))  # bold
    assert shown[0] == shown[1]
    in_colour = Console(
        file=io.StringIO(), force_terminal=True, _environ={'TERM': 'xterm-256color'}
    )
    assert terminal.in_colour(in_colour)


# The browser


@pytest.fixture(scope='module')
def tab():
    if not CHROMIUM:
        pytest.skip('no Chromium here: apt-get install chromium')
    with browser() as tab:
        yield tab


@pytest.fixture
def show(tab, tmp_path):
    """Shows a page in a browser. In the end nothing may have gone wrong or been asked for."""
    path = tmp_path / 'report.html'
    tab.events.clear()

    def show(page: str):
        path.write_text(page, 'utf-8')
        tab.open(path)
        return tab

    yield show
    assert tab.errors() == []
    assert [url for url in tab.requests() if not url.startswith((path.as_uri(), 'about:'))] == []


@pytest.fixture
def shown(show, page):
    return show(page)


def test_hovering_a_token_tells_its_loss_and_the_guesses(shown, source, tokens):
    shown.hover('#token-7')
    shown.wait('!document.getElementById("tip").hidden')
    said = shown.text('#tip')
    loss = lens.token_losses(source, TEXT)[0, 6]
    probs = np.asarray(jax.nn.softmax(lens.capture(source, TEXT, 'logits')['logits'][0, 6]))
    assert f'loss {loss:.3f} nats' in said
    assert f'rank {(probs > probs[tokens[7]]).sum() + 1}' in said
    likeliest = source.tokenizer.decode([probs.argmax()])
    assert said.index(likeliest.replace(' ', '␣').replace('\n', '⏎').replace('\t', '⇥')) > 0


def test_a_character_of_several_tokens_is_whole_at_its_last(show):
    report = report_lib.collect(loaded(ByteTokenizer(), **SMALL), 'a語', skip=report_lib.SECTIONS)
    tab = show(render(report))
    assert texts(tab, '#tokens .token') == ['a', '‥', '‥', '語', 'next?']
    assert '‥: part of a character' in tab.text('#legend')
    tab.click('#token-3')
    assert tab.text('#chosen h2') == 'Token 3: 語'
    assert tab.text('#chosen .quoted:not(h2 *)') == 'a‥‥'


def test_clicking_a_token_chooses_it(shown, source):
    shown.click('#token-9')
    loss = lens.token_losses(source, TEXT)[0, 8]
    assert float(shown.text('#chosen-loss')) == pytest.approx(loss, abs=6e-4)
    assert 'token=9' in shown.run('location.hash')
    shown.key('ArrowLeft')
    assert 'token=8' in shown.run('location.hash')
    assert shown.run('document.querySelectorAll(".token.here").length') >= 1


def signed(text: str) -> float:
    """A number as the page writes it, with a minus sign of its own."""
    return float(text.replace('\N{MINUS SIGN}', '-'))


def mean_losses(text: str) -> tuple[float, float]:
    """Both numbers of '2.136 → 2.437 nats (+0.301)'."""
    return tuple(float(part.split()[0]) for part in text.split('→'))


def percent(text: str) -> float:
    return float(text.replace('%', '').strip()) / 100


def click_head(tab, cfg, layer: int, head: int) -> None:
    """In the picture of all heads, where names stand to the left and above."""
    left, top = 34, 16
    width, height = tab.run(
        '(c => [c.clientWidth, c.clientHeight])(document.getElementById("heads"))'
    )
    x = left + (width - left) * (head + 0.5) / cfg.n_head
    tab.click('#heads', x=x, y=top + (height - top) * (layer + 0.5) / cfg.n_layer)


def texts(tab, selector: str) -> list[str]:
    return tab.run(f'[...document.querySelectorAll({selector!r})].map(e => e.textContent)')


def weights_shown(tab) -> dict[int, float]:
    """The largest weights of the chosen head from the chosen position, by position."""
    labels, numbers = texts(tab, '#weights .label'), texts(tab, '#weights .number')
    return {int(label.split(' ')[0]): percent(n) for label, n in zip(labels, numbers, strict=True)}


def test_selecting_a_head_shows_its_weights(shown, source):
    """By the picture of all heads, by key, and from the address."""
    layer, head, position = 1, 0, 8
    pattern = lens.capture(source, TEXT, f'h_{layer}.pattern')[f'h_{layer}.pattern'][0]
    shown.click(f'#token-{position + 1}')
    click_head(shown, source.model.cfg, layer, head)
    assert shown.text('#head-name').startswith('Head h_1.attn.0')
    weights = weights_shown(shown)
    assert len(weights) == 6
    for at, weight in weights.items():
        assert weight == pytest.approx(pattern[head, position, at], abs=0.011)
    shown.key('ArrowUp')  # the picture of all heads has the focus
    assert shown.text('#head-name').startswith('Head h_0.attn.0')
    shown.key('ArrowDown')
    shown.key('l')
    assert shown.text('#head-name').startswith('Head h_1.attn.1')
    assert 'head=h_1.attn.1' in shown.run('location.hash')
    scores = lens.head_scores(source).induction
    shown.run("change({score: 'induction'})")
    strongest = shown.run('document.querySelector("#strongest button").textContent')
    assert strongest == 'h_{}.attn.{}'.format(*np.unravel_index(scores.argmax(), scores.shape))


def test_ablating_a_head_shows_each_loss(shown, source):
    plain = lens.token_losses(source, TEXT)[0]
    without = lens.ablate(source, TEXT, 'h_1.attn.1')['h_1.attn.1'][0]
    shown.run("change({layer: 1, head: 1, p: 4, view: 'attention'})")
    shown.click('#ablate')
    assert 'h_1.attn.1' in shown.text('#ablated')
    before, after = mean_losses(shown.text('#mean-without'))
    assert before == pytest.approx(plain.mean(), abs=6e-4)
    assert after == pytest.approx(without.mean(), abs=1.1e-3)
    assert shown.text('#mean-without') == shown.text('#ablate-result').strip()
    assert float(shown.text('#chosen-without')) == pytest.approx(without[4], abs=6e-4)
    assert 'whole model' not in shown.text('#ablated')
    shown.run("change({view: 'layers'})")
    assert 'show the whole model' in shown.text('#ablated')
    shown.key('a')
    assert shown.run('document.getElementById("ablated").hidden')
    shown.run("change({view: 'ablation'})")
    shown.click('[data-part="h_0.mlp"]')
    without = lens.ablate(source, TEXT, 'h_0.mlp')['h_0.mlp'][0]
    _, after = mean_losses(shown.text('#mean-without'))
    assert after == pytest.approx(without.mean(), abs=1.1e-3)


def test_the_layers_have_the_ranks_of_the_lens(shown, source, tokens):
    shown.key('2')
    shown.run('change({p: 5})')
    logits = lens.logit_lens(source, TEXT)[:, 0, 5]
    ranks = (logits > logits[:, tokens[6], None]).sum(-1) + 1
    assert list(map(int, texts(shown, '#layers td:nth-child(3)'))) == ranks[::-1].tolist()


def test_the_attribution_sums_to_the_logit(shown, source, tokens):
    shown.key('3')
    shown.run("change({p: 5, terms: 'logit'})")
    logit = lens.capture(source, TEXT, 'logits')['logits'][0, 5, tokens[6]]
    total = signed(shown.text('#attribution-sum').rpartition(' ')[2])
    assert total == pytest.approx(logit, abs=6e-4)
    assert sum(map(signed, texts(shown, '#terms .number'))) == pytest.approx(logit, abs=0.01)


def test_every_view_is_drawn_in_both_themes_and_on_a_phone(shown):
    """With something to see, a text for each picture, and no scrolling sideways."""
    for width in (1280, 390):
        shown.size(width, 800)
        for theme in ('light', 'dark'):
            shown.run(f'setTheme({theme!r})')
            for view in shown.run('Object.keys(VIEWS)'):
                shown.run(f'change({{view: {view!r}}})')
                assert len(shown.text('#view')) > 100, view
                assert shown.run('document.documentElement.scrollWidth') <= width, (view, width)
                if view == 'layers' and width == 1280:  # every column can be seen
                    box = 'document.querySelector("#layers").parentNode'
                    assert shown.run(f'{box}.scrollWidth <= {box}.clientWidth')
                unnamed = shown.run(
                    '[...document.querySelectorAll("#view canvas, #view svg")].filter('
                    'e => !e.getAttribute("aria-label") && !e.getAttribute("aria-hidden")).length'
                )
                assert unnamed == 0, view
                # Every table that is folded away opens.
                shown.run(
                    '[...document.querySelectorAll("#view details")].forEach(d => d.open = true)'
                )
    shown.size(1280, 900)


def test_keys_reach_everything(shown):
    for number, view in enumerate(shown.run('Object.keys(VIEWS)'), 1):
        shown.key(str(number))
        assert f'view={view}&' in shown.run('location.hash')
    before = shown.run('document.documentElement.dataset.theme')
    shown.key('t')
    assert shown.run('document.documentElement.dataset.theme') != before
    shown.key('?')
    assert shown.run('document.getElementById("guide").open')


@pytest.mark.parametrize(
    'changes',
    [
        SMALL,
        pytest.param(dict(n_layer=48, n_embd=8, n_head=4), marks=pytest.mark.long),
    ],
)
def test_a_model_of_one_layer_and_one_of_forty_eight(show, changes):
    """Two tokens are enough, and what every page has."""
    source = loaded(ByteTokenizer(), **changes)
    report = report_lib.collect(source, 'hi', skip=report_lib.SECTIONS)
    tab = show(render(report))
    assert re.search(r' (1 layer|48 layers) · (1 head|4 heads) · ', tab.text('#about'))
    for view in tab.run('Object.keys(VIEWS)'):
        tab.run(f'change({{view: {view!r}}})')
        assert tab.text('#view')


# A page of GPT-2's size: layers, heads, vocabulary and tokens of the smallest GPT-2. Only the width
# is small, which no part of a page but a few names depends on.

LARGE = dict(n_layer=12, n_head=12, n_embd=24, n_positions=256, vocab_size=50257)


@pytest.fixture(scope='module')
def large():
    """The model and its text; the page's arrays, of which the slow ones are noise but for a head.

    The noise compresses less than any figures of a model do.
    """
    rng = np.random.default_rng(0)
    model = tiny(**LARGE)
    source = SimpleNamespace(model=model, params=rough_params(model))
    L, H, T = model.cfg.n_layer, model.cfg.n_head, model.cfg.n_positions
    tokens = rng.integers(0, model.cfg.vocab_size, T).astype(np.int32)
    report = report_lib.collect(source, tokens, skip=report_lib.SECTIONS)
    arrays = dict(report.arrays)
    noise = {
        'ablation': (L, H + 1, T),
        'gradient.resid': (L + 1, T * (T + 1) // 2),
        'gradient.params': (T, len(report.facts['leaves'])),
    }
    arrays |= {name: rng.random(shape, np.float32) for name, shape in noise.items()}
    arrays |= {
        f'jacobian.{name}': rng.permuted(arrays[f'logit.{name}'], axis=0)
        for name in ('top', 'prob', 'rank', 'right')
    }
    without = lens.ablate(source, tokens, 'h_7.attn.3')['h_7.attn.3'][0]
    arrays['ablation'][7, 3, :-1] = without - arrays['loss'][:-1]
    # Words of seven letters: more than the tokens of GPT-2's BPE have.
    text = {token: f' word{token % 1000:03}' for token in report.facts['text']}
    report = report._replace(arrays=arrays, facts=report.facts | {'text': text})
    return SimpleNamespace(source=source, tokens=tokens, report=report, without=without)


@pytest.mark.long
def test_a_page_of_the_size_of_gpt2(show, large):
    page = render(large.report)
    assert 5 * 2**20 < len(page.encode()) < 10 * 2**20
    taken = lens.capture(large.source, large.tokens)
    probs = np.asarray(jax.nn.softmax(taken['logits'][0, 99]))
    right = large.tokens[100]
    tab = show(page)
    tab.hover('#token-100')
    tab.wait('!document.getElementById("tip").hidden')
    assert f'loss {-np.log(probs[right]):.3f} nats' in tab.text('#tip')
    assert f'rank {(probs > probs[right]).sum() + 1}' in tab.text('#tip')

    tab.click('#token-100')
    click_head(tab, large.source.model.cfg, 7, 3)
    assert tab.text('#head-name').startswith('Head h_7.attn.3')
    for at, weight in weights_shown(tab).items():
        assert weight == pytest.approx(taken['h_7.pattern'][0, 3, 99, at], abs=0.011)

    tab.click('#ablate')
    assert float(tab.text('#chosen-without')) == pytest.approx(large.without[99], abs=6e-4)
    tab.key('2')
    ranks = []
    for name in residual_stream(large.source.model.cfg):
        logits_V = unembed(large.source, taken[name][:, 99:100])[0, 0]
        ranks.append((logits_V > logits_V[right]).sum() + 1)
    assert list(map(int, texts(tab, '#layers td:nth-child(3)'))) == ranks[::-1]
    for view in tab.run('Object.keys(VIEWS)'):
        tab.run(f'change({{view: {view!r}}})')
