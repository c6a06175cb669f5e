"""Feeds damaged files to a reader of the data package: the result is a value or a UserError.

    python tests/faults/fuzz.py --inputs=20000              # all readers
    python tests/faults/fuzz.py --reader=manifest --seed=7

Each input must end in a value that was checked, or in a UserError of one printable line of at most
300 characters, within 10 s. The process may grow by 1 GiB at most, and open nothing but its own
folder. The exit status is 1 if an input breaks a rule; it is printed, with what repeats it.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mutate
import numpy as np

from gpt2_jax import foreign, prepare
from gpt2_jax.data import bin_files, corpora, documents, shards, tokenizers, vocabulary
from gpt2_jax.errors import UserError

SECONDS, GROWTH = 10, 1 << 30
MERGES = ''.join(f'{line}\n' for line in ('t h', 'th e', 'Ġ the', 'l l', 'Ġ Ġ', "' ll", 'Ã ©'))
SMALL = tokenizers.Gpt2Tokenizer(MERGES)
TEXT = "the é the'll 漢字\r\n\n" * 20
LINES = ''.join(json.dumps({'id': i, 'text': TEXT[i : i + 30]}) + '\n' for i in range(20))

Mutate = Callable[[random.Random, bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, good files for it, and how they are damaged.

    `make(folder)` writes the files, `damage` damages one of `files`, `read(folder)` reads them all.
    `after(folder)` runs on the damaged files, to mend a checksum that would hide the damage; it
    changes the files `mended`.
    Nothing may be opened outside the folder `inside`.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    files: tuple[str, ...]
    damage: Mutate = mutate.mutate_bytes
    after: Callable[[Path], None] = lambda folder: None
    mended: tuple[str, ...] = ()
    inside: str = ''


def make_prepared(folder: Path) -> None:
    (folder / 'a.txt').write_text(TEXT)
    options = {'tokenizer_name': 'char', 'val_fraction': 0.1, 'shard_tokens': 100}
    prepare.prepare([str(folder / 'a.txt')], folder / 'out', **options)


def read_prepared(folder: Path) -> None:
    dataset = shards.open_shards(folder / 'out')
    for tokens in (dataset.train, dataset.val):
        if len(tokens):
            ids = tokens.read(0, len(tokens))
            assert ids.max() < dataset.tokenizer.vocab_size
            dataset.tokenizer.decode(ids)


def reseal(folder: Path) -> None:
    """The checksum, and now and then the counts, of the damaged shard."""
    path, shard = folder / 'out/manifest.json', folder / 'out/train_00000.npy'
    if shard.is_file():
        manifest, data = json.loads(path.read_text()), shard.read_bytes()
        entry = manifest['splits']['train']['shards'][0]
        entry['sha256'] = hashlib.sha256(data).hexdigest()
        if len(data) % 2:
            entry['tokens'] = max(1, len(data) - 128)
        path.write_text(json.dumps(manifest))


def damage_ids(rng: random.Random, data: bytes) -> bytes:
    """Damages a shard: half of the time its ids alone, and often none of their number."""
    if rng.random() < 0.5:
        return mutate.mutate_bytes(rng, data)
    return data[:128] + mutate.mutate_bytes(rng, data[128:]).ljust(100, b'\0')[:100]


def read_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.from_json(foreign.read_text(folder / 'tokenizer.json'), 'tokenizer.json')
    assert tokenizers.from_json(tokenizers.to_json(tokenizer)) == tokenizer
    tokenizer.decode(range(min(300, tokenizer.vocab_size)))
    tokenizer.encode('the é')


def make_bin(folder: Path) -> None:
    ids = np.resize(SMALL.encode(TEXT), 500).astype('<u2')
    header = np.array([20240520, 1, 500] + [0] * 253, '<i4')
    (folder / 'train.bin').write_bytes(header.tobytes() + ids.tobytes())
    (folder / 'val.bin').write_bytes(ids.tobytes())


def read_bin(folder: Path) -> None:
    dataset = bin_files.open_token_files(f'{folder}/*.bin', SMALL)
    for tokens in (dataset.train, dataset.val):
        assert tokens.read(0, len(tokens)).max() < SMALL.vocab_size


def read_merges(folder: Path) -> None:
    assert vocabulary.read_merges(folder / 'merges.txt') == MERGES


def make_documents(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name, text in (('a.txt', TEXT), ('a.jsonl', LINES)):
        (folder / name).write_text(text)
        (folder / f'{name}.gz').write_bytes(gzip.compress(text.encode(), mtime=0))
    table = pyarrow.table({'id': range(20), 'text': [TEXT[i : i + 30] for i in range(20)]})
    parquet.write_table(table, folder / 'a.parquet', row_group_size=7)
    (folder / 'list').write_text('a.txt\na.jsonl\n*.gz\n')


def read_documents(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for document in documents.read(str(folder / name), 'text'):
            for block in document:
                block.encode()

    return read


def damage_inside(rng: random.Random, data: bytes) -> bytes:
    """Damages a .gz file, or what is in it."""
    if rng.random() < 0.5:
        return mutate.mutate_bytes(rng, data)
    return gzip.compress(damage_lines(rng, gzip.decompress(data)), mtime=0)


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    if lines[i].startswith(b'{') and rng.random() < 0.7:
        lines[i] = mutate.mutate_json(rng, lines[i]) + b'\n'
        return b''.join(lines)
    return mutate.mutate_bytes(rng, data)


def read_list(folder: Path) -> None:
    os.chdir(folder)  # names in a list are relative
    names, _ = documents.find_files(['@list'])
    assert all(Path(name).is_file() for name in names)


def read_corpus(folder: Path) -> None:
    corpus = corpora.find_text(folder / 'a.txt')
    assert corpus.text
    corpus.text.encode()


def prepare_all(folder: Path) -> None:
    shutil.rmtree(folder / 'out', ignore_errors=True)
    options = {'tokenizer_name': 'char', 'val_fraction': 0.2, 'shard_tokens': 1000}
    manifest = prepare.prepare([str(folder)], folder / 'out', **options)
    dataset = shards.open_shards(folder / 'out')
    assert len(dataset.train) + len(dataset.val) == manifest['inputs']['characters']


PREPARED = {'make': make_prepared, 'read': read_prepared, 'inside': 'out'}
JSON = mutate.mutate_json
READERS = {
    'manifest': Reader(files=('out/manifest.json',), damage=JSON, **PREPARED),
    'tokenizer of a folder': Reader(files=('out/tokenizer.json',), damage=JSON, **PREPARED),
    'npy': Reader(
        files=('out/train_00000.npy',),
        damage=damage_ids,
        after=reseal,
        mended=('out/manifest.json',),
        **PREPARED,
    ),
    'tokenizer': Reader(
        lambda folder: (folder / 'tokenizer.json').write_text(tokenizers.to_json(SMALL)),
        read_tokenizer,
        ('tokenizer.json',),
        JSON,
    ),
    'bin': Reader(make_bin, read_bin, ('train.bin', 'val.bin')),
    'merges': Reader(
        lambda folder: (folder / 'merges.txt').write_text(f'#version: 0.2\n{MERGES}'),
        read_merges,
        ('merges.txt',),
    ),
    'text': Reader(make_documents, read_documents('a.txt'), ('a.txt',)),
    'compressed text': Reader(
        make_documents, read_documents('a.txt.gz'), ('a.txt.gz',), damage_inside
    ),
    'jsonl': Reader(make_documents, read_documents('a.jsonl'), ('a.jsonl',), damage_lines),
    'compressed jsonl': Reader(
        make_documents, read_documents('a.jsonl.gz'), ('a.jsonl.gz',), damage_inside
    ),
    'parquet': Reader(make_documents, read_documents('a.parquet'), ('a.parquet',)),
    'list': Reader(make_documents, read_list, ('list',)),
    'corpus': Reader(make_documents, read_corpus, ('a.txt',)),
    'prepare': Reader(
        make_documents, prepare_all, ('a.txt', 'a.jsonl', 'a.txt.gz', 'a.parquet'), damage_lines
    ),
}

opened: list[str] | None = None  # paths opened while an input is read


def note_open(event: str, arguments: tuple) -> None:
    if (
        event == 'open'
        and opened is not None
        and isinstance(arguments[0], str | bytes | os.PathLike)
    ):
        opened.append(os.fsdecode(arguments[0]))


class Hang(KeyboardInterrupt):
    """Not caught by any reader."""


def alarm(number, frame):
    raise Hang


def outside(folder: Path) -> list[str]:
    """What was opened outside the folder, except Python's own libraries, which import late."""
    allowed = (str(folder), sys.prefix, sys.base_prefix, os.path.dirname(np.__file__))
    found = [os.path.abspath(path) for path in opened]
    return [path for path in found if not path.startswith(allowed)]


