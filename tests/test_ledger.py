"""The ledger: from a step to its text and file, and from a text to all steps that trained on it."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import runs
from bpe import MERGES

from gpt2_jax import files, prepare
from gpt2_jax.config import default_config, resolve, to_json
from gpt2_jax.data import documents, shards, tokenizers
from gpt2_jax.data.batches import train_batch
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.tokenizers import ByteTokenizer, Gpt2Tokenizer
from gpt2_jax.diagnostics import ledger, origins
from gpt2_jax.diagnostics.ledger import Addressing, occurrences, row_starts, sightings
from gpt2_jax.diagnostics.origins import TokenBytes
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.workdir import history

VERSE = "To be, or not to be: é漢🎭 the\n\n the they'll\n"


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    """A vocabulary of a few merges stands for GPT-2's."""
    monkeypatch.setattr(tokenizers, 'find_merges', lambda: MERGES)


def run_folder(folder, corpus, tokenizer='char', **changes):
    """The folder of a run that has not begun: the ledger needs no more than its configuration."""
    options = {'train__steps': 40, 'data__tokenizer': tokenizer} | changes
    config = runs.make_config(corpus, **options)
    with config.unlocked():
        config.train.seq_len = config.model.n_positions
    folder.mkdir()
    (folder / 'config.json').write_text(to_json(config))
    return folder


def write_inputs(folder):
    """Two texts and three files of records: {name: the text of each line or row}."""
    texts = {name: [VERSE * 9 + name, VERSE * 7, 'x' * 50, '', 'last\n'] for name in 'abc'}
    rows = {name: [f'{name} {i}: {text}' for i, text in enumerate(texts[name])] for name in 'abc'}
    (folder / 'one.txt').write_bytes((VERSE * 23).encode())
    (folder / 'two.txt').write_bytes(('\n' + VERSE * 3 + 'no end').encode())
    lines = {name: '\n\n'.join(json.dumps({'text': row}) for row in rows[name]) for name in 'ab'}
    (folder / 'a.jsonl').write_bytes(lines['a'].encode())
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines['b'].encode()))
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({'text': rows['c']}), folder / 'c.parquet')
    return ['one.txt', 'a.jsonl', 'b.jsonl.gz', 'two.txt', 'c.parquet'], rows


def text_at(folder, rows, origin, n_bytes):
    """What the file itself holds at a place: read with none of the code under test."""
    origin = origin._replace(file=Path(origin.file).name)
    if origin.file.endswith('.txt'):
        data = (folder / origin.file).read_bytes()
        assert data[: origin.byte].count(b'\n') + 1 == origin.line
        return data[origin.byte : origin.byte + n_bytes]
    if origin.file.endswith('.parquet'):
        assert origin.byte is None
        return rows['c'][origin.line - 1].encode()[origin.within :][:n_bytes]
    data = (folder / origin.file).read_bytes()
    data = gzip.decompress(data) if origin.file.endswith('.gz') else data
    line = data.split(b'\n')[origin.line - 1]
    assert data[origin.byte :].startswith(line)
    return json.loads(line)['text'].encode()[origin.within :][:n_bytes]


@pytest.mark.parametrize(
    ('tokenizer', 'order', 'block_bytes'),
    [
        ('char', 'keyed', 7),
        ('byte', 'keyed', 1 << 20),
        ('gpt2', 'keyed', 7),
        ('gpt2', 'table', 1 << 20),
    ],
)
def test_tokens_of_any_row_are_where_the_ledger_says(
    tmp_path, monkeypatch, tokenizer, order, block_bytes
):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', block_bytes)
    assert check_random_targets(tmp_path, tokenizer, order, n_steps=12, n_rows=25) > 100


