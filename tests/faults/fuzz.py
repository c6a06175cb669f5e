"""Feeds damaged files to a reader of foreign files: the result is a value or a UserError.

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
import logging
import math
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

import jax
import jax.numpy as jnp
import mutate
import numpy as np
from safetensors.numpy import load_file, save_file

from gpt2_jax import config, convert, foreign, prepare
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.data import bin_files, corpora, dataset, documents, shards, tokenizers, vocabulary
from gpt2_jax.data.batches import pad_windows
from gpt2_jax.errors import UserError
from gpt2_jax.inference import lambada, texts
from gpt2_jax.model import huggingface
from gpt2_jax.training import meter, setup, start
from gpt2_jax.workdir import checkpoints, checksums
from gpt2_jax.workdir import folder as run_folder
from gpt2_jax.workdir.restore import load

ROOT = Path(__file__).parents[2]
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
    `files` may be patterns. `after(folder)` runs on the damaged files, to mend a checksum that
    would hide the damage; it changes the files `mended`. Nothing may be opened outside the folder
    `inside`. A slow reader gets the part `inputs` of the inputs.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    files: tuple[str, ...]
    damage: Mutate = mutate.mutate_bytes
    after: Callable[[Path], None] = lambda folder: None
    mended: tuple[str, ...] = ()
    inside: str = ''
    inputs: float = 1


def make_prepared(folder: Path) -> None:
    (folder / 'a.txt').write_text(TEXT)
    options = {'tokenizer_name': 'char', 'val_fraction': 0.1, 'shard_tokens': 100}
    prepare.prepare([str(folder / 'a.txt')], folder / 'out', **options)


def read_prepared(folder: Path) -> None:
    opened = shards.open_shards(folder / 'out')
    for tokens in (opened.train, opened.val):
        if len(tokens):
            ids = tokens.read(0, len(tokens))
            assert ids.max() < opened.tokenizer.vocab_size
            opened.tokenizer.decode(ids)


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
    opened = bin_files.open_token_files(f'{folder}/*.bin', SMALL)
    for tokens in (opened.train, opened.val):
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


def damage_list(rng: random.Random, data: bytes) -> bytes:
    """Damages a list, without / and ~: a list may name any folder, and reading it may take long."""
    return mutate.mutate_bytes(rng, data).translate(None, b'/~')


def read_list(folder: Path) -> None:
    os.chdir(folder)  # names in a list are relative
    names, _ = documents.find_files(['@list'])
    assert all(Path(name).is_file() for name in names)


def read_corpus(folder: Path) -> None:
    corpus = corpora.find_text(folder / 'a.txt')
    assert corpus.text
    corpus.text.encode()


def make_passages(folder: Path) -> None:
    passages = [TEXT[i : i + 30].strip() + ' the' for i in range(20)]
    lines = ''.join(json.dumps({'text': passage}) + '\n' for passage in passages)
    (folder / 'a.jsonl').write_text(lines)
    (folder / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode(), mtime=0))


def read_passages(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        passages = lambada.read_passages(str(folder / name), SMALL, 'text')
        for batch in pad_windows(passages, 4, 16):
            assert batch['targets'].max() < SMALL.vocab_size
        assert all(0 < passage.n_targets < len(passage.ids) for passage in passages)

    return read


def read_text(folder: Path) -> None:
    options = {'split': None, 'detokenizer': 'wikitext', 'text_field': 'text'}
    text = texts.open_text(str(folder / 'a.jsonl'), SMALL, **options)
    assert len(text.tokens) == 0 or text.tokens.read(0, len(text.tokens)).max() < SMALL.vocab_size


def make_converted_tokenizer(folder: Path) -> None:
    """GPT-2's tokenizer as transformers writes it."""
    merges = MERGES.split('\n')[:-1]
    content = {'model': {'merges': [*merges[:3], *(merge.split(' ') for merge in merges[3:])]}}
    (folder / 'tokenizer.json').write_text(json.dumps(content))


def read_converted_tokenizer(folder: Path) -> None:
    assert convert.read_tokenizer(folder, None).merges == MERGES


def prepare_all(folder: Path) -> None:
    shutil.rmtree(folder / 'out', ignore_errors=True)
    options = {'tokenizer_name': 'char', 'val_fraction': 0.2, 'shard_tokens': 1000}
    manifest = prepare.prepare([str(folder)], folder / 'out', **options)
    opened = shards.open_shards(folder / 'out')
    assert len(opened.train) + len(opened.val) == manifest['inputs']['characters']


