"""Shards: they equal the encoding in memory, read across files, and damage is found."""

import gzip
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from bpe import MERGES, SMALL, TEXTS

from gpt2_jax.data import documents, load, shards, tokenizers
from gpt2_jax.data.dataset import SPLITS, Tokens, from_text
from gpt2_jax.data.id_files import MAX_OPEN, KeptFile
from gpt2_jax.data.shards import open_shards
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.prepare import SPLIT_BY, describe, prepare
from gpt2_jax.signals import SIGNALS

FIRST = 'Il était une fois… 漢字 🎭\r\n' * 7
SECOND = 'To be, or not to be\n' * 5


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / 'first.txt', tmp_path / 'second.txt']
    for path, text in zip(paths, (FIRST, SECOND), strict=True):
        path.write_bytes(text.encode())
    return [str(path) for path in paths]


def write(texts, out_dir, *, tokenizer_name='char', val_fraction=0.1, shard_tokens=37, **options):
    return prepare(
        texts,
        str(out_dir),
        tokenizer_name=tokenizer_name,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        **options,
    )


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Replaces GPT-2's vocabulary."""
    monkeypatch.setattr(tokenizers, 'find_merges', lambda: MERGES)


def all_of(tokens):
    return tokens.read(0, len(tokens))


def cut(text, val_fraction):
    n_val = math.ceil(len(text) * Fraction(val_fraction))
    return text[: len(text) - n_val], text[len(text) - n_val :]


def test_tokens_read_across_arrays():
    whole = np.arange(23, dtype=np.uint16)
    tokens = Tokens((whole[:5], whole[5:5], whole[5:6], whole[6:20], whole[20:]))
    assert len(tokens) == 23
    for start in range(23):
        for stop in range(start + 1, 24):
            read = tokens.read(start, stop)
            assert read.dtype == np.uint16
            assert np.array_equal(read, whole[start:stop])
    for start, stop in [(-1, 3), (3, 3), (20, 24)]:
        with pytest.raises(IndexError):
            tokens.read(start, stop)
    assert len(Tokens(())) == 0


@pytest.mark.parametrize('block_bytes', [1, 2, 3, 5, 64, 1 << 20])
@pytest.mark.parametrize('name', ['char', 'byte'])
def test_streaming_equals_memory(texts, tmp_path, monkeypatch, name, block_bytes):
    # Blocks end at every position inside characters of 2, 3 and 4 bytes.
    monkeypatch.setattr(documents, 'BLOCK_BYTES', block_bytes)
    manifest = write(texts, tmp_path / 'out', tokenizer_name=name, val_fraction=0.25)
    dataset = open_shards(tmp_path / 'out')
    assert dataset.tokenizer == tokenizers.make_tokenizer(name, FIRST + SECOND)
    assert dataset.name == 'out'
    for split, tokens, text in zip(
        SPLITS,
        (dataset.train, dataset.val),
        cut(FIRST + SECOND, '0.25'),
        strict=True,
    ):
        assert dataset.tokenizer.decode(all_of(tokens)) == text
        about = manifest['splits'][split]
        assert about['tokens'] == len(tokens) == len(dataset.tokenizer.encode(text))
        assert about['bytes'] == len(text.encode())
        assert [shard['tokens'] for shard in about['shards'][:-1]] == [37] * (
            len(about['shards']) - 1
        )
        assert len(about['shards']) == len(tokens.arrays) == math.ceil(len(tokens) / 37)
    assert all(ids.dtype == np.uint8 for ids in dataset.train.arrays)


