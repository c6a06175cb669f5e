"""Scores of a text = the figures of training = arithmetic by hand; and the script evaluate.py."""

import ast
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
import runs
from bpe import SMALL
from test_huggingface import FIXTURE, LETTERS, convert_fixture
from tiny import rough_params, tiny

from gpt2_jax.config import default_config, resolve
from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import ByteTokenizer, CharTokenizer, encode_special
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import harness, lambada, score
from gpt2_jax.workdir import restore


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run, its text, and the part of the text that was kept for validation."""
    folder = tmp_path_factory.mktemp('score')
    path = runs.write_text(folder / 'text.txt')
    assert runs.quiet_train(runs.make_config(path), folder / 'run')[0] == 0
    text = path.read_text()
    (folder / 'val.txt').write_text(text[len(text) - math.ceil(len(text) / 10) :])
    return folder


def restored(tokenizer=SMALL, seed=0, **changes) -> restore.Restored:
    """A small random model, as restore.load returns it."""
    model = tiny(**{'n_layer': 1, 'vocab_size': tokenizer.vocab_size} | changes)
    config = default_config()
    config.model.update(
        {
            name: value
            for name, value in dataclasses.asdict(model.cfg).items()
            if name != 'vocab_size'
        }
    )
    return restore.Restored(7, model, rough_params(model, seed), tokenizer, resolve(config), {})


def by_hand(model: restore.Restored):
    """The function losses(ids) -> (nats, right): each of ids[1:] given the ids before, in fp64."""
    forward = jax.jit(model.model.apply)

    def losses(ids):
        # The model is causal: the padding after the ids changes nothing before it.
        window = np.resize(ids[:-1], (1, model.model.cfg.n_positions))
        logits = np.float64(forward({'params': model.params}, np.int32(window)))[0, : len(ids) - 1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -logp[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]

    return losses


def test_the_validation_text_gives_the_loss_of_training(run):
    summary = json.loads((run / 'run/summary.json').read_text())
    model = restore.load(run / 'run', 'latest')
    context = model.model.cfg.n_positions
    for stride in (None, context):  # the context by default
        got = score.score_text(
            model, str(run / 'val.txt'), stride=stride, rows=runs.SMALL['train.batch_size']
        )
        assert got.evaluation.loss == summary['final_val_loss']
        assert got.protocol.startswith(f'context {context}, stride {context} (each window')
    own = score.score_corpus(model)
    assert own.evaluation == got.evaluation
    assert own.protocol == got.protocol
    more = score.score_text(model, str(run / 'val.txt'), stride=1)
    assert more.evaluation.tokens == got.evaluation.tokens
    assert more.evaluation.loss != got.evaluation.loss
    same = score.score_corpus(model, stride=1)
    assert same.evaluation.loss == pytest.approx(more.evaluation.loss, rel=1e-6)


def test_the_figures_are_sums_divided_by_counts(tmp_path):
    spaced = " the end , they 'll two @-@ part é . \n"
    (tmp_path / 'a.txt').write_text(spaced, 'utf-8')
    model = restored(n_positions=64)
    got = score.score_text(model, str(tmp_path / 'a.txt'), detokenizer='wikitext', context=64)
    ids = SMALL.encode("the end, they'll two-part é.\n")
    nats = by_hand(model)(ids)[0].sum()
    n_bytes = len("the end, they'll two-part é.\n".encode()) - len(SMALL.decode_bytes(ids[:1]))
    assert (got.evaluation.tokens, got.evaluation.bytes) == (len(ids) - 1, n_bytes)
    assert (got.words, got.line_ends) == (10, 1)
    figures = {
        'nats': nats / (len(ids) - 1),
        'bits': nats / math.log(2) / n_bytes,
        'token': math.exp(nats / (len(ids) - 1)),
        'word': math.exp(nats / 10),
        'lines too': math.exp(nats / 11),
    }
    assert got.evaluation.loss == pytest.approx(figures['nats'], rel=1e-5)
    assert got.perplexity_per(got.words) == pytest.approx(figures['word'], rel=1e-4)
    printed = [
        float(number) for number in re.findall(r'(?:loss|perplexity|bytes?,|;) ([\d.]+)', str(got))
    ]
    assert printed == pytest.approx(
        [figures[name] for name in ('nats', 'token', 'word', 'lines too')], rel=1e-4
    )
    assert f'{got.evaluation.bits_per_byte:.4f} bits per byte' in str(got)
    assert got.evaluation.bits_per_byte == pytest.approx(figures['bits'], rel=1e-5)
    for words in (
        'context 64, stride 64',
        'detokenizer wikitext',
        'tokenizer gpt2 (277)',
        '10 words',
    ):
        assert words in str(got)


@pytest.mark.parametrize(('context', 'stride'), [(12, 12), (12, 5), (7, 7), (7, 2)])
def test_context_and_stride_are_obeyed(tmp_path, context, stride):
    (tmp_path / 'a.txt').write_text('to be or not to be, that is the question')
    model = restored(ByteTokenizer())
    losses, ids = by_hand(model), ByteTokenizer().encode((tmp_path / 'a.txt').read_text())
    starts = [
        max(0, math.ceil((target - context) / stride) * stride) for target in range(1, len(ids))
    ]
    nats = sum(losses(ids[start : target + 1])[0][-1] for target, start in enumerate(starts, 1))
    got = score.score_text(model, str(tmp_path / 'a.txt'), context=context, stride=stride)
    assert got.evaluation.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_a_part_of_a_text(tmp_path):
    """Words of the whole text say nothing about a part of it."""
    (tmp_path / 'a.txt').write_text('to be or not to be, that is the question')
    model = restored(ByteTokenizer())
    whole = score.score_text(model, str(tmp_path / 'a.txt'))
    part = score.score_text(model, str(tmp_path / 'a.txt'), max_targets=24)
    assert (part.evaluation.tokens, part.evaluation.split_tokens) == (24, 39)
    assert 'over 24 tokens (39 in all: an evenly spread part)' in str(part)
    assert (whole.words, part.words) == (10, None)
    assert 'per word' not in str(part)
    assert (
        score.score_text(model, str(tmp_path / 'a.txt'), max_targets=39).evaluation
        == whole.evaluation
    )


def test_the_part_that_training_evaluated_is_scored_by_default(run, tmp_path):
    config = runs.make_config(run / 'text.txt', eval__tokens=100)
    assert runs.quiet_train(config, tmp_path)[0] == 0
    record = runs.metrics(tmp_path)[-1]
    assert (record['tokens'], record['split_tokens']) == (96, record['split_tokens'])
    assert record['split_tokens'] > 300
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['val_split_tokens'] == record['split_tokens']
    model = restore.load(tmp_path, 'latest')
    got = score.score_corpus(model).evaluation
    assert got.loss == summary['final_val_loss'] == record['loss']
    assert score.score_corpus(model, max_targets=0).evaluation.tokens == record['split_tokens']


def test_figures_as_json(run):
    code, out, err = runs.script('evaluate', f'--ckpt_dir={run}/run', '--json', '--step=latest')
    assert code == 0, err
    figures = json.loads(out)
    summary = json.loads((run / 'run/summary.json').read_text())
    assert (figures['step'], figures['loss']) == (summary['steps'], summary['final_val_loss'])
    bits = figures['loss'] / math.log(2)  # one byte a character
    assert figures['bits_per_byte'] == pytest.approx(bits, rel=1e-12)
    assert figures['protocol'].startswith('context 16')


def write_passages(path, *passages):
    path.write_text(''.join(json.dumps({'text': passage}) + '\n' for passage in passages))
    return str(path)


def test_lambada_by_hand(tmp_path):
    tokenizer = CharTokenizer(' abc')
    model = restored(tokenizer, seed=5)  # a model that is right for some passages
    T, losses = model.model.cfg.n_positions, by_hand(model)
    rng = np.random.default_rng(0)
    passages = [
        ' '.join(''.join(rng.choice(list('abc'), rng.integers(1, 3))) for _ in range(n))
        for n in rng.integers(2, 9, 80)
    ]
    passages[5] = ' a  b  '  # spaces count, except after the last word
    nats, right, last_nats, last_right, cropped = [], [], [], [], 0
    for passage in passages:
        before, word = passage.rstrip().rsplit(' ', 1)
        answer = 1 + len(word)  # each character is a token, and so is the space
        ids = tokenizer.encode(f'{before} {word}')
        cropped += len(ids) > T + 1
        each, hits = losses(ids[-T - 1 :])
        nats.append(each[-answer:].sum())
        right.append(hits[-answer:].all())
        last_nats.append(each[-1])
        last_right.append(hits[-1])
    assert 0 < cropped < 80
    assert 0 < sum(right) < sum(last_right) < 80
    path = write_passages(tmp_path / 'a.jsonl', *passages)
    for rows in (1, 7, 128):
        got = lambada.score_lambada(model, path, rows=rows)
        assert (got.passages, got.cropped, got.context) == (80, cropped, T)
        assert got.accuracy == pytest.approx(np.mean(right))
        assert got.token_accuracy == pytest.approx(np.mean(last_right))
        assert got.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert got.token_perplexity == pytest.approx(math.exp(np.mean(last_nats)), rel=1e-4)
    assert f'accuracy {np.mean(right):.2%}, perplexity {got.perplexity:.4f}; last token' in str(got)


def test_the_last_word_may_be_many_tokens(tmp_path):
    """The answer is the last word with the space before it, in the tokens of GPT-2's tokenizer."""
    before, answer = SMALL.encode('the end, they'), SMALL.encode(" they'll")
    assert len(answer) > 2
    model = restored(n_positions=16)
    nats, _ = by_hand(model)(np.concatenate([before, answer]))
    got = lambada.score_lambada(
        model, write_passages(tmp_path / 'a.jsonl', "the end, they they'll")
    )
    assert got.perplexity == pytest.approx(math.exp(nats[-len(answer) :].sum()), rel=1e-4)


