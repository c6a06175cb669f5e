"""GPT-2's vocabulary: where it is looked for; other files are refused, and none is deleted."""

import hashlib
import os
from pathlib import Path

import pytest
from bpe import MERGES, SMALL

from gpt2_jax import files
from gpt2_jax.data import vocabulary
from gpt2_jax.data.tokenizers import make_tokenizer
from gpt2_jax.errors import UserError

FILE = f'#version: 0.2\n{MERGES}'.encode()


@pytest.fixture(autouse=True)
def publish(tmp_path, monkeypatch):
    """An empty current folder, empty caches, no network, and a small published vocabulary."""
    monkeypatch.chdir(tmp_path)
    folders = {
        'XDG_CACHE_HOME': 'cache',
        'GPT2_JAX_DATA_DIR': 'mine',
        'TIKTOKEN_CACHE_DIR': 'tiktoken',
    }
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    source = files.Source(
        'http://127.0.0.1:9/vocab.bpe', hashlib.sha256(FILE).hexdigest(), len(FILE)
    )
    monkeypatch.setattr(vocabulary, 'SOURCE', source)
    monkeypatch.setattr(vocabulary, 'MERGES_SHA256', hashlib.sha256(MERGES.encode()).hexdigest())


def put(path, data=FILE):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


CACHED = 'tiktoken/' + hashlib.sha1(b'http://127.0.0.1:9/vocab.bpe').hexdigest()
PLACES = [
    'data/gpt2/vocab.bpe',
    'data/gpt2/merges.txt',
    'mine/gpt2/vocab.bpe',
    'mine/gpt2/merges.txt',
    'cache/gpt2_jax/gpt2/vocab.bpe',
    'cache/gpt2_jax/gpt2/merges.txt',
    CACHED,
]


@pytest.mark.parametrize('place', PLACES)
def test_each_place_is_searched(place, monkeypatch):
    put(place)
    assert make_tokenizer('gpt2', '') == SMALL
    if place == CACHED:
        monkeypatch.delenv('TIKTOKEN_CACHE_DIR')
        with pytest.raises(UserError):
            vocabulary.find_merges()


def test_order_of_the_places():
    for i, place in enumerate(reversed(PLACES)):
        put(place, b'wrong %d' % i)
        with pytest.raises(UserError, match=place):
            vocabulary.find_merges()


@pytest.mark.parametrize(
    'data', [MERGES.encode(), FILE.replace(b'\n', b'\r\n'), FILE.replace(b'0.2', b'0.1')]
)
def test_the_merges_count_and_not_their_version_line(data):
    put('data/gpt2/merges.txt', data)
    assert vocabulary.find_merges() == MERGES


@pytest.mark.parametrize(
    'data', [b'', FILE[:-1], FILE + b'\n', FILE.replace(b'l l', b'l m'), b'\xff']
)
@pytest.mark.parametrize('place', [PLACES[1], CACHED])
def test_another_vocabulary_is_refused_and_kept(place, data):
    put(place, data)
    with pytest.raises(UserError, match=f"{place} does not hold GPT-2's merges: .* move it away"):
        vocabulary.find_merges()
    assert Path(place).read_bytes() == data


def test_download_goes_to_the_cache(monkeypatch):
    def fetch(name, source, file):
        file.write(FILE)
        return hashlib.sha256(FILE).hexdigest()

    monkeypatch.setattr(files, '_download', fetch)
    assert vocabulary.find_merges() == MERGES
    monkeypatch.setattr(files, '_download', None)
    assert vocabulary.find_merges() == MERGES  # now from the cache
    assert os.listdir('cache/gpt2_jax/gpt2') == ['vocab.bpe']
    assert not Path('tiktoken').exists()


def test_no_network_names_each_way_out():
    with pytest.raises(UserError) as caught:
        vocabulary.find_merges()
    message = str(caught.value)
    assert '\n' not in message
    assert 'refused' in message
    for way in (
        'vocab.bpe or merges.txt',
        'data/gpt2',
        'cache/gpt2_jax/gpt2',
        'GPT2_JAX_DATA_DIR',
        'gpt2/vocab.bpe',
        'TIKTOKEN_CACHE_DIR',
        'http://127.0.0.1:9/vocab.bpe',
    ):
        assert way in message
    assert os.listdir('cache/gpt2_jax/gpt2') == []


def test_a_file_over_the_limit_is_not_read():
    Path('data/gpt2').mkdir(parents=True)
    with open('data/gpt2/vocab.bpe', 'wb') as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r'vocab.bpe has 1,099,511,627,776 bytes: expected at most'):
        vocabulary.find_merges()
