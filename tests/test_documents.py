"""Files of documents: what cannot be read is named by line or row. Good files: test_shards.py."""

import gzip
import json
import sys

import pytest

from gpt2_jax.data import documents
from gpt2_jax.errors import UserError


def read(path, text_field='text'):
    return [''.join(document) for document in documents.read(str(path), text_field)]


def test_a_text_file_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', 3)
    (tmp_path / 'a.md').write_bytes('{"text": "é"}\r\n\n'.encode())
    assert read(tmp_path / 'a.md') == ['{"text": "é"}\r\n\n']


def test_lines_of_json(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(
        '{"text": "é\\ud83c\\udfad\\u2028"}\r\n \n{"n": 1, "text": ""}'.encode()
    )
    assert read(tmp_path / 'a.jsonl') == ['é🎭\u2028', '']


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        ('{"text": "a"}\n{"text": "a"\n', 'line 2 is not JSON: Expecting'),
        ('\n{"text": "a\xe9"}', 'line 2 is not JSON: .*utf-8'),
        ('[' * 100_000, 'line 1 is not JSON: .*recursion'),
        (
            '{"txt": "a", "id": 1}',
            "line 1 has no text in 'text', but None; its fields are 'txt', 'id': name the field",
        ),
        ('{"text": 1}', "line 1 has no text in 'text', but 1; its fields are 'text'"),
        ('["a"]', "line 1 has no text in 'text', but None; its fields are none"),
        ('{"text": "a"}\n{"text": "\\ud800"}', r"line 2: half of a surrogate pair, '\\ud800'"),
    ],
)
@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz'])
def test_wrong_lines_are_named(tmp_path, content, named, ending):
    data = content.encode('latin-1')
    path = tmp_path / f'a.{ending}'
    path.write_bytes(gzip.compress(data) if ending.endswith('gz') else data)
    with pytest.raises(UserError, match=f'a.{ending}.*{named}'):
        read(path)


@pytest.mark.parametrize(
    'change',
    [
        lambda data: data[:-9],
        lambda data: b'{"text": ""}',
        lambda data: data[:10] + b'\xff' + data[11:],
        lambda data: data[:-8] + bytes(8),
    ],
    ids=['cut', 'no gzip', 'no deflate', 'wrong checksum'],
)
def test_damaged_gzip_is_named(tmp_path, change):
    data = gzip.compress(json.dumps({'text': ' '.join(map(str, range(999)))}).encode())
    assert len(data) > 300
    (tmp_path / 'a.jsonl.gz').write_bytes(change(data))
    with pytest.raises(UserError, match=r'cannot read the text .*a.jsonl.gz: \S'):
        read(tmp_path / 'a.jsonl.gz')


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / 'd.jsonl').mkdir()
    for name in ('d.jsonl', 'none.jsonl', 'none.jsonl.gz', 'none.txt'):
        with pytest.raises(UserError, match=f'cannot read the text .*{name}: (Is a dir|No such)'):
            read(tmp_path / name)


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow: pip install -e '.\[parquet\]'"):
        read('a.parquet')


def test_parquet(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(documents, 'PARQUET_ROWS', 2)
    path = tmp_path / 'a.parquet'
    parquet.write_table(
        pyarrow.table({'id': [1, 2, 3], 'text': ['é', '', 'the\n'], 'n': ['a', None, 'c']}), path
    )
    assert read(path) == ['é', '', 'the\n']
    for field, named in (
        ('n', "row 2 has no text in 'n', but None"),
        ('id', "row 1 has no text in 'id', but 1"),
        ('body', "a.parquet has no text in 'body', .* 'id', 'text', 'n'"),
    ):
        with pytest.raises(UserError, match=named):
            read(path, field)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r'a.parquet cannot be read as Parquet: \S'):
        read(path)
    with pytest.raises(UserError, match=r'cannot read the text .*none.parquet: \S'):
        read(tmp_path / 'none.parquet')
