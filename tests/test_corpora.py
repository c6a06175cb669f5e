"""Corpora: where a text is looked for, in which order, and the error if it is not found."""

import contextlib
import gzip
import hashlib
import http.server
import os
import string
import threading
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data import corpora
from gpt2_jax.data.corpora import CorpusNotFound, find_text
from gpt2_jax.errors import UserError

TEXT = 'Sweet are the uses\r\nof adversity…\n' * 9000  # more than one block of the download
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {
            '/good': TEXT.encode(),
            '/other': b'<html>sign in first</html>',
            '/cut': TEXT.encode()[:70000],
            '/long': TEXT.encode() * 9,
        }
        if self.path not in body:
            return self.send_error(404)
        self.send_response(200)
        self.send_header(
            'Content-Length', str(len(body['/good' if self.path == '/cut' else self.path]))
        )
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the reader of '/long' leaves early
            self.wfile.write(body[self.path])

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={'poll_interval': 0.02})
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """An empty current folder, an empty cache, and a corpus 'play' published at a URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('GPT2_JAX_DATA_DIR', str(tmp_path / 'mine'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')

    def set_url(url='http://127.0.0.1:9/none'):  # the discard port: refused at once
        monkeypatch.setattr(
            corpora, 'CORPORA', {'play': corpora.Source(url, SHA256, len(TEXT.encode()))}
        )

    set_url()
    return set_url


def put(path, text=TEXT):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_file_is_read_as_it_is(publish):
    put('my.book.txt', 'a\r\nb\rc\né')
    corpus = find_text('my.book.txt')
    assert corpus.text == 'a\r\nb\rc\né'
    assert corpus.name == 'my.book'
    assert corpus.path == Path('my.book.txt')
    assert corpus.sha256 == hashlib.sha256('a\r\nb\rc\né'.encode()).hexdigest()


def test_compressed_text_and_a_byte_order_mark(publish):
    put('a.TXT', '\ufeffcafé')
    Path('b.txt.gz').write_bytes(gzip.compress('\ufeffcafé'.encode()))
    assert find_text('a.TXT').text == find_text('b.txt.gz').text == 'café'


@pytest.mark.parametrize(
    ('name', 'named'),
    [
        ('a.jsonl', 'holds documents, not one text; give scripts/prepare.py this file'),
        ('a.NDJSON.gz', 'holds documents'),
        ('a.json', 'holds documents'),
        ('a.parquet', 'holds documents'),
        ('a.csv', 'is not text, by its suffix .csv; convert it to .jsonl'),
        ('a.zip', 'is not text, by its suffix .zip; unpack it first'),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(publish, name, named):
    put(name)
    with pytest.raises(UserError, match=f'{name} {named}'):
        find_text(name)


def test_a_text_too_large_for_memory(publish, monkeypatch):
    monkeypatch.setattr(corpora, 'MAX_CHARACTERS', 3)
    put('a.txt', 'abc')
    assert find_text('a.txt').text == 'abc'
    put('a.txt', 'abcd')
    with pytest.raises(UserError, match=r'a.txt has over 3 characters, .*; prepare it by'):
        find_text('a.txt')


def test_a_path_below_the_home_folder(publish, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    put('home/a.txt', 'mine')
    assert find_text('~/a.txt').text == 'mine'


def test_places_in_order(publish, monkeypatch):
    for place in ['cache/gpt2_jax/play/input.txt', 'mine/play/input.txt', 'data/play/input.txt']:
        path = put(place)
        corpus = find_text('play')
        assert corpus.path.resolve() == path.resolve()
        assert corpus.text == TEXT
        assert corpus.sha256 == SHA256
    put('play', 'a file of that name')
    assert find_text('play').text == 'a file of that name'
    monkeypatch.delenv('GPT2_JAX_DATA_DIR')
    for path in ['play', 'data/play/input.txt']:
        os.remove(path)
    assert find_text('play').path.parts[-4:] == ('cache', 'gpt2_jax', 'play', 'input.txt')


def test_local_copy_with_another_hash_is_refused_and_kept(publish):
    path = put('data/play/input.txt', 'not the play')
    with pytest.raises(UserError) as caught:
        find_text('play')
    assert not isinstance(caught.value, CorpusNotFound)  # a fallback must not hide it
    wrong = hashlib.sha256(b'not the play').hexdigest()
    for part in (str(path), wrong[:12], SHA256[:12], 'move it away'):
        assert part in str(caught.value)
    assert path.read_text() == 'not the play'


def test_download_is_verified_and_kept(publish, server, capsys):
    publish(server + '/good')
    assert find_text('play').text == TEXT
    err = capsys.readouterr().err
    assert 'downloading play' in err
    assert server in err
    assert 'downloaded 0.3 MB' in err
    assert os.listdir('cache/gpt2_jax/play') == ['input.txt']
    publish()
    assert find_text('play').text == TEXT  # now from the cache


@pytest.mark.parametrize(
    ('path', 'reason'),
    [
        ('/other', 'expected ' + SHA256),
        ('/cut', 'SHA-256|IncompleteRead'),
        ('/long', 'more than the expected 324,000 bytes'),
        ('/gone', '404'),
    ],
)
def test_failed_download_leaves_nothing(publish, server, path, reason):
    publish(server + path)
    with pytest.raises(CorpusNotFound, match=reason):
        find_text('play')
    assert os.listdir('cache/gpt2_jax/play') == []


def test_no_network_names_each_way_out(publish):
    with pytest.raises(CorpusNotFound) as caught:
        find_text('play')
    message = str(caught.value)
    assert '\n' not in message
    assert 'refused' in message
    for way in (
        'data/play/input.txt',
        'cache/gpt2_jax/play/input.txt',
        'GPT2_JAX_DATA_DIR',
        'path of any text file',
        'http://127.0.0.1:9/none',
    ):
        assert way in message
    assert os.listdir('cache/gpt2_jax/play') == []


def test_cache_that_cannot_be_written(publish):
    put('cache/gpt2_jax', 'a file where the folder should be')
    with pytest.raises(CorpusNotFound, match='download failed'):
        find_text('play')


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        (b'', 'text.txt is empty'),
        (b'caf\xe9\n', r'text.txt is not UTF-8 text: byte 0xe9 at offset 3'),
        (b'\xef\xbb\xbf', 'text.txt is empty'),
    ],
)
def test_unusable_text(publish, content, named):
    Path('text.txt').write_bytes(content)
    with pytest.raises(UserError, match=named):
        find_text('text.txt')


def test_unreadable_and_missing(publish, monkeypatch):
    Path('folder').mkdir()
    with pytest.raises(
        UserError, match=r'folder is a folder, and not a prepared one .*prepare.py --input folder'
    ):
        find_text('folder')
    put('folder/train.bin')
    with pytest.raises(UserError, match=r'not a prepared one .*give the pattern folder/\*\.bin'):
        find_text('folder')
    with pytest.raises(UserError, match=r"'plya': did you mean 'play'\? .*play, python-topics"):
        find_text('plya')
    with pytest.raises(UserError, match=r"no text file and no corpus called 'nowhere/x.txt': give"):
        find_text('nowhere/x.txt')

    def refuse(path, *_, **__):  # a test that runs as root can read every file
        raise PermissionError(13, 'Permission denied')

    put('closed.txt')
    monkeypatch.setattr(os, 'open', refuse)
    with pytest.raises(UserError, match=r'closed.txt cannot be read: Permission denied'):
        find_text('closed.txt')


def test_embedded_text_needs_no_file(publish):
    corpus = find_text('python-topics')
    assert corpus.path is None
    assert len(corpus.text) > 400_000
    assert 'The "for" statement' in corpus.text
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_repeated_letters():
    """Most letters are those of 2 or of 8 to 16 places before, and no other distance stands out."""
    corpus = find_text('repeated-letters')
    assert corpus.path is None
    assert set(corpus.text) == set(string.ascii_lowercase)
    assert corpus.sha256 == find_text('repeated-letters').sha256
    letters = np.frombuffer(corpus.text.encode(), np.uint8)
    assert letters.size == pytest.approx(65_000 * 32, rel=0.01)
    same = {back: (letters[back:] == letters[:-back]).mean() for back in (1, 2, 3, 7, 9, 15, 31)}
    assert same[2] == pytest.approx(1 / 3, abs=0.02)
    assert same[9] > same[15] > same[1] + 0.02
    for back in (1, 3, 7, 31):
        assert same[back] == pytest.approx(1 / 26, abs=0.02)


@pytest.mark.skipif(
    'GPT2_JAX_DATA_DIR' not in os.environ, reason='needs TinyShakespeare in GPT2_JAX_DATA_DIR'
)
def test_tinyshakespeare():
    corpus = find_text('tinyshakespeare')
    assert len(corpus.text) == 1_115_394
    assert len(set(corpus.text)) == 65
    assert corpus.sha256 == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