def test_lambada_is_compiled_once(tmp_path, monkeypatch):
    traced = []
    make = lambada.make_answer_step

    def counting(*args):
        step = make(*args)
        return lambda params, batch: traced.append(batch['inputs'].shape) or step(params, batch)

    monkeypatch.setattr(lambada, 'make_answer_step', counting)
    passages = [f'{"ab " * n}c' for n in range(1, 6)]
    lambada.score_lambada(restored(), write_passages(tmp_path / 'a.jsonl', *passages), rows=2)
    assert traced == [(2, 10)]  # as long as the longest passage


@pytest.mark.parametrize(
    ('passages', 'words'),
    [
        (['the end', 'word'], "passage 2 is 'word': expected at least two words"),
        (['the end', ' word '], 'passage 2 is'),
        (['  '], 'passage 1 is'),
        ([], 'holds no passages'),
        (
            ['a b', 'the ' + 'x' * 13],
            'passage 2 has a last word of 14 tokens, and the context is 12',
        ),
    ],
)
def test_passages_without_an_answer_are_refused(tmp_path, passages, words):
    with pytest.raises(UserError, match=words):
        lambada.score_lambada(restored(), write_passages(tmp_path / 'a.jsonl', *passages))


def test_an_answer_may_fill_the_context(tmp_path):
    passages = write_passages(tmp_path / 'a.jsonl', 'the ' + 'x' * 11)
    assert lambada.score_lambada(restored(), passages).passages == 1