def test_manifest_and_files(texts, tmp_path):
    manifest = write(texts, tmp_path / 'out')
    assert manifest == json.loads((tmp_path / 'out/manifest.json').read_text())
    lines = (tmp_path / 'out/inputs.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            'path': path,
            'documents': 1,
            'characters': len(text),
            'bytes': len(text.encode()),
            'sha256': hashlib.sha256(text.encode()).hexdigest(),
        }
        for path, text in zip(texts, (FIRST, SECOND), strict=True)
    ]
    assert manifest['inputs'] == {
        'files': 2,
        'documents': 2,
        'characters': len(FIRST + SECOND),
        'bytes': len((FIRST + SECOND).encode()),
        'left_out': {},
    }
    listed = {
        shard['file']: shard['sha256']
        for split in manifest['splits'].values()
        for shard in split['shards']
    }
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        *listed,
        'inputs.jsonl',
        'train_marks.npy',
        'val_marks.npy',
        'manifest.json',
        'tokenizer.json',
    }
    assert {'train_00000.npy', 'train_00001.npy', 'val_00000.npy'} <= set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize('block_bytes', [1, 2, 3, 5, 64, 1 << 20])
def test_streamed_bpe_equals_encoding_at_once(tmp_path, monkeypatch, small_vocabulary, block_bytes):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', block_bytes)
    text = '\n'.join(TEXTS) + "the the's  \n  they'll\n\n12 é🎭🎭 the" * 20
    (tmp_path / 'hard.txt').write_bytes(text.encode())
    write([str(tmp_path / 'hard.txt')], tmp_path / 'out', tokenizer_name='gpt2', val_fraction=0.3)
    dataset, parts = open_shards(tmp_path / 'out'), cut(text, '0.3')
    assert dataset.tokenizer == SMALL
    for tokens, part in zip((dataset.train, dataset.val), parts, strict=True):
        assert all_of(tokens).tolist() == SMALL.encode(part).tolist()


DOCUMENTS = ['', 'the first', ' the  ', '', "\nthe'll é🎭", '<|endoftext|>', 'a\n' * 40, 'last']


def write_documents(folder):
    """The same documents in each kind of file that holds several."""
    lines = (
        '\n\n'.join(json.dumps({'id': 7, 'body': text, 'text': 'other'}) for text in DOCUMENTS)
        + '\n'
    )
    (folder / 'd.jsonl').write_text(lines)
    (folder / 'd.jsonl.gz').write_bytes(
        gzip.compress(lines.encode()[:99]) + gzip.compress(lines.encode()[99:])
    )
    return [folder / 'd.jsonl', folder / 'd.jsonl.gz']


def split_by_hand(split_by, texts, val_fraction):
    """The training and the validation part of each document, of files that are lists of texts."""
    flat = [text for file in texts for text in file]
    if split_by == 'document':
        share = Fraction(val_fraction)
        chosen = [int((i + 1) * share) > int(i * share) for i in range(len(flat))]
        pairs = [
            ('', text) if is_val else (text, '') for text, is_val in zip(flat, chosen, strict=True)
        ]
    else:
        pairs = []
        for file in texts if split_by == 'file' else [flat]:
            left = len(cut(''.join(file), val_fraction)[0])
            for text in file:
                pairs.append((text[:left], text[left:]))
                left = max(0, left - len(text))
    return zip(*pairs, strict=True)