def check_random_targets(tmp_path, tokenizer, order, n_steps, n_rows):
    """Of random targets: text, file, line and byte; and back from the token to the row.

    Returns how many were compared: separators have no text.
    """
    inputs, rows = write_inputs(tmp_path)
    prepare.prepare(
        [str(tmp_path / name) for name in inputs],
        str(tmp_path / 'shards'),
        tokenizer_name=tokenizer,
        val_fraction=0.1,
        shard_tokens=97,
        split_by='file',
    )
    options = {'train__steps': 200, 'train__order': order}
    folder = run_folder(tmp_path / 'run', tmp_path / 'shards', tokenizer, **options)
    run = ledger.open_run(folder)
    assert len(run.dataset.train.arrays) > 5
    draw, steps, files, n = np.random.default_rng(0), run.config.train.steps, set(), 0
    _, seed, B, T, _ = run.addressing
    for step in draw.integers(1, steps + 1, n_steps).tolist():
        options = {'seed': seed, 'order': order, 'batch_size': B, 'seq_len': T}
        batch = train_batch(run.dataset.train, step=step - 1, **options)
        starts = row_starts(run.addressing, step)
        for row, column in draw.integers(0, (B, T), (n_rows, 2)):
            position = int(starts[row] + 1 + column)
            token = batch['targets'][row, column]
            if token == run.dataset.tokenizer.separator:
                continue
            origin, wanted = run.where(position), run.dataset.tokenizer.decode_bytes([token])
            assert text_at(tmp_path, rows, origin, len(wanted)) == wanted
            files.add(Path(origin.file).name)
            seen = sightings(run.addressing, position, position + 1, steps)
            here = (seen.step == step) & (seen.row == row)
            assert seen.first[here].tolist() == seen.last[here].tolist() == [column]
            n += 1
    assert files == set(inputs)
    return n


@pytest.mark.parametrize('order', ['keyed', 'table'])
@pytest.mark.parametrize('pairs', [1, 20, 1 << 16])
def test_sightings_equal_a_search_through_all_batches(order, pairs, monkeypatch):
    """With token i = i, the batches themselves say which positions they hold."""
    monkeypatch.setattr(ledger, 'PAIRS', pairs)
    addressing, steps = Addressing(203, seed=5, batch_size=3, seq_len=8, order=order), 30
    tokens = Tokens((np.arange(203),))
    start = np.array([0, 1, 7, 50, 90, 195, 202])
    stop = np.array([1, 4, 30, 58, 91, 203, 203])
    expected = []
    for step in range(1, steps + 1):
        options = {'seed': 5, 'order': order, 'batch_size': 3, 'seq_len': 8}
        batch = train_batch(tokens, step=step - 1, **options)
        assert (batch['inputs'][:, 0] == row_starts(addressing, step)).all()
        for row, targets in enumerate(batch['targets']):
            for i, ends in enumerate(zip(start, stop, strict=True)):
                (inside,) = np.nonzero((targets >= ends[0]) & (targets < ends[1]))
                if len(inside):
                    whole = len(inside) == ends[1] - ends[0]
                    expected.append((i, step, row, inside[0], inside[-1], whole))
    found = sightings(addressing, start, stop, steps)
    assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == expected
    # Nothing predicts the first token, and no window reaches the last one.
    assert {i for i, *_ in expected} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), Gpt2Tokenizer(MERGES)], ids=['byte', 'bpe'])
@pytest.mark.parametrize('block', [1, 5, 1 << 22])
def test_occurrences_equal_a_search_in_the_bytes(tokenizer, block, monkeypatch):
    monkeypatch.setattr(ledger, 'BLOCK', block)
    ids = tokenizer.encode(VERSE * 2)
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    for text in ('T', 'the', ' the', 'be', 'e', '\n\n', '漢', "they'll\nTo be", 'nowhere'):
        data, wanted = b''.join(pieces), text.encode()
        at = np.array([i for i in range(len(data)) if data.startswith(wanted, i)], int)
        start, stop = occurrences(Tokens((ids[:9], ids[9:])), TokenBytes(tokenizer), text)
        assert start.tolist() == [int((ends <= i).sum()) for i in at]
        assert stop.tolist() == [int((ends < i + len(wanted)).sum()) + 1 for i in at]


def test_a_text_does_not_reach_over_the_end_of_a_document():
    tokenizer = Gpt2Tokenizer(MERGES)
    ids = [*tokenizer.encode('the end'), tokenizer.separator, *tokenizer.encode('of it')]
    tokens, table = Tokens((np.array(ids, np.uint16),)), TokenBytes(tokenizer)
    assert len(occurrences(tokens, table, 'endof')[0]) == 0
    assert len(occurrences(tokens, table, 'of')[0]) == 1