def test_passages_of_an_unknown_character_are_named(tmp_path):
    path = write_passages(tmp_path / 'a.jsonl', 'the end', 'the Zend')
    with pytest.raises(UserError, match=r"a\.jsonl, passage 2: unknown character 'Z'"):
        lambada.score_lambada(restored(CharTokenizer(' dehnt')), path)


def test_passages_come_in_json_lines_or_parquet(tmp_path):
    with pytest.raises(UsageError, match=r'a.txt is not a file of passages: expected .jsonl'):
        lambada.score_lambada(restored(), str(tmp_path / 'a.txt'))


@pytest.mark.parametrize(
    ('context', 'stride', 'words'),
    [
        (
            13,
            None,
            'context = 13 is longer than the 12 positions of the checkpoint: '
            'give at most --context=12',
        ),
        (8, 9, 'stride = 9 is more than the context of 8, .*: give at most --stride=8'),
        (None, 13, 'stride = 13 is more than the context of 12'),
        (0, None, 'context = 0 is not allowed: expected at least 1'),
        (8, 0, 'stride = 0 is not allowed: expected at least 1'),
    ],
)
def test_impossible_windows_are_refused(context, stride, words):
    with pytest.raises(UsageError, match=words):
        score.make_windows(restored(), context=context, stride=stride, rows=1)