@pytest.mark.parametrize('block_bytes', [1, 9, 1 << 20])
@pytest.mark.parametrize('split_by', SPLIT_BY)
@pytest.mark.parametrize('kind', [0, 1, 'parquet'])
def test_documents_are_split_and_separated(
    tmp_path, monkeypatch, small_vocabulary, kind, split_by, block_bytes
):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', block_bytes)
    if kind == 'parquet':
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / 'd.parquet'
        parquet.write_table(
            pyarrow.table({'id': range(len(DOCUMENTS)), 'body': DOCUMENTS}), path, row_group_size=3
        )
    else:
        path = write_documents(tmp_path)[kind]
    (tmp_path / 'plain.txt').write_text('the plain text')
    manifest = prepare(
        [str(path), str(tmp_path / 'plain.txt')],
        str(tmp_path / 'out'),
        tokenizer_name='gpt2',
        val_fraction=0.3,
        shard_tokens=10,
        text_field='body',
        split_by=split_by,
    )
    dataset = open_shards(tmp_path / 'out')
    for split, tokens, parts in zip(
        SPLITS,
        (dataset.train, dataset.val),
        split_by_hand(split_by, [DOCUMENTS, ['the plain text']], '0.3'),
        strict=True,
    ):
        parts = [SMALL.encode(part).tolist() for part in parts if part]
        expected = [token for part in parts for token in [SMALL.separator, *part]][1:]
        assert all_of(tokens).tolist() == expected
        assert manifest['splits'][split]['bytes'] == SMALL.byte_lengths[expected].sum()
    lines = (tmp_path / 'out/inputs.jsonl').read_text().splitlines()
    inputs = [json.loads(line) for line in lines]
    assert [about['documents'] for about in inputs] == [len(DOCUMENTS), 1]
    assert inputs[0]['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest['split_by'] == split_by


def test_too_few_documents_to_split(texts, tmp_path):
    for paths, n in ((texts, '2 documents'), (texts[:1], '1 document')):
        with pytest.raises(UserError, match=rf'val_fraction = 0.4 of {n} is less than one'):
            write(paths, tmp_path / 'out', val_fraction=0.4, split_by='document')
    write(texts, tmp_path / 'out', val_fraction=0.5, split_by='document')
    dataset = open_shards(tmp_path / 'out')
    assert dataset.tokenizer.decode(all_of(dataset.val)) == SECOND


@pytest.mark.parametrize(
    ('lines', 'options', 'left'),
    [
        (['a'], {}, '0 tokens to train on and 1 to validate on'),
        (['abc', 'de'], {'val_fraction': 0.9}, '0 tokens to train on and 5 to'),
        (['abc', ''], {'val_fraction': 0.5, 'split_by': 'document'}, '3 .* on and 0 to validate'),
    ],
)
def test_a_split_without_tokens_is_refused(tmp_path, lines, options, left):
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in lines))
    with pytest.raises(UserError, match=f'val_fraction = .* leaves {left}.*more text'):
        write([str(path)], tmp_path / 'out', **options)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('block_bytes', [1, 3, 1 << 20])
def test_the_special_token_is_a_choice(tmp_path, monkeypatch, small_vocabulary, block_bytes):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', block_bytes)
    text = 'the<|endoftext|> the\n<|endoftext|><|endoftext|>the <|endof'
    (tmp_path / 'a.txt').write_text(text)
    for special, ids in (
        (False, SMALL.encode(text).tolist()),
        (
            True,
            [
                *SMALL.encode('the').tolist(),
                SMALL.separator,
                *SMALL.encode(' the\n').tolist(),
                SMALL.separator,
                SMALL.separator,
                *SMALL.encode('the <|endof').tolist(),
            ],
        ),
    ):
        out = tmp_path / f'{special}'
        manifest = write(
            [str(tmp_path / 'a.txt')],
            out,
            tokenizer_name='gpt2',
            val_fraction=0.0,
            special_tokens=special,
        )
        assert all_of(open_shards(out).train).tolist() == ids
        assert manifest['special_tokens'] == special
        assert manifest['splits']['train']['bytes'] == SMALL.byte_lengths[ids].sum()
    with pytest.raises(UsageError, match='the byte tokenizer has no special tokens'):
        write([str(tmp_path / 'a.txt')], tmp_path / 'b', tokenizer_name='byte', special_tokens=True)


def test_a_document_that_cannot_be_cut(tmp_path, monkeypatch, small_vocabulary):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', 3)
    monkeypatch.setattr('gpt2_jax.prepare.MAX_HELD', 20)
    for text, fits in (('the ' * 99, True), ('a' * 20 + ' ', True), ('a' * 99, False)):
        (tmp_path / 'a.txt').write_text(text)
        if fits:
            write([str(tmp_path / 'a.txt')], tmp_path / text[:21], tokenizer_name='gpt2')
        else:
            with pytest.raises(UserError, match='no visible character before a space or newline'):
                write([str(tmp_path / 'a.txt')], tmp_path / 'out', tokenizer_name='gpt2')
            write([str(tmp_path / 'a.txt')], tmp_path / 'out', tokenizer_name='char')


