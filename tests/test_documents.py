"""Files of documents: what cannot be read is named by line or row. Good files: test_shards.py."""

import gzip
import json
import os
import sys

import pytest

from gpt2_jax import prepare
from gpt2_jax.data import documents
from gpt2_jax.errors import UserError


def read(path, text_field='text'):
    return [''.join(document) for document in documents.read(str(path), text_field)]


def test_a_text_file_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', 3)
    text = '{"text": "é"}\r\n\n'
    (tmp_path / 'a.md').write_bytes(text.encode())
    (tmp_path / 'b.TXT').write_bytes(b'\xef\xbb\xbf' + text.encode())
    (tmp_path / 'c.rst.gz').write_bytes(gzip.compress(text.encode()))
    assert (
        read(tmp_path / 'a.md') == read(tmp_path / 'b.TXT') == read(tmp_path / 'c.rst.gz') == [text]
    )


def test_lines_of_json(tmp_path):
    lines = '{"text": "é\\ud83c\\udfad\\u2028"}\r\n \n{"n": NaN, "text": ""}'.encode()
    for name in ('a.jsonl', 'a.JSONL', 'a.ndjson', 'a.json'):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + lines)
        (tmp_path / f'{name}.GZ').write_bytes(gzip.compress(lines))
        assert read(tmp_path / name) == read(tmp_path / f'{name}.GZ') == ['é🎭\u2028', '']


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        ('{"text": "a"}\n{"text": "a"\n', 'line 2 cannot be read as JSON: Expecting'),
        ('\n{"text": "a\xe9"}', 'line 2 cannot be read as JSON: .*utf-8'),
        ('[' * 100_000, 'line 1 cannot be read as JSON: it is nested too deeply'),
        ('[\n{"text": "a"},\n]', 'line 1 cannot be read as JSON: .*expected one object a line; of'),
        (
            '{"txt": "a", "id": 1}',
            "line 1 has no text in 'text', but None; its fields are 'txt', 'id'; name the field",
        ),
        ('{"text": 1}', "line 1 has no text in 'text', but 1; its fields are 'text'"),
        ('["a"]', 'line 1 is a list of 1; expected one object a line'),
        ('{}', "line 1 has no text in 'text', but None; its fields are none"),
        ('{"text": "a"}\n{"text": "\\ud800"}', r"line 2 holds half of a surrogate pair, '\\ud800'"),
        ('{"text": "a"}\n{"text": "%s"}' % ('a' * 999), 'line 2 has over 500 bytes; split'),
    ],
)
@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz'])
def test_wrong_lines_are_named(tmp_path, monkeypatch, content, named, ending):
    monkeypatch.setattr(documents, 'MAX_LINE_BYTES', 100_000 if content[0] == '[' else 500)
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
    with pytest.raises(UserError, match=r'a.jsonl.gz cannot be read as compressed JSON Lines: \S'):
        read(tmp_path / 'a.jsonl.gz')


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / 'd.jsonl').mkdir()
    for name in ('d.jsonl', 'none.jsonl', 'none.jsonl.gz', 'none.txt'):
        with pytest.raises(UserError, match=f'{name} cannot be read: (Is a dir|No such)'):
            read(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'a.parquet').touch()
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow: pip install -e '.\[parquet\]'"):
        read(tmp_path / 'a.parquet')


def test_memory_for_parquet_is_bounded_by_bytes(tmp_path, monkeypatch):
    """Equal texts are stored once: small in the file, and large in every row that is read."""
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    path, read_at_once = tmp_path / 'a.parquet', []
    whole = parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, **options):
        for batch in whole(self, *arguments, **options):
            read_at_once.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', iter_batches)
    texts = ['a' * 9000] * 20 + ['b' * 90, 'c'] * 10
    parquet.write_table(pyarrow.table({'text': texts}), path, row_group_size=20)
    monkeypatch.setattr(documents, 'PARQUET_BYTES', 30_000)
    assert read(path) == texts
    assert max(read_at_once) < 30_000
    assert len(read_at_once) == 7 + 1
    monkeypatch.setattr(documents, 'MAX_GROUP_BYTES', 8000)
    with pytest.raises(
        UserError, match=r'a.parquet has 9,\d{3} bytes of text in row group 0; write it with row gr'
    ):
        read(path)
    assert len(read_at_once) == 7 + 1


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
    with pytest.raises(UserError, match=r'none.parquet cannot be read: No such file'):
        read(tmp_path / 'none.parquet')