@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
@pytest.mark.parametrize('block', [3, 1 << 20])
def test_tokens_of_a_line(tmp_path, monkeypatch, tokenizer, block):
    """A line is found with its line end, whether a token crosses it or not."""
    monkeypatch.setattr(origins, 'BLOCK', block)
    text = VERSE * 30
    (tmp_path / 'a.txt').write_bytes(text.encode())
    run = run_folder(tmp_path / 'run', tmp_path / 'a.txt', tokenizer)
    for number, line in list(enumerate(text.splitlines(keepends=True), 1))[:60:7]:
        found = ledger.find(run, line=number)
        assert len(found.start) == 1
        shown = found.run.text(int(found.start[0]), int(found.stop[0]))
        assert line in shown
        assert found.run.where(int(found.stop[0]) - 1).line in (number - 1, number)
        if tokenizer == 'char':
            assert shown == line
    with pytest.raises(UsageError, match=r'line 5000 of .*a\.txt is not in the training text'):
        ledger.find(run, line=5000)


def test_line_of_a_file_of_records(tmp_path):
    inputs, rows = write_inputs(tmp_path)
    prepare.prepare(
        [str(tmp_path / name) for name in inputs],
        str(tmp_path / 'shards'),
        tokenizer_name='char',
        val_fraction=0,
        shard_tokens=1000,
    )
    run = run_folder(tmp_path / 'run', tmp_path / 'shards', data__holdout=0.02)
    found = ledger.find(run, line=3, file='a.jsonl')
    assert found.run.text(int(found.start[0]), int(found.stop[0])) == rows['a'][1]
    with pytest.raises(UsageError, match=r'needs --file: the training text comes from one\.txt'):
        ledger.find(run, line=3)
    with pytest.raises(UsageError, match=r'--file=x\.txt: expected one of one\.txt'):
        ledger.find(run, line=3, file='x.txt')
    with pytest.raises(UserError, match=r'the byte 0x80 of a text that is not UTF-8, or the term'):
        ledger.find(run, text='a\udc80')


def test_shards_without_marks_give_the_shard_and_the_token(tmp_path):
    """Folders prepared by earlier versions open as they did."""
    (tmp_path / 'a.txt').write_text(VERSE * 30)
    folder = tmp_path / 'shards'
    prepare.prepare(
        [str(tmp_path / 'a.txt')],
        str(folder),
        tokenizer_name='char',
        val_fraction=0.1,
        shard_tokens=100,
    )
    manifest = json.loads((folder / 'manifest.json').read_text())
    for split in manifest['splits'].values():
        (folder / split.pop('marks')['file']).unlink()
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    run = ledger.open_run(run_folder(tmp_path / 'run', folder))
    found = ledger.find(run.folder, token_offset=250)
    assert 'train_00002.npy, token 50, training token 250' in ledger.to_lines(found, 1)


def test_changed_marks_are_refused(tmp_path):
    (tmp_path / 'a.txt').write_text(VERSE * 30)
    prepare.prepare(
        [str(tmp_path / 'a.txt')],
        str(tmp_path / 'shards'),
        tokenizer_name='char',
        val_fraction=0.1,
        shard_tokens=100,
    )
    marks = tmp_path / 'shards' / 'train_marks.npy'
    marks.write_bytes(marks.read_bytes()[:-1] + b'x')
    with pytest.raises(UserError, match=r'train_marks\.npy is damaged'):
        ledger.open_run(run_folder(tmp_path / 'run', tmp_path / 'shards'))
    # Another array, whose sum is right.
    np.save(marks, np.zeros(3))
    manifest = tmp_path / 'shards' / 'manifest.json'
    changed = json.loads(manifest.read_text())
    changed['splits']['train']['marks']['sha256'] = files.sha256(marks)
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r'train_marks\.npy is damaged: it holds no marks'):
        shards.open_marks(tmp_path / 'shards')