def test_empty_files_are_left_out_and_counted(texts, tmp_path):
    for name in ('c.txt', 'd.jsonl', 'e.png'):
        (tmp_path / name).touch()
    (tmp_path / 'f.txt').write_bytes(b'\xef\xbb\xbf')  # a byte order mark alone
    manifest = write([str(tmp_path / '*.*')], tmp_path / 'a')
    assert manifest['inputs']['left_out'] == {'empty files': 3, '.png files': 1}
    assert describe(manifest)[-1].endswith('MB; left out: 3 empty files, 1 .png file')
    write(texts, tmp_path / 'b')
    a, b = (open_shards(tmp_path / name) for name in 'ab')
    assert a.sha256 == b.sha256
    with pytest.raises(UserError, match=r'the text .*c\.txt is empty: expected at least one char'):
        write([str(tmp_path / 'c.txt')], tmp_path / 'c')
    with pytest.raises(UserError, match='all 2 files are empty'):
        write([str(tmp_path / 'c.txt'), str(tmp_path / 'f.txt')], tmp_path / 'c')


def test_files_that_are_given_twice_are_read_twice_and_named(texts, tmp_path, capsys):
    write(texts, tmp_path / 'a')
    assert 'more than once' not in capsys.readouterr().err
    manifest = write([texts[0], *texts, *texts], tmp_path / 'b')
    assert manifest['inputs']['files'] == 2 * len(texts) + 1
    said = f'given more than once, and read each time: {texts[0]}, and {len(texts) - 1} more\n'
    assert said in capsys.readouterr().err


def test_documents_are_joined_if_the_tokenizer_has_no_separator(tmp_path):
    for name in ('char', 'byte'):
        prepare(
            [str(write_documents(tmp_path)[0])],
            str(tmp_path / name),
            tokenizer_name=name,
            val_fraction=0.5,
            shard_tokens=100,
            text_field='body',
        )
        dataset = open_shards(tmp_path / name)
        assert dataset.tokenizer.decode(all_of(dataset.train)) == cut(''.join(DOCUMENTS), '0.5')[0]
        assert dataset.tokenizer.decode(all_of(dataset.val)) == cut(''.join(DOCUMENTS), '0.5')[1]


def test_wide_alphabet_takes_two_bytes(tmp_path):
    text = ''.join(map(chr, range(0x4E00, 0x4E00 + 300)))
    (tmp_path / 'wide.txt').write_text(text, 'utf-8')
    assert write([str(tmp_path / 'wide.txt')], tmp_path / 'out')['dtype'] == 'uint16'
    assert open_shards(tmp_path / 'out').train.arrays[0].dtype == np.uint16