def test_every_byte_of_a_file_is_observed(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(documents, 'BLOCK_BYTES', 100)
    line = b'{"text": "abc"}\n' * 99
    (tmp_path / 'a.jsonl').write_bytes(line)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(line))
    (tmp_path / 'a.txt').write_bytes(line)
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(line))
    parquet.write_table(pyarrow.table({'text': ['a'] * 99}), tmp_path / 'a.parquet')
    for path in tmp_path.iterdir():
        seen = bytearray()
        for document in documents.read(str(path), 'text', seen.extend):
            for _ in document:
                pass
        assert seen == path.read_bytes()


def put(folder, *names, content='x'):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_inputs_are_files_folders_patterns_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    texts = ['docs/a.txt', 'docs/z.jsonl', 'docs/b/README', 'docs/b/c.md.gz']
    put(
        tmp_path,
        *texts,
        'x[1].txt',
        'other.txt',
        '@odd',
        'docs/p.PNG',
        'docs/.git/x',
        'docs/.hidden',
    )
    put(tmp_path, 'docs/empty', 'docs/b/empty.txt', content='')
    (tmp_path / 'docs/circle').symlink_to('../docs')
    os.mkfifo(tmp_path / 'docs/pipe')
    (tmp_path / 'names').write_text('other.txt\n\n docs/b \n*.txt\n')
    below_b, left_out = texts[2:], {'empty files': 2, '.png files': 1}
    for inputs, found, without in (
        (['docs'], texts, left_out),
        (['~/docs'], [f'{tmp_path}/{name}' for name in texts], left_out),
        (
            ['x[1].txt', '@odd', 'other.txt', 'other.txt'],
            ['x[1].txt', '@odd', *['other.txt'] * 2],
            {},
        ),
        (['docs/*.*'], ['docs/a.txt', 'docs/z.jsonl'], {'.png files': 1}),
        (['@names'], ['other.txt', *below_b, 'other.txt', 'x[1].txt'], {'empty files': 1}),
        (['docs/empty'], ['docs/empty'], {}),
    ):
        assert documents.find_files(inputs) == (found, without)


@pytest.mark.parametrize(
    ('name', 'named'),
    [
        ('none', 'none cannot be read: No such file'),
        ('*.none', r'\*.none cannot be read: No such file'),
        ('a.csv', 'a.csv is not text, by its suffix .csv; convert it'),
        ('pipe', 'pipe cannot be read: it is a device, a pipe'),
        ('images', r'images holds no text; left out: 2 \.png files, 1 empty file$'),
        ('*.csv', r'holds no text; left out: 1 \.csv file$'),
        ('@none', '^none cannot be read: No such file'),
        ('@list', 'a.csv is not text'),
        ('gs://b/x', 'is an address'),
    ],
)
def test_inputs_without_a_text_are_refused(tmp_path, monkeypatch, name, named):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, 'a.csv', 'images/a.png', 'images/b/c.png')
    put(tmp_path, 'images/empty', content='')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'list').write_text('a.csv')
    with pytest.raises(UserError, match=named):
        documents.find_files([name])


def test_a_file_that_was_removed_after_it_was_found(tmp_path, monkeypatch):
    """prepare.py blames the file that it cannot read, and not the folder that it writes."""
    for name in ('a.txt', 'b.txt'):
        (tmp_path / name).write_text('ba bo')
    find = documents.find_files

    def find_and_lose(inputs):
        found = find(inputs)
        (tmp_path / 'a.txt').unlink()
        return found

    monkeypatch.setattr(documents, 'find_files', find_and_lose)
    with pytest.raises(UserError, match=r'a\.txt cannot be read: No such file'):
        prepare.prepare(
            [str(tmp_path)],
            str(tmp_path / 'out'),
            tokenizer_name='char',
            val_fraction=0.1,
            shard_tokens=100,
        )