def test_find_prints_every_place_and_step(tmp_path):
    (tmp_path / 'a.txt').write_bytes((VERSE * 30 + 'Only once').encode())
    run = run_folder(tmp_path / 'run', tmp_path / 'a.txt', data__val_fraction=0.0)
    code, out, _ = runs.script('steps', 'find', f'--workdir={run}', '--text=Only', '--format=json')
    assert code == 0
    (place,) = json.loads(out)['occurrences']
    assert (place['text'], place['line'], place['byte']) == (
        'Only',
        61 + 30,
        30 * len(VERSE.encode()),
    )
    code, out, _ = runs.script('steps', 'find', f'--workdir={run}', '--text=Only', '--limit=500')
    assert 'a.txt:91, byte ' in out
    assert '[Only] once' in out
    for seen in place['seen']:
        assert f'step {seen["step"]} row {seen["row"]}' in out
    half = ledger.find(run, text='Only', by_step=20).sightings
    assert half.step.tolist() == [seen['step'] for seen in place['seen'] if seen['step'] <= 20]


def test_sightings_that_do_not_fit_into_memory_are_refused(monkeypatch):
    addressing = ledger.Addressing(n_tokens=1000, seed=0, batch_size=4, seq_len=8)
    places = np.arange(10)
    steps = 3 * addressing.n_windows // addressing.batch_size  # three epochs
    all_of_them = ledger.sightings(addressing, places, places + 1, steps)
    monkeypatch.setattr(ledger, 'MAX_PAIRS', 30)
    for have, expected in zip(
        ledger.sightings(addressing, places, places + 1, steps), all_of_them, strict=True
    ):
        np.testing.assert_array_equal(have, expected)
    with pytest.raises(UsageError, match='10 places in each of 4 epochs are more than the 30'):
        ledger.sightings(addressing, places, places + 1, steps + 1)


def test_wrong_questions_are_one_line(tmp_path):
    (tmp_path / 'a.txt').write_text(VERSE * 30)
    run = run_folder(tmp_path / 'run', tmp_path / 'a.txt')
    for options, said in [
        ({}, 'give one of --text, --token_offset and --line'),
        ({'text': 'a', 'line': 3}, 'give one of'),
        ({'text': ''}, 'the text to find is empty'),
        ({'text': 'a', 'file': 'a.txt'}, '--file belongs to --line'),
        ({'token_offset': 99999}, 'the training text has '),
        ({'text': 'a', 'by_step': -1}, 'expected 0 to 40, the train.steps of the run'),
        ({'text': 'a', 'by_step': 41}, 'expected 0 to 40, the train.steps of the run'),
        ({'line': 0}, 'lines are counted from 1'),
    ]:
        with pytest.raises(UsageError, match=said):
            ledger.find(run, **options)
    with pytest.raises(UserError, match='expected the folder of a run'):
        ledger.find(tmp_path, text='a')
    config = run / 'config.json'
    config.write_text(config.read_text()[:-9])
    with pytest.raises(UserError, match=f'^{re.escape(str(config))} cannot be read as JSON'):
        ledger.find(run, text='a')


@pytest.mark.parametrize('name', ['config.json', 'summary.json'])
@pytest.mark.parametrize('damaged', [b'', b'{', b'\xd3\x00', b'[1]'])
def test_a_damaged_file_that_a_run_writes_again_may_be_deleted(name, damaged, tmp_path):
    (tmp_path / name).write_bytes(damaged)
    read = history.read_config if name == 'config.json' else history.read_summary
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f'{tmp_path / name} ')
    assert str(error.value).endswith(f'; {history.REWRITTEN}')


def test_files_of_a_run_may_begin_with_a_byte_order_mark(tmp_path):
    """As some editors save them."""
    text = to_json(resolve(default_config()))
    (tmp_path / 'config.json').write_text(f'\ufeff{text}', 'utf-8')
    (tmp_path / 'summary.json').write_text('\ufeff{"steps": 1}', 'utf-8')
    assert to_json(history.read_config(tmp_path)) == text
    assert history.read_summary(tmp_path) == {'steps': 1}