@pytest.mark.parametrize(
    ('n', 'val_fraction', 'n_val'),
    [
        (1_115_394, 0.1, 111_540),
        (70, 0.1, 7),
        (71, 0.1, 8),
        (100, 0.07, 7),
        (10, 0.0, 0),
        (10, 0.99, 10),
        (3, 1e-05, 1),
    ],
)
def test_split_rule(n, val_fraction, n_val):
    dataset = from_text(
        'x', 'ab' * (n // 2) + 'a' * (n % 2), tokenizers.ByteTokenizer(), val_fraction
    )
    assert (len(dataset.train), len(dataset.val)) == (n - n_val, n_val)


@pytest.mark.parametrize('name', ['char', 'byte', 'gpt2'])
def test_memory_equals_disk_for_one_text(texts, tmp_path, small_vocabulary, name):
    write(texts[:1], tmp_path / 'out', tokenizer_name=name)
    disk = open_shards(tmp_path / 'out')
    memory = from_text('x', FIRST, tokenizers.make_tokenizer(name, FIRST), 0.1)
    assert np.array_equal(all_of(disk.train), all_of(memory.train))
    assert np.array_equal(all_of(disk.val), all_of(memory.val))
    assert disk.tokenizer == memory.tokenizer


def test_identity(texts, tmp_path):
    write(texts, tmp_path / 'a')
    write(texts, tmp_path / 'b')
    write(texts[::-1], tmp_path / 'c')
    write(texts, tmp_path / 'd', tokenizer_name='byte')
    write(texts, tmp_path / 'e', val_fraction=0.2)
    a, b, *others = (open_shards(tmp_path / name).sha256 for name in 'abcde')
    assert a == b
    assert len({a, *others}) == 4

    byte = tokenizers.ByteTokenizer()
    a, b, *others = (
        from_text('x', *about).sha256
        for about in [
            ('abc', byte, 0.1),
            ('abc', byte, 0.1),
            ('abd', byte, 0.1),
            ('abc', byte, 0.2),
            ('abc', tokenizers.CharTokenizer('abc'), 0.1),
        ]
    )
    assert a == b
    assert len({a, *others}) == 4


def test_no_validation_split(texts, tmp_path):
    write(texts, tmp_path / 'out', val_fraction=0.0)
    dataset = open_shards(tmp_path / 'out')
    assert len(dataset.val) == 0
    assert dataset.tokenizer.decode(all_of(dataset.train)) == FIRST + SECOND


def test_is_prepared(texts, tmp_path):
    write(texts, tmp_path / 'out')
    assert shards.is_prepared(tmp_path / 'out')
    assert not any(map(shards.is_prepared, (tmp_path, texts[0], 'tinyshakespeare')))


def edit_manifest(change):
    def damage(folder):
        manifest = json.loads((folder / 'manifest.json').read_text())
        change(manifest)
        (folder / 'manifest.json').write_text(json.dumps(manifest))

    return damage


def edit_shard(**changes):
    return edit_manifest(lambda m: m['splits']['train']['shards'][0].update(changes))


def edit_bytes(data):
    """Another first shard, with a manifest that agrees."""

    def damage(folder):
        (folder / 'train_00000.npy').write_bytes(data)
        edit_shard(sha256=hashlib.sha256(data).hexdigest())(folder)

    return damage


def reseal(change):
    def damage(folder):
        path = folder / 'train_00000.npy'
        np.save(path, change(np.load(path)))
        edit_bytes(path.read_bytes())(folder)

    return damage


def npy(header):
    return b'\x93NUMPY\x01\x00v\x00' + header.encode().ljust(117) + b'\n'


def link(target):
    def damage(folder):
        os.mkfifo(folder / 'pipe')
        (folder / 'train_00000.npy').unlink()
        (folder / 'train_00000.npy').symlink_to(target)

    return damage


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ('damage', 'named'),
    [
        (
            lambda f: flip_one_bit(f / 'train_00001.npy'),
            r'train_00001.npy is damaged: its SHA-256 is',
        ),
        (lambda f: os.truncate(f / 'val_00000.npy', 100), r'val_00000.npy is damaged'),
        (lambda f: (f / 'val_00000.npy').write_bytes(b''), r'val_00000.npy is damaged'),
        (lambda f: (f / 'train_00000.npy').unlink(), r'train_00000.npy is missing'),
        (
            lambda f: shutil.copy(f / 'train_00001.npy', f / 'train_00000.npy'),
            r'train_00000.npy is damaged',
        ),
        (lambda f: (f / 'tokenizer.json').unlink(), r'tokenizer.json cannot be read: No such'),
        (
            lambda f: (f / 'tokenizer.json').write_bytes(b'{'),
            r'tokenizer.json cannot be read as JSON',
        ),
        (lambda f: (f / 'tokenizer.json').write_bytes(b'\xff'), r'tokenizer.json is not UTF-8'),
        (
            lambda f: (f / 'tokenizer.json').write_text('{"name": "byte"}'),
            r'tokenizer.json is not the tokenizer',
        ),
        (lambda f: (f / 'manifest.json').unlink(), r'manifest.json cannot be read: No such'),
        (lambda f: os.truncate(f / 'manifest.json', 99), r'manifest.json cannot be read as JSON'),
        (lambda f: (f / 'manifest.json').write_text('[]'), r'manifest.json is damaged'),
        (edit_manifest(lambda m: m.pop('splits')), r'manifest.json is damaged'),
        (
            edit_manifest(lambda m: m.update(format=99)),
            r'manifest.json has format 99, expected 1',
        ),
        (
            edit_manifest(lambda m: m.update(dtype='uint16')),
            r'train_00000.npy holds 37 tokens of uint8, the manifest says 37 of uint16',
        ),
        (
            edit_manifest(lambda m: m['splits']['val']['shards'][0].update(tokens=5)),
            r'val_00000.npy holds',
        ),
        (edit_manifest(lambda m: m.update(dtype='float64')), "dtype is 'float64', expected one of"),
        (edit_shard(file='../first.txt'), r"file is '\.\./first\.txt', expected the plain name"),
        (edit_shard(file='/etc/hostname'), 'expected the plain name'),
        (edit_shard(file='..'), 'expected the plain name'),
        (edit_shard(file='train\0'), 'expected the plain name'),
        (edit_shard(file=5), 'file is 5, expected the plain name'),
        (edit_shard(tokens=-1), 'tokens is -1, expected an integer from 1'),
        (edit_shard(tokens=10**30), 'expected an integer from 1'),
        (edit_shard(sha256='\x1b]0;x'), r"sha256 is '\\x1b\]0;x', expected 64 hexadecimal digits"),
        (link('/dev/zero'), 'train_00000.npy cannot be read: it is a device'),
        (link('pipe'), 'train_00000.npy cannot be read: it is a device, a pipe'),
        (link('.'), 'train_00000.npy cannot be read: Is a directory'),
        (reseal(lambda ids: ids + 99), r'train_00000.npy holds token \d+ at position 0, outside'),
        (
            reseal(lambda ids: ids.astype(np.float64)),
            'train_00000.npy is damaged: it is not a .npy',
        ),
        (reseal(lambda ids: ids[None]), 'train_00000.npy is damaged: it is not a .npy'),
        (reseal(lambda ids: ids[1:]), 'train_00000.npy holds 36 tokens'),
        (edit_bytes(b''), 'train_00000.npy is damaged: it is not a .npy'),
        (edit_bytes(b'PK\x03\x04' + bytes(99)), 'train_00000.npy is damaged: it is not a .npy'),
        (edit_bytes(npy('(' * 100)), 'train_00000.npy is damaged: it is not a .npy'),
        (
            edit_bytes(
                npy("{'descr': '|u1', 'fortran_order': False, 'shape': (" + '9' * 400 + ',), }')
            ),
            'train_00000.npy is damaged: it is not a .npy',
        ),
        (
            edit_bytes(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (37,), }")),
            'train_00000.npy is damaged: it has 128 bytes, expected 165',
        ),
    ],
)
def test_damage_is_named(texts, tmp_path, damage, named):
    write(texts, tmp_path / 'out')
    open_shards(tmp_path / 'out')
    damage(tmp_path / 'out')
    with pytest.raises(UserError, match=named):
        open_shards(tmp_path / 'out')