def test_a_split_that_does_not_exist():
    with pytest.raises(UsageError, match="no split 'foo': expected one of train, val"):
        score.score_corpus(restored(), split='foo')


def test_a_checkpoint_of_more_devices_than_this_machine_has():
    model = restored()
    model.config.mesh.update(data=512)
    setup, _ = score.build(
        model,
        score.make_windows(model, context=None, stride=None, rows=3),
        SimpleNamespace(tokenizer=SMALL),
    )
    assert setup.mesh.size == 1
    assert len(jax.devices()) < 512


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_kernels_of_training_do_not_limit_an_evaluation(monkeypatch, platform):
    """A CPU has none, and on a GPU they need windows of a multiple of 64 tokens."""
    model = restored(n_head=1, n_embd=16, n_positions=64, dtype='bfloat16')
    model.config.model.kernels = model.config.optim.implementation = 'fused'
    monkeypatch.setattr('gpt2_jax.training.setup.platform_of', lambda device: platform)
    windows = score.make_windows(model, context=30, stride=None, rows=3)
    setup, _ = score.build(model, windows, SimpleNamespace(tokenizer=SMALL))
    assert setup.kernels.attention == {'cpu': 'xla', 'gpu': 'cudnn'}[platform]


def test_rows_are_divided_among_all_devices(monkeypatch):
    """Five rows on a mesh of 2 x 2 are processed as eight."""
    model, built, devices = restored(), [], jax.devices() * 4
    model.config.mesh.update(data=2, fsdp=2)
    monkeypatch.setattr(score.jax, 'devices', lambda: devices)
    monkeypatch.setattr(score.jax, 'device_put', lambda params, layout: params)
    monkeypatch.setattr(
        score, 'build_setup', lambda config, dataset: built.append(config) or mock.MagicMock()
    )
    score.build(model, score.make_windows(model, context=None, stride=None, rows=5))
    assert built[0].train.batch_size == 8


@pytest.mark.long
def test_lambada_on_a_mesh_of_two_devices(tmp_path):
    """Any number of rows: they are rounded up to a multiple of the devices."""
    words = ['the', 'end,', 'they', 'the', 'end', 'the', 'two', 'end', 'of', 'it', 'the']
    path = write_passages(tmp_path / 'a.jsonl', *(' '.join(words[:n]) for n in range(2, 9)))
    program = (
        'import sys; sys.path.insert(0, "tests"); import test_score as t;'
        'model = t.restored(); model.config.mesh.update(data=2);'
        f'print([t.lambada.score_lambada(model, {path!r}, rows=n)[1:] for n in (1, 3, 4)])'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        capture_output=True,
        text=True,
        env=os.environ | {'JAX_NUM_CPU_DEVICES': '2', 'JAX_PLATFORMS': 'cpu'},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-500:]
    one = lambada.score_lambada(restored(), path)
    for figures in ast.literal_eval(done.stdout):
        assert figures == pytest.approx(one[1:], rel=1e-5)


def harness_nats(losses, ids, T):
    """Each id as a target of lm-evaluation-harness: from <|endoftext|>, from full last windows."""
    start, nats = [SMALL.separator], 0.0
    for target in range(len(ids)):
        first = target - target % T  # the first target of its window
        end = min(first + T, len(ids))
        window = np.concatenate([start, ids])[max(0, end - T) : target + 2]
        nats += losses(window)[0][-1]
    return nats