def make_published(folder: Path) -> None:
    """The published fixture, whole and in shards, with a file of added tokens."""
    shutil.copytree(ROOT / 'tests/fixtures/tiny_gpt2', folder / 'whole')
    (folder / 'whole/golden.safetensors').unlink()
    (folder / 'whole/added_tokens.json').write_text(json.dumps({'<a>': 3, '<b>': 4}))
    (folder / 'whole/tokenizer.json').write_text(
        json.dumps({'added_tokens': [{'id': 5, 'content': '<c>', 'special': True}]})
    )
    tensors = load_file(folder / 'whole/model.safetensors')
    shutil.copytree(folder / 'whole', folder / 'shards')
    (folder / 'shards/model.safetensors').unlink()
    weight_map = {name: f'{i % 2}.safetensors' for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in weight_map if weight_map[name] == file}
        save_file(part, folder / 'shards' / file)
    index = {'metadata': {'total_size': 1}, 'weight_map': weight_map}
    (folder / 'shards/model.safetensors.index.json').write_text(json.dumps(index))


def read_published(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        published, tensors = huggingface.read_folder(folder / name)
        huggingface.read_added_tokens(folder / name)
        settings = huggingface.import_config(published)
        cfg = GPT2Config(**config.default_config().model.to_dict() | settings)
        params = huggingface.import_params(tensors, cfg)
        assert params['wte']['embedding'].shape == (cfg.vocab_size, cfg.n_embd)

    return read


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damages the header of tensors, with its length mended, or any bytes."""
    if rng.random() < 0.4:
        return mutate.mutate_bytes(rng, data)
    end = 8 + int.from_bytes(data[:8], 'little')
    header = mutate.mutate_json(rng, data[8:end])
    if rng.random() < 0.3:
        kinds = ['F4', 'F8_E4M3', 'BF16', 'F16', 'F64', 'I64', 'BOOL', 'C64', 'X']
        header = header.replace(b'"F32"', f'"{rng.choice(kinds)}"'.encode(), rng.choice([1, -1]))
    return len(header).to_bytes(8, 'little') + header + data[end:]


def read_config(folder: Path) -> None:
    settings = config.from_json(foreign.read_text(folder / 'config.json'))
    GPT2Config(**settings.model)
    assert config.from_json(config.to_json(settings)) == settings


def make_checkpoint(folder: Path) -> None:
    """A run's folder with a checkpoint of step 1, evaluated."""
    settings, tokenizer = config.default_config(), tokenizers.make_tokenizer('char', TEXT)
    settings.model.update(n_layer=1, n_head=1, n_embd=8, n_positions=8)
    settings.data.corpus = 'text.txt'
    text = dataset.from_text('text', TEXT, tokenizer, 0.1)
    built = setup.build(config.resolve(settings), text)
    progress = meter.RunProgress(best_step=1, best_val_loss=2.0, final_val_loss=2.0)
    meta = start.checkpoint_meta(built, folder, progress)
    with checkpoints.Checkpoints(folder / 'checkpoints') as saved:
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), built.shapes)
        saved.save(1, state.replace(step=state.step + 1), meta, 2.0)


def reseal_checkpoint(folder: Path) -> None:
    """The sums of the damaged checkpoint; those of a file that is none would not be read."""
    path = folder / 'checkpoints/1'
    files = [path / name for name in listed(path)]
    if all(file.is_file() and not file.is_symlink() for file in files):
        checksums.write_checksums(path)


def listed(path: Path) -> list[str]:
    return [line[66:] for line in (path / 'SHA256SUMS').read_text().splitlines()[1:]]


def read_meta(folder: Path) -> None:
    """What resuming and sampling read beside the arrays."""
    meta = checkpoints.read_meta(folder / 'checkpoints/1')
    settings = config.from_json(meta['config'])
    tokenizer = tokenizers.from_json(meta['tokenizer'])
    GPT2Config(**settings.model, vocab_size=tokenizer.vocab_size)
    progress = meter.read_progress(meta, folder)
    assert progress.best_val_loss is None or progress.best_val_loss < 1e400
    assert set(progress.unfinished) <= {'evaluation', 'sample'}


def damage_meta(rng: random.Random, data: bytes) -> bytes:
    """Damages the metadata, or the JSON of the configuration or the tokenizer inside."""
    meta = json.loads(data)
    key = rng.choice(['config', 'tokenizer', 'progress', ''])
    if not key:
        return mutate.mutate_json(rng, data)
    if key == 'progress':
        damaged = mutate.mutate_json(rng, json.dumps(meta[key]).encode())
        place = json.dumps(meta[key]).encode()
        return json.dumps(meta).encode().replace(place, damaged)
    text = mutate.mutate_json(rng, meta[key].encode())
    return json.dumps(meta | {key: text.decode('utf-8', 'surrogateescape')}).encode()


def damage_any(rng: random.Random, data: bytes) -> bytes:
    """Damages a file of any kind: as JSON if it is JSON."""
    if not data.startswith(b'{') or not data.endswith(b'}'):
        return mutate.mutate_bytes(rng, data)
    return damage_meta(rng, data) if b'"tokenizer"' in data else mutate.mutate_json(rng, data)