@pytest.mark.parametrize(
    ('change', 'error', 'named'),
    [
        ({'val_fraction': 1.0}, UsageError, 'val_fraction is 1.0'),
        ({'val_fraction': -0.1}, UsageError, 'val_fraction'),
        ({'val_fraction': math.nan}, UsageError, 'val_fraction'),
        ({'shard_tokens': 0}, UsageError, 'shard_tokens is 0'),
        ({'tokenizer_name': 'bpe'}, UsageError, 'bpe'),
        ({'tokenizer_name': 'gpt2'}, UserError, 'no vocabulary'),
    ],
)
def test_wrong_settings_write_nothing(texts, tmp_path, monkeypatch, change, error, named):
    def find():
        raise UserError('no vocabulary')

    monkeypatch.setattr(tokenizers, 'find_merges', find)
    monkeypatch.setattr(documents, 'read', None)  # the error comes before the first pass
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=named):
        write(texts, tmp_path / 'out', **change)
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_cannot_be_read_are_named_together(tmp_path):
    """Not one at each attempt: a folder may hold many. The first ten are enough."""
    (tmp_path / 'in').mkdir()
    for number in range(20, 32):
        (tmp_path / f'in/{number}.txt').write_bytes(b'abc')
    (tmp_path / 'in/23.txt').write_bytes(b'abc\xe9')
    (tmp_path / 'in/25.jsonl').write_bytes(b'{')
    with pytest.raises(UserError) as caught:
        write([str(tmp_path / 'in')], tmp_path / 'out')
    names = f'iconv; these cannot be read either: {tmp_path / "in/25.jsonl"}'
    assert '23.txt is not UTF-8 text' in str(caught.value)
    assert str(caught.value).endswith(names)
    for number in range(20, 32):
        (tmp_path / f'in/{number}.txt').write_bytes(b'\xe9')
    with pytest.raises(UserError, match=r'20.txt is not .*/21.txt, .*/28.txt, \.\.$'):
        write([str(tmp_path / 'in')], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_nothing_is_overwritten(texts, tmp_path):
    (tmp_path / 'out').mkdir()
    write(texts, tmp_path / 'out')  # an empty folder is accepted
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    for out_dir in (tmp_path / 'out', texts[0]):
        with pytest.raises(UserError, match='exists and is not an empty folder'):
            write(texts, out_dir)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    assert Path(texts[0]).read_bytes() == FIRST.encode()


def limit_files(kilobytes):
    """A limit on the size of any file stands in for a full disk."""
    code = (
        f'import os, resource, signal, sys; size = {kilobytes} * 1024; '
        'resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); '
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
        'os.environ["PYTHONDONTWRITEBYTECODE"] = "1"; '  # else half of a module would be left
        'os.execv(sys.executable, sys.argv[1:])'
    )
    return [sys.executable, '-c', code]


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / 'a.txt').write_text('to be or not ' * 4000)
    done = run_script(
        f'--input={tmp_path}/a.txt',
        f'--out_dir={tmp_path}/deep/out',
        '--shard_tokens=40000',
        prefix=limit_files(20),
    )
    expected = f'error: cannot write {tmp_path}/deep/out/train_00000.npy: File too large\n'
    assert (done.returncode, done.stderr) == (1, expected)
    assert not any((tmp_path / 'deep').iterdir())


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_leaves_nothing_and_says_so(texts, tmp_path, monkeypatch, number):
    make = tokenizers.make_tokenizer
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored, as in nohup

    def interrupt(*args):
        assert any((tmp_path / 'deep').iterdir())
        os.kill(os.getpid(), number)
        return make(*args)

    monkeypatch.setattr(tokenizers, 'make_tokenizer', interrupt)
    with pytest.raises(UserError, match=f'stopped by {number.name}: nothing was written') as caught:
        write(texts, tmp_path / 'deep/out')
    assert caught.value.exit_code == 128 + number
    assert not any((tmp_path / 'deep').iterdir())
    assert signal.signal(number, before) is signal.default_int_handler