def test_documents_by_themselves(tmp_path):
    """In documents of less than one window, one, and several with a last one moved back."""
    documents = ['the', '', ' the end, they  two\nparts ', 'x' * 12, 'x y ' * 9 + '<|endoftext|>é']
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps({'page': document}) + '\n' for document in documents))
    model = restored()
    T, losses = model.model.cfg.n_positions, by_hand(model)
    encoded = [encode_special(SMALL, document) for document in documents]
    assert [len(ids) for ids in encoded if len(ids) > T]
    nats = sum(harness_nats(losses, ids, T) for ids in encoded)
    for rows in (1, 8):
        got = harness.score_documents(model, str(path), text_field='page', rows=rows)
        n_tokens, n_bytes = sum(map(len, encoded)), len(''.join(documents).encode())
        assert (got.evaluation.tokens, got.evaluation.bytes) == (n_tokens, n_bytes)
        assert got.evaluation.loss == pytest.approx(nats / n_tokens, rel=1e-6)
        assert got.words == sum(len(re.split(r'\s+', document)) for document in documents) == 29
        assert got.perplexity_per(got.words) == pytest.approx(math.exp(nats / 29), rel=1e-5)
    assert '5 documents, each starts from <|endoftext|>; context 12' in str(got)
    with pytest.raises(UsageError, match=r'byte tokenizer has no <\|endoftext\|>'):
        harness.score_documents(restored(ByteTokenizer()), str(path), text_field='page')
    (tmp_path / 'none.jsonl').touch()
    with pytest.raises(UserError, match=r'none\.jsonl holds no text'):
        harness.score_documents(model, str(tmp_path / 'none.jsonl'))


def test_the_script_on_a_converted_folder(tmp_path):
    """Published weights have no corpus of their own, but any text can be scored."""
    (tmp_path / 'letters.json').write_text(tokenizers.to_json(LETTERS))
    convert_fixture(FIXTURE, ckpt_dir=tmp_path / 'run', tokenizer_file=tmp_path / 'letters.json')
    code, _, err = runs.script('evaluate', f'--ckpt_dir={tmp_path}/run')
    assert code == 2
    assert err.count('\n') == 1
    assert 'the weights of' in err
    assert '--text=FILE or --lambada=FILE' in err
    settings = tmp_path / 'run' / 'config.json'
    for damage in (lambda: None, lambda: settings.write_text('{'), settings.unlink):
        damage()  # no training wrote this file, so none could write it again
        code, _, err = runs.script('steps', 'find', f'--workdir={tmp_path}/run', '--text=A')
        assert (code, err.count('\n')) == (1, 1)
        assert 'the weights of' in err
        assert 'which come without their training' in err
    text = LETTERS.alphabet * 3 + '\n'
    (tmp_path / 'a.txt').write_text(text[:-1])
    code, out, err = runs.script(
        'evaluate', f'--ckpt_dir={tmp_path}/run', f'--text={tmp_path}/a.txt', '--stride=8'
    )
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f'step 0, {tmp_path}/a.txt: loss ')
    assert 'over 191 tokens of 191 bytes' in lines[0]
    assert lines[1].startswith('per word: perplexity')
    assert 'over 1 word of' in lines[1]
    assert len(lines) == 3
    (tmp_path / 'a.txt').write_text(text[:2])
    code, out, err = runs.script(
        'evaluate', f'--ckpt_dir={tmp_path}/run', f'--text={tmp_path}/a.txt'
    )
    assert code == 0, err
    assert 'over 1 token of 1 byte\n' in out
    assert 'context 32, stride 8 (the whole first window' in lines[2]
    assert 'detokenizer none' in lines[2]
    code, shorter, _ = runs.script(
        'evaluate',
        f'--ckpt_dir={tmp_path}/run',
        f'--text={tmp_path}/a.txt',
        '--stride=8',
        '--context=16',
        '--batch_size=2',
    )
    assert code == 0
    assert 'context 16, stride 8' in shorter


def test_the_script_on_lambada(tmp_path, run):
    words = (run / 'text.txt').read_text().split()[:12]
    (tmp_path / 'a.jsonl').write_text(json.dumps({'passage': ' '.join(words).replace('.', '')}))
    code, out, err = runs.script(
        'evaluate', f'--ckpt_dir={run}/run', f'--lambada={tmp_path}/a.jsonl', '--text_field=passage'
    )
    assert code == 0, err
    assert 'a.jsonl: last word: accuracy' in out
    assert 'over 1 passage\n' in out
    assert 'no stop-word filter' in out
    assert 'context 16, 1 passage cropped' in out


def test_with_byte_tokens_bits_per_byte_is_the_loss_in_bits(tmp_path):
    (tmp_path / 'a.txt').write_text('été ' * 9, 'utf-8')
    got = score.score_text(restored(ByteTokenizer()), str(tmp_path / 'a.txt')).evaluation
    assert got.bits_per_byte == pytest.approx(got.loss / math.log(2))
    assert got.bytes == 9 * 6 - 1
