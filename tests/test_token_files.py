"""Token files of other projects: read with and without a header, and every damage is named."""

import glob
import os

import numpy as np
import pytest
from bpe import MERGES, SMALL

from gpt2_jax.data import load, tokenizers
from gpt2_jax.data.bin_files import open_token_files
from gpt2_jax.errors import UsageError, UserError

IDS = np.random.default_rng(0).integers(0, SMALL.vocab_size, 1000).astype('<u2')
SETTINGS = {'tokenizer': 'gpt2', 'val_fraction': 0.1, 'holdout': 0.0, 'fallback': ''}


def header(count, magic=20240520, version=1):
    return np.array([magic, version, count] + [0] * 253, '<i4').tobytes()


def put(path, ids, head=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((header(len(ids)) if head else b'') + ids.tobytes())


@pytest.fixture
def folder(tmp_path):
    """Files as llm.c writes them: two to train on, and one to validate on."""
    put(tmp_path / 'web/web_train_000002.bin', IDS[300:700])
    put(tmp_path / 'web/web_train_000001.bin', IDS[:300])
    put(tmp_path / 'web/web_val_000000.bin', IDS[700:])
    return tmp_path / 'web'


@pytest.mark.parametrize('backwards', [False, True])
def test_llm_c_files(folder, monkeypatch, backwards):
    monkeypatch.setattr(tokenizers, 'find_merges', lambda: MERGES)
    found = glob.glob  # lists files in the order of the disk
    monkeypatch.setattr(
        glob, 'glob', lambda *args, **more: sorted(found(*args, **more), reverse=backwards)
    )
    dataset = load.load_dataset(corpus=f'{folder}/web_*.bin', **SETTINGS)
    assert (dataset.name, dataset.tokenizer) == ('web', SMALL)
    assert dataset.train.read(0, 700).tolist() == IDS[:700].tolist()
    assert dataset.val.read(0, 300).tolist() == IDS[700:].tolist()


def test_headerless_files(tmp_path, monkeypatch):
    put(tmp_path / 'openwebtext/train.bin', IDS[:700], head=False)
    put(tmp_path / 'openwebtext/val.bin', IDS[700:], head=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    dataset = open_token_files('~/**/*.bin', SMALL)
    assert dataset.train.read(0, 700).tolist() == IDS[:700].tolist()
    assert dataset.val.read(0, 300).tolist() == IDS[700:].tolist()


def test_only_the_wanted_split_is_opened(folder):
    put(folder / 'web_train_000001.bin', IDS + SMALL.vocab_size)  # damaged, but not opened
    dataset = open_token_files(f'{folder}/*.bin', SMALL, ('val',))
    assert dataset.val.read(0, 300).tolist() == IDS[700:].tolist()
    assert len(dataset.train) == 0
    with pytest.raises(UserError, match='no train file among the 1 that match'):
        open_token_files(f'{folder}/*_val_*.bin', SMALL, ('train',))


def test_identity(folder):
    pattern = f'{folder}/*.bin'
    before = open_token_files(pattern, SMALL).sha256
    assert open_token_files(pattern, SMALL).sha256 == before
    folder.rename(folder.with_name('elsewhere'))
    folder = folder.with_name('elsewhere')
    assert open_token_files(f'{folder}/*.bin', SMALL).sha256 == before
    others = {before}
    changed = IDS[700:].copy()
    changed[5] ^= 1
    put(folder / 'web_val_000000.bin', changed)
    others.add(open_token_files(f'{folder}/*.bin', SMALL).sha256)
    (folder / 'web_train_000001.bin').rename(folder / 'web_train_000003.bin')  # another order
    others.add(open_token_files(f'{folder}/*.bin', SMALL).sha256)
    # Another split, in the same order.
    (folder / 'web_train_000003.bin').rename(folder / 'web_train_val.bin')
    others.add(open_token_files(f'{folder}/*.bin', SMALL).sha256)
    others.add(
        open_token_files(f'{folder}/*.bin', tokenizers.Gpt2Tokenizer(MERGES + 'x y\n')).sha256
    )
    assert len(others) == 5


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        (
            header(10) + IDS[:9].tobytes(),
            'damaged: its header says 10 tokens of 2 bytes, and 18 bytes follow it',
        ),
        (header(10) + IDS[:11].tobytes(), 'its header says 10 tokens of 2 bytes, and 22 bytes'),
        (
            header(10) + IDS[:10].tobytes() + b'x',
            'its header says 10 tokens of 2 bytes, and 21 bytes',
        ),
        (header(-1) + IDS[:10].tobytes(), 'its header says -1 tokens'),
        (header(0), 'holds 0 bytes of tokens; expected GPT-2 tokens of 16 bits'),
        (header(10, version=2) + IDS[:10].tobytes(), 'header of llm.c in version 2, expected 1'),
        (header(10)[:1000], 'damaged: it ends within the header'),
        (header(10)[:4], 'it ends within the header'),
        (
            header(10, magic=20240801, version=7) + IDS[:20].tobytes(),
            'another header of llm.c, magic 20240801, version 7; expected GPT-2 tokens',
        ),
        (header(10)[2:], 'token 308 at position 0'),
        (IDS[:9].tobytes() + b'x', 'holds 19 bytes of tokens'),
        (b'x', '1 bytes'),
        (b'', '0 bytes'),
        (
            IDS[:9].tobytes() + b'\x15\x01' + IDS[:9].tobytes(),
            r'token 277 at position 9, outside .*\[0, 277\)',
        ),
        (header(3) + b'\x01\x00\x02\x00\xff\xff', 'token 65535 at position 2'),
    ],
)
@pytest.mark.parametrize('name', ['web_train_000001.bin', 'web_val_000000.bin'])
def test_damage_is_named(folder, name, content, named):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f'{name} .*{named}'):
        open_token_files(f'{folder}/*.bin', SMALL)