def test_under_nohup_the_loss_of_the_terminal_is_ignored(texts, tmp_path, monkeypatch):
    make, before = tokenizers.make_tokenizer, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(
        tokenizers,
        'make_tokenizer',
        lambda *args: os.kill(os.getpid(), signal.SIGHUP) or make(*args),
    )
    write(texts, tmp_path / 'out')
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert (tmp_path / 'out/manifest.json').is_file()


def test_text_that_changes_between_the_passes(texts, tmp_path, monkeypatch):
    make = tokenizers.make_tokenizer

    def change(*args):
        Path(texts[1]).write_text(SECOND[::-1])
        return make(*args)

    monkeypatch.setattr(tokenizers, 'make_tokenizer', change)
    with pytest.raises(UserError, match=r'second.txt changed while it was read'):
        write(texts, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def run_script(*arguments, prefix=()):
    root = Path(__file__).parents[1]
    return subprocess.run(
        [*prefix, sys.executable, root / 'scripts/prepare.py', *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': str(root)},
    )


def test_script(texts, tmp_path):
    done = run_script(
        '--input', *texts, '--tokenizer', 'byte', '--out_dir', tmp_path / 'a', '--val_fraction=0.2'
    )
    assert done.returncode == 0, done.stderr
    assert 'tokenizer byte, vocabulary 256' in done.stdout
    done = run_script(
        *(f'--input={text}' for text in texts),
        '--tokenizer=byte',
        f'--out_dir={tmp_path / "b"}',
        '--val_fraction=0.2',
        '--shard_tokens=50',
    )
    a, b = open_shards(tmp_path / 'a'), open_shards(tmp_path / 'b')
    assert np.array_equal(all_of(a.train), all_of(b.train))
    assert len(b.train.arrays) > len(a.train.arrays) == 1
    assert a.tokenizer.decode(all_of(a.val)) == cut(FIRST + SECOND, '0.2')[1]
    again = run_script('--input', *texts, '--out_dir', tmp_path / 'a')
    assert again.returncode == 1
    assert again.stderr.startswith('error: ')
    assert again.stderr.count('\n') == 1
    mixed = run_script('--input', texts[0], '--input', *texts, '--out_dir', tmp_path / 'c')
    assert mixed.returncode == 2
    assert 'order of the texts' in mixed.stderr


def test_a_holdout_replaces_the_validation_text(tmp_path):
    (tmp_path / 'text.txt').write_text(''.join(map(chr, range(97, 117))) * 5)  # 100 characters
    settings = dict(
        corpus=str(tmp_path / 'text.txt'), tokenizer='char', val_fraction=0.2, fallback=''
    )
    whole, held = (load.load_dataset(**settings, holdout=share) for share in (0.0, 0.25))
    assert (len(whole.train), len(held.train), len(held.val)) == (80, 60, 20)
    assert np.array_equal(
        np.concatenate([held.train.read(0, 60), held.val.read(0, 20)]), whole.train.read(0, 80)
    )
    assert held.name == whole.name
    assert held.sha256 != whole.sha256
    assert held.sha256 != load.load_dataset(**settings, holdout=0.5).sha256
    with pytest.raises(
        UserError,
        match=r'data\.holdout = 0.001 leaves 80 of 80 training tokens to train on and 0 to',
    ):
        load.load_dataset(**settings, holdout=0.001)


def test_parts_of_tokens_are_views():
    arrays = tuple(np.arange(start, start + 5) for start in (0, 5, 10))
    part = Tokens(arrays).part(3, 12)
    assert np.array_equal(part.read(0, 9), np.arange(3, 12))
    assert [array.base is whole for array, whole in zip(part.arrays, arrays, strict=True)] == [
        True
    ] * 3


def test_few_of_many_shards_stay_open(texts, tmp_path):
    write(texts, tmp_path / 'out', shard_tokens=2)
    before = len(os.listdir('/dev/fd'))
    train = open_shards(tmp_path / 'out').train
    expected = [
        np.load(tmp_path / f'out/train_{i:05d}.npy').tolist() for i in range(len(train.arrays))
    ]
    assert all_of(train).tolist() == np.concatenate(expected).tolist()
    assert len(os.listdir('/dev/fd')) - before <= MAX_OPEN < len(expected) - 50
    # A file that is opened again must be the file that was verified.
    path = tmp_path / 'out/train_00000.npy'
    path.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r'train_00000.npy changed while it was in use; restore it'):
        train.read(0, 3)
    assert train.read(2, 4).tolist() == expected[1]


def test_a_file_beyond_the_limit_of_open_files_is_named(tmp_path):
    (tmp_path / 'ids').touch()
    with open(os.devnull) as free:
        number = free.fileno()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, hard))  # one file more
    try:
        kept = KeptFile(tmp_path / 'ids')
        with pytest.raises(UserError, match='ids cannot be read: Too many open files'):
            KeptFile(tmp_path / 'ids')
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert kept.n_bytes == 0


def test_a_shard_cut_short_while_it_is_used(texts, tmp_path):
    write(texts, tmp_path / 'out')
    train = open_shards(tmp_path / 'out').train
    before = all_of(train)
    os.truncate(tmp_path / 'out/train_00001.npy', 130)
    assert np.array_equal(train.read(0, 37), before[:37])
    with pytest.raises(
        UserError, match=r'train_00001.npy was cut short while it was in use; restore'
    ):
        train.read(30, 60)