def restore(good: Path, damaged: Path) -> None:
    if damaged.is_dir() and not damaged.is_symlink():
        damaged.rmdir()
    else:
        damaged.unlink(missing_ok=True)
    shutil.copyfile(good, damaged)


def run(name: str, seed: int, inputs: int) -> bool:
    """Feeds `inputs` damaged files to a reader; returns whether every rule held."""
    global opened
    reader, good, counts, slowest = READERS[name], True, collections.Counter(), 0.0
    vocabulary.MERGES_SHA256 = hashlib.sha256(MERGES.encode()).hexdigest()
    signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as parent:
        template, folder = Path(parent, 'template'), Path(parent, 'folder')
        template.mkdir()
        reader.make(template)
        shutil.copytree(template, folder)
        reader.read(folder)  # good files are read
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(seed, seed + inputs):
            rng = random.Random(f'{name} {i}')
            path = folder / rng.choice(reader.files)
            if rng.random() < 0.02:
                mutate.mutate_kind(rng, path)
            else:
                path.write_bytes(reader.damage(rng, path.read_bytes()))
            reader.after(folder)
            problem, message = None, None
            opened, began = [], time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # progress and notices
                    reader.read(folder)
                counts['read'] += 1
            except UserError as error:
                counts['refused'] += 1
                message = str(error)
            except Hang:
                problem = f'it took over {SECONDS} s'
            except BaseException as error:
                opened, paths = None, opened
                problem = ''.join(traceback.format_exception(error))[-3000:]
                opened = paths
            signal.setitimer(signal.ITIMER_REAL, 0)
            if message is not None and (len(message) > 300 or not message.isprintable()):
                problem = f'the message is not one short line: {message!r}'
            if found := outside(folder / reader.inside):
                problem = f'it opened {found}'
            opened, slowest = None, max(slowest, time.monotonic() - began)
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if grown > GROWTH:
                problem, before = f'it took {grown / 2**30:.1f} GiB', before + grown // 1024
            for file in {*reader.files, *reader.mended}:
                restore(template / file, folder / file)
            if problem:
                good = False
                print(f'--reader={name!r} --seed={i} --inputs=1: {problem}', flush=True)
        os.chdir('/')
    print(
        f'{name}: {inputs} inputs, {counts["read"]} read, {counts["refused"]} refused, '
        f'slowest {slowest:.2f} s, {max(0, grown) / 2**20:.0f} MiB more',
        flush=True,
    )
    return good


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--reader', choices=READERS, action='append')
    parser.add_argument('--inputs', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    sys.addaudithook(note_open)
    return 1 - min(
        run(name, arguments.seed, arguments.inputs) for name in arguments.reader or READERS
    )


if __name__ == '__main__':
    sys.exit(main())