def test_patterns_without_a_match(folder, monkeypatch):
    monkeypatch.setattr(tokenizers, 'find_merges', lambda: MERGES)
    for pattern, named in (
        (f'{folder}/*train*.bin', 'no val file among the 2 that match'),
        (f'{folder}/*val*.bin', 'no train file among the 1 '),
        (f'{folder}/x*.bin', 'no train file among the 0 '),
        ('train.bin', 'among the 0 '),
    ):
        with pytest.raises(UserError, match=named):
            load.load_dataset(corpus=pattern, **SETTINGS)
    with pytest.raises(
        UsageError, match=r"data.tokenizer is 'char': set --config.data.tokenizer=gpt2"
    ):
        load.load_dataset(corpus=f'{folder}/*.bin', **SETTINGS | {'tokenizer': 'char'})
    (folder / 'web_train_1.bin').mkdir()
    with pytest.raises(UserError, match=r'web_train_1.bin cannot be read: Is a directory'):
        open_token_files(f'{folder}/*.bin', SMALL)


def test_val_is_a_word_of_the_name(tmp_path):
    names = {
        'train': ['medieval_train_1.bin', 'interval.bin', 'valley.bin', 'retrieval-2.bin', 'a.bin'],
        'val': [
            'web_val_000.bin',
            'val.bin',
            'VAL1.bin',
            'x-valid.bin',
            'a.validation.bin',
            'eval.bin',
        ],
    }
    for split in ('train', 'val'):
        for name in names[split]:
            put(tmp_path / name, IDS[:100] if split == 'train' else IDS[:10])
    dataset = open_token_files(f'{tmp_path}/*.bin', SMALL)
    assert len(dataset.train) == 100 * len(names['train'])
    assert len(dataset.val) == 10 * len(names['val'])


def test_tokens_of_another_vocabulary_of_nanogpt(folder):
    put(folder / 'train.bin', IDS % 65, head=False)
    open_token_files(f'{folder}/*.bin', SMALL)
    (folder / 'meta.pkl').write_bytes(b'never read')
    with pytest.raises(
        UserError, match=r'train.bin is beside meta.pkl, .*; prepare the text itself'
    ):
        open_token_files(f'{folder}/*.bin', SMALL)
    (folder / 'train.bin').unlink()
    open_token_files(f'{folder}/*.bin', SMALL)  # llm.c's header says whose tokens they are


def test_a_folder_whose_name_is_a_pattern(folder):
    folder = folder.rename(folder.with_name('[v2]'))
    assert len(open_token_files(f'{folder}/*.bin', SMALL).train) == 700


def test_a_file_cut_short_while_it_is_used(folder):
    dataset = open_token_files(f'{folder}/*.bin', SMALL)
    path = folder / 'web_train_000002.bin'
    os.truncate(path, 1024 + 2 * 200)
    assert dataset.train.read(0, 500).tolist() == IDS[:500].tolist()
    for start in (450, 600):
        with pytest.raises(
            UserError, match=r'000002.bin was cut short while it was in use; restore'
        ):
            dataset.train.read(start, 650)
