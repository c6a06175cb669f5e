"""Large data are verified once: an unchanged file is not read again, and any change is noticed."""

import hashlib
import io
import json
import os
import threading
import tracemalloc

import numpy as np
import pytest
from bpe import SMALL

from gpt2_jax import verified
from gpt2_jax.data import id_files, tokenizers
from gpt2_jax.data.batches import train_batch
from gpt2_jax.data.bin_files import open_token_files
from gpt2_jax.data.shards import open_shards
from gpt2_jax.errors import UserError
from gpt2_jax.prepare import prepare

SETTLED = verified.SETTLED_NS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(verified, 'SETTLED_NS', 0)


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read whole since the list was cleared."""
    verify, names = id_files.verify_ids, []

    def note(ids, *args, **options):
        names.append(os.path.basename(ids.path))
        return verify(ids, *args, **options)

    monkeypatch.setattr(id_files, 'verify_ids', note)
    return names


def write_bins(folder, n=4):
    folder.mkdir()
    for i in range(n):
        (np.arange(50, dtype='<u2') + i).tofile(
            folder / f'web_{"val" if not i else "train"}_{i}.bin'
        )
    return f'{folder}/*.bin'


def test_unchanged_files_are_read_once(tmp_path, monkeypatch, read):
    pattern = write_bins(tmp_path / 'web')
    first = open_token_files(pattern, SMALL)
    assert len(read) == 4
    open_token_files(pattern, SMALL)
    assert len(read) == 8  # small data: each time
    assert not (tmp_path / 'cache').exists()

    monkeypatch.setattr(id_files, 'LARGE_BYTES', 400)
    assert open_token_files(pattern, SMALL).sha256 == first.sha256
    read.clear()
    again = open_token_files(pattern, SMALL)
    assert read == []
    assert again.sha256 == first.sha256
    assert again.train.read(0, 150).tolist() == first.train.read(0, 150).tolist()
    # Under another name of the same place, and not under another vocabulary.
    monkeypatch.chdir(tmp_path)
    open_token_files('web/*.bin', SMALL)
    assert read == []
    open_token_files(pattern, tokenizers.Gpt2Tokenizer(SMALL.merges + 'x y\n'))
    assert len(read) == 4


@pytest.mark.parametrize('times', ['new', 'old'])
def test_a_change_is_noticed(tmp_path, monkeypatch, read, times):
    """Also of one byte, and if the time of modification is set back."""
    pattern, path = write_bins(tmp_path / 'web'), tmp_path / 'web/web_train_2.bin'
    monkeypatch.setattr(id_files, 'LARGE_BYTES', 400)
    before, stat = open_token_files(pattern, SMALL).sha256, path.stat()
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)
    if times == 'old':
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
    read.clear()
    assert open_token_files(pattern, SMALL).sha256 != before
    assert read == ['web_train_2.bin']


def test_a_file_that_changed_a_moment_ago_is_not_recorded(tmp_path, monkeypatch, read):
    pattern = write_bins(tmp_path / 'web')
    monkeypatch.setattr(id_files, 'LARGE_BYTES', 400)
    monkeypatch.setattr(verified, 'SETTLED_NS', SETTLED)
    open_token_files(pattern, SMALL)
    open_token_files(pattern, SMALL)
    assert len(read) == 8


@pytest.mark.parametrize(
    'record', ['', '[]', '{"web": 5}', '{"PATH": {"state": [], "sha256": "x"}}']
)
def test_a_damaged_record_counts_as_none(tmp_path, monkeypatch, read, record):
    pattern = write_bins(tmp_path / 'web')
    monkeypatch.setattr(id_files, 'LARGE_BYTES', 400)
    before = open_token_files(pattern, SMALL).sha256
    (kept,) = (tmp_path / 'cache/gpt2_jax/verified').iterdir()
    kept.write_text(record.replace('PATH', f'{tmp_path}/web/web_train_1.bin'))
    read.clear()
    assert open_token_files(pattern, SMALL).sha256 == before
    assert len(read) == 4


def test_without_a_cache_all_is_read_again(tmp_path, monkeypatch, read):
    pattern = write_bins(tmp_path / 'web')
    monkeypatch.setattr(id_files, 'LARGE_BYTES', 400)
    (tmp_path / 'cache').write_text('a file in the place of the folder')
    open_token_files(pattern, SMALL)
    open_token_files(pattern, SMALL)
    assert len(read) == 8


def wait():
    for thread in threading.enumerate():
        if thread.name == 'verify':
            thread.join(30)


def test_shards_are_verified_in_the_background(tmp_path, monkeypatch, read, capsys):
    """A damaged one stops the run that reads it, and the next start is refused."""
    (tmp_path / 'a.txt').write_text('abcdefghijkl' * 50)
    folder, path = tmp_path / 'shards', tmp_path / 'shards/train_00003.npy'
    options = {'tokenizer_name': 'char', 'val_fraction': 0.1, 'shard_tokens': 100}
    prepare([str(tmp_path / 'a.txt')], str(folder), **options)
    whole, content = open_shards(folder), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([(content[-1] + 1) % 12]))
    read.clear()
    monkeypatch.setattr(id_files, 'LARGE_BYTES', 200)
    capsys.readouterr()
    begin, verify = threading.Event(), id_files.verify_ids

    def verify_later(*args, **options):
        begin.wait(30)
        return verify(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(id_files, 'verify_ids', verify_later)
        opened = open_shards(folder)
        assert 'verifying 0.0 GB of tokens in the background' in capsys.readouterr().err
        assert opened.sha256 == whole.sha256
        assert np.array_equal(opened.train.read(0, 300), whole.train.read(0, 300))
        begin.set()
        wait()
    assert len(read) == 7
    assert np.array_equal(opened.train.read(0, 300), whole.train.read(0, 300))
    message = (
        r'train_00003\.npy is damaged: its SHA-256 is .*train again from a checkpoint of before'
    )
    with pytest.raises(UserError, match=message):
        opened.train.read(290, 310)
    read.clear()
    with pytest.raises(UserError, match=r'train_00003\.npy is damaged: its SHA-256 is'):
        open_shards(folder)
    assert read == ['train_00003.npy']
    path.write_bytes(content)
    read.clear()
    opened = open_shards(folder)
    assert read == ['train_00003.npy']
    assert np.array_equal(opened.train.read(0, 500), whole.train.read(0, 500))
    open_shards(folder)
    assert read == ['train_00003.npy']
    assert capsys.readouterr().err == ''


SHARDS, SHARD_TOKENS = 300, 4_000_000


def write_sparse(folder):
    """A prepared folder of 300 shards of 4 million zeros each, which take no room on the disk."""
    folder.mkdir()
    header = io.BytesIO()
    about = {'descr': '<u2', 'fortran_order': False, 'shape': (SHARD_TOKENS,)}
    np.lib.format.write_array_header_1_0(header, about)
    shards = {'train': [], 'val': []}
    digest = hashlib.sha256(header.getvalue() + bytes(2 * SHARD_TOKENS)).hexdigest()
    for split in ['val'] + ['train'] * (SHARDS - 1):
        name = f'{split}_{len(shards[split]):05d}.npy'
        (folder / name).write_bytes(header.getvalue())
        os.truncate(folder / name, len(header.getvalue()) + 2 * SHARD_TOKENS)
        shards[split].append({'file': name, 'tokens': SHARD_TOKENS, 'sha256': digest})
    (folder / 'tokenizer.json').write_text(tokenizers.to_json(SMALL))
    manifest = {
        'format': 1,
        'dtype': 'uint16',
        'tokenizer': {'sha256': tokenizers.fingerprint(SMALL)},
        'splits': {split: {'shards': rows} for split, rows in shards.items()},
    }
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    return [shard['file'] for rows in shards.values() for shard in rows], digest


def test_large_data_take_little_memory(tmp_path, read):
    """2.4 GB in sparse files: opened without reading them, and any batch made from them."""
    folder = tmp_path / 'sparse'
    names, digest = write_sparse(folder)
    paths = [str(folder / name) for name in names]
    states = verified.states(paths)
    verified.remember(paths, states, [digest] * len(paths), SMALL.vocab_size)
    tracemalloc.start()
    try:
        train = open_shards(folder).train
        assert len(train) == (SHARDS - 1) * SHARD_TOKENS > 10**9
        for step in (0, 10**6):
            batch = train_batch(train, seed=0, step=step, batch_size=8, seq_len=64)
            assert not batch['inputs'].any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == []
    assert peak < 48 << 20  # 32 MB of them to read the manifest, never filled
    # Damage still shows: in the size at once, and in a changed file because it is read.
    with open(paths[7], 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        file.write(b'\x01')
    with pytest.raises(
        UserError, match=r'train_00007\.npy holds token 256 at position 3999999|SHA'
    ):
        open_shards(folder)
    assert read == ['train_00007.npy']
    os.truncate(paths[9], 1 << 20)
    with pytest.raises(UserError, match=r'train_00009\.npy is damaged: it has 1,048,576 bytes'):
        open_shards(folder)