def read_checkpoint(folder: Path) -> None:
    restored = load(folder, 'best')
    assert restored.params['wte']['embedding'].shape[0] == restored.tokenizer.vocab_size


def read_val_loss(folder: Path) -> None:
    best, loss = checksums.best_step(folder / 'checkpoints')
    assert best == 1
    assert math.isfinite(loss)


def read_sums(folder: Path) -> None:
    problem = checksums.verify(folder / 'checkpoints/1')
    if problem:
        raise foreign.error('checkpoint', problem)


def make_logs(folder: Path) -> None:
    lines = ''.join(
        json.dumps({'step': i, 'split': 'train', 'loss': i / 7}) + '\n' for i in range(9)
    )
    (folder / 'metrics.jsonl').write_text(lines)
    (folder / 'samples.txt').write_text(TEXT)


def read_logs(folder: Path) -> None:
    """Cuts back logs that may have been cut short: what is left is whole lines."""
    reports = run_folder.cut_back(folder, {'metrics.jsonl': 300, 'samples.txt': 99})
    assert all(map(str.isprintable, reports))
    data = (folder / 'metrics.jsonl').read_bytes() if (folder / 'metrics.jsonl').is_file() else b''
    assert len(data) <= 300
    assert len(data) == 300 or data[-1:] in (b'', b'\n')


PREPARED = {'make': make_prepared, 'read': read_prepared, 'inside': 'out'}
JSON = mutate.mutate_json


def published(name: str, file: str, damage: Mutate) -> Reader:
    return Reader(make_published, read_published(name), (f'{name}/{file}',), damage, inside=name)


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
    'list': Reader(make_documents, read_list, ('list',), damage_list),
    'corpus': Reader(make_documents, read_corpus, ('a.txt',)),
    'passages': Reader(make_passages, read_passages('a.jsonl'), ('a.jsonl',), damage_lines),
    'compressed passages': Reader(
        make_passages, read_passages('a.jsonl.gz'), ('a.jsonl.gz',), damage_inside
    ),
    'text to score': Reader(make_documents, read_text, ('a.jsonl',), damage_lines),
    'tokenizer of transformers': Reader(
        make_converted_tokenizer, read_converted_tokenizer, ('tokenizer.json',), JSON
    ),
    'published config': published('whole', 'config.json', JSON),
    'added tokens': published('whole', 'added_tokens.json', JSON),
    'added tokens of tokenizer.json': published('whole', 'tokenizer.json', JSON),
    'index': published('shards', 'model.safetensors.index.json', JSON),
    'safetensors': published('whole', 'model.safetensors', damage_safetensors),
    'shard of safetensors': published('shards', '1.safetensors', damage_safetensors),
    'configuration': Reader(
        lambda folder: (folder / 'config.json').write_text(
            config.to_json(config.resolve(config.default_config()))
        ),
        read_config,
        ('config.json',),
        JSON,
    ),
    'checkpoint metadata': Reader(
        make_checkpoint, read_meta, ('checkpoints/1/meta/metadata',), damage_meta
    ),
    'checkpoint metrics': Reader(
        make_checkpoint, read_val_loss, ('checkpoints/1/metrics/metrics',), JSON
    ),
    'checkpoint sums': Reader(make_checkpoint, read_sums, ('checkpoints/1/SHA256SUMS',)),
    'checkpoint': Reader(
        make_checkpoint,
        read_checkpoint,
        ('checkpoints/1/**/*',),
        damage_any,
        after=reseal_checkpoint,
        mended=('checkpoints/1/SHA256SUMS',),
        inputs=0.1,
    ),
    'logs': Reader(
        make_logs, read_logs, ('metrics.jsonl',), mended=('samples.txt',), damage=damage_lines
    ),
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
    inputs = math.ceil(inputs * reader.inputs)
    vocabulary.MERGES_SHA256 = hashlib.sha256(MERGES.encode()).hexdigest()
    signal.signal(signal.SIGALRM, alarm)
    logging.getLogger('absl').setLevel('ERROR')
    with tempfile.TemporaryDirectory() as parent:
        template, folder = Path(parent, 'template'), Path(parent, 'folder')
        template.mkdir()
        reader.make(template)
        shutil.copytree(template, folder)
        reader.read(folder)  # good files are read
        found = [path for pattern in reader.files for path in template.glob(pattern)]
        names = [
            str(path.relative_to(template))
            for path in sorted(found, key=lambda path: (path.parent, path.stat().st_size))
            if path.is_file() and str(path.relative_to(template)) not in reader.mended
        ]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(seed, seed + inputs):
            rng = random.Random(f'{name} {i}')
            path = folder / rng.choice(names)
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
            for file in {*names, *reader.mended}:
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
