"""Token shards on disk: written atomically from text of any size, verified and memory-mapped when opened.

A prepared folder holds `tokenizer.json`, the token ids as `train_00000.npy`, ... and `val_00000.npy`, ..., and
`manifest.json`: counts, the tokenizer's fingerprint, and the SHA-256 of every shard. Each file's last characters go to
validation, cut before tokenizing. Between documents stands the tokenizer's separator, if it has one. N is a number of
tokens.
"""

import collections
import hashlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt2_jax.data import documents, tokenizers
from gpt2_jax.data.dataset import SPLITS, Dataset, Tokens, n_train_characters, sha256_of
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError

FORMAT = 1  # of manifest.json; a reader refuses any other

# Where tokens came from: token `token` of a split begins at `byte` of file `file` of the manifest's
# inputs, in line `line`. In JSON Lines and Parquet, line and byte are of the record (byte -1: unknown),
# and `within` counts the bytes of its text before the token. One mark for each document, and for each
# block of about a megabyte in it.
MARK = np.dtype(
    [('token', '<i8'), ('file', '<i4'), ('line', '<i8'), ('byte', '<i8'), ('within', '<i8')]
)


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder to open with `open_shards`."""
    return os.path.exists(os.path.join(path, 'manifest.json'))


def prepare(
    inputs: list[str],
    out_dir: str,
    *,
    tokenizer_name: str,
    val_fraction: float,
    shard_tokens: int,
    text_field: str = 'text',
) -> dict:
    """Writes the documents in files (see documents.py), in order, as a prepared folder; returns its manifest.

    Two passes over the files, a block at a time: the first counts and collects the alphabet, the second encodes. The
    folder appears whole or not at all. Raises UserError for a file that cannot be read, is empty or changes between
    the passes, and for an `out_dir` that holds anything: nothing is overwritten.
    """
    out_dir = Path(out_dir).resolve()
    if shard_tokens < 1:
        raise UsageError(f'shard_tokens is {shard_tokens}: expected at least 1')
    n_train_characters(1, val_fraction)  # refuse a wrong fraction before the first pass, not after
    learns = tokenizer_name == 'char'
    tokenizer = (
        None if learns else tokenizers.make_tokenizer(tokenizer_name, '')
    )  # the same, where it is not there
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(
            f'{out_dir} exists and is not an empty folder: choose another out_dir, or move it away'
        )
    sources, characters = [], set()
    for path in inputs:
        sha256, n_documents, n_characters = _input_sha256(path), 0, 0
        for document in documents.read(path, text_field):
            n_documents += 1
            for block in document:
                n_characters += len(block)
                if learns:
                    characters.update(block)
        if not n_characters:
            raise UserError(f'the text {path} is empty: expected at least one character')
        sources.append(
            (
                path,
                {
                    'documents': n_documents,
                    'characters': n_characters,
                    'bytes': os.path.getsize(path),
                    'sha256': sha256,
                },
            )
        )
    tokenizer = tokenizer or tokenizers.make_tokenizer(tokenizer_name, characters)
    partial = out_dir.with_name(f'.{out_dir.name}.{secrets.token_hex(4)}.partial')
    try:
        partial.mkdir(parents=True)
        manifest = _write(partial, sources, text_field, tokenizer, val_fraction, shard_tokens)
        partial.rename(out_dir)
    except OSError as error:
        raise UserError(f'cannot write {out_dir}: {error.strerror}') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def open_shards(folder: str | os.PathLike) -> Dataset:
    """Memory-maps a prepared folder after checking every file of it against the manifest.

    Raises UserError naming the file that is missing, damaged, of another format or of another tokenizer.
    """
    folder = Path(folder)
    path = folder / 'manifest.json'
    try:
        manifest = json.loads(path.read_text('utf-8'))
        if manifest['format'] != FORMAT:
            raise UserError(
                f'{path} has format {manifest["format"]}, this version reads {FORMAT}: prepare it again'
            )
        dtype, fingerprint = np.dtype(manifest['dtype']), manifest['tokenizer']['sha256']
        shards = [
            (split, shard['file'], shard['tokens'], shard['sha256'])
            for split in SPLITS
            for shard in manifest['splits'][split]['shards']
        ]
    except OSError as error:
        raise UserError(
            f'cannot read {path}: {error.strerror}; a prepared folder is written by '
            f'scripts/prepare.py'
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged: prepare the folder again from its texts') from None
    tokenizer = _open_tokenizer(folder / 'tokenizer.json', fingerprint)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside the interpreter lock
        arrays = list(
            pool.map(lambda shard: _open_shard(folder / shard[1], dtype, *shard[2:]), shards)
        )
    train, val = (
        Tokens(
            tuple(array for array, shard in zip(arrays, shards, strict=True) if shard[0] == split)
        )
        for split in SPLITS
    )
    return Dataset(folder.resolve().name, tokenizer, train, val, sha256_of([fingerprint, shards]))


def _encode(tokenizer: Tokenizer, texts: list[str | None]) -> tuple[np.ndarray, int]:
    """Ids of texts one after the other, None being the separator; and their UTF-8 bytes."""
    separator = np.array([tokenizer.separator or 0], np.min_scalar_type(tokenizer.vocab_size - 1))
    ids = [separator if text is None else tokenizer.encode(text) for text in texts]
    return np.concatenate(ids), sum(len(text.encode()) for text in texts if text)


class _SplitWriter:
    """Encodes the documents of one split in the threads of `pool`, and writes them out in shards of `shard_tokens`."""

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        shard_tokens: int,
        pool: ThreadPoolExecutor,
    ):
        self.folder, self.split, self.tokenizer, self.pool = folder, split, tokenizer, pool
        self.buffer = np.empty(shard_tokens, np.min_scalar_type(tokenizer.vocab_size - 1))
        self.filled = self.n_bytes = 0
        self.shards = []
        self.empty = self.fresh = (
            True  # nothing is written yet; nor anything of the document that has begun
        )
        self.held, self.n_held = (
            [],
            0,
        )  # blocks of that document, and the characters of all that no thread has yet
        self.texts = []  # to be encoded each by itself, None being a separator
        self.encoding = collections.deque()  # in order

    def begin_document(self):
        """The blocks that follow belong to another document."""
        if text := ''.join(self.held):
            self.texts.append(text)
        self.held, self.fresh = [], True

    def add(self, block: str):
        """Takes the next part of the document; a part that is empty is none."""
        if not block:
            return
        if self.fresh and not self.empty and self.tokenizer.separator is not None:
            self.texts.append(None)
        self.empty = self.fresh = False
        self.held.append(block)
        self.n_held += len(block)
        if self.n_held >= documents.BLOCK_BYTES:
            if cut := self.tokenizer.cut(block):
                self.held[-1] = block[:cut]
                self.texts.append(''.join(self.held))
                self.held = [block[cut:]]
            self._submit()

    def _submit(self):
        if self.texts:
            self.encoding.append(self.pool.submit(_encode, self.tokenizer, self.texts))
            self.texts, self.n_held = [], sum(map(len, self.held))
        while len(self.encoding) > 2 * (os.cpu_count() or 1):
            self._store(*self.encoding.popleft().result())

    def _store(self, ids: np.ndarray, n_bytes: int):
        self.n_bytes += n_bytes
        while len(ids):
            taken = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            ids = ids[len(taken) :]
            if self.filled == len(self.buffer):
                self._flush()

    def _flush(self):
        """Writes what is gathered, if anything, as the next shard."""
        if self.filled:
            path = self.folder / f'{self.split}_{len(self.shards):05d}.npy'
            np.save(path, self.buffer[: self.filled], allow_pickle=False)
            self.shards.append(
                {'file': path.name, 'tokens': self.filled, 'sha256': _file_sha256(path)}
            )
            self.filled = 0

    def finish(self) -> dict:
        """Encodes and writes the rest; returns what the manifest says of this split."""
        self.begin_document()
        self._submit()
        while self.encoding:
            self._store(*self.encoding.popleft().result())
        self._flush()
        return {
            'tokens': sum(shard['tokens'] for shard in self.shards),
            'bytes': self.n_bytes,
            'shards': self.shards,
        }


def _write(
    folder: Path,
    sources: list[tuple[str, dict]],
    text_field: str,
    tokenizer: Tokenizer,
    val_fraction: float,
    shard_tokens: int,
) -> dict:
    """The second pass: every file of a prepared folder. The manifest."""
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # tiktoken and numpy encode outside the interpreter lock
        train, val = (
            _SplitWriter(folder, split, tokenizer, shard_tokens, pool) for split in SPLITS
        )
        for path, about in sources:
            left = n_train_characters(about['characters'], val_fraction)
            for document in documents.read(path, text_field):
                train.begin_document()
                val.begin_document()
                for block in document:
                    train.add(block[:left])
                    val.add(block[left:])
                    left = max(0, left - len(block))
            if _input_sha256(path) != about['sha256']:
                raise UserError(
                    f'the text {path} changed while it was read: run again when nothing writes to it'
                )
        splits = {'train': train.finish(), 'val': val.finish()}
    manifest = {
        'format': FORMAT,
        'tokenizer': {
            'name': tokenizer.name,
            'vocab_size': tokenizer.vocab_size,
            'sha256': tokenizers.fingerprint(tokenizer),
        },
        'dtype': train.buffer.dtype.name,
        'val_fraction': val_fraction,
        'splits': splits,
        'inputs': [{'file': Path(path).name, **about} for path, about in sources],
    }
    (folder / 'tokenizer.json').write_text(tokenizers.to_json(tokenizer), 'utf-8')
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1), 'utf-8')
    return manifest


def _open_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    try:
        tokenizer = tokenizers.from_json(path.read_text('utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from None
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    if tokenizers.fingerprint(tokenizer) != fingerprint:
        raise UserError(
            f'{path} is not the tokenizer these shards were written with: its SHA-256 is '
            f'{tokenizers.fingerprint(tokenizer)}, the manifest says {fingerprint}; restore it, or '
            f'prepare the folder again'
        )
    return tokenizer


def _open_shard(path: Path, dtype: np.dtype, n_tokens: int, sha256: str) -> np.ndarray:
    """A shard's ids, memory-mapped: (n_tokens,) of `dtype`."""
    try:
        digest = _file_sha256(path)
        if digest != sha256:
            raise UserError(
                f'{path} is damaged: its SHA-256 is {digest}, the manifest says {sha256}; restore it from '
                f'a copy, or prepare the folder again'
            )
        ids = np.load(path, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f'{path} is missing, and the manifest names it: restore it, or prepare the folder again'
        ) from None
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    if ids.shape != (n_tokens,) or ids.dtype != dtype:
        raise UserError(
            f'{path} holds {ids.shape} tokens of {ids.dtype}, the manifest says ({n_tokens},) of {dtype}: '
            f'prepare the folder again'
        )
    return np.asarray(ids)  # still the map, without the cost of the memmap subclass at every slice


def _input_sha256(path: str) -> str:
    try:
        return _file_sha256(path)
    except OSError as error:
        raise UserError(f'cannot read the text {path}: {error.strerror}') from None


def _file_sha256(path: str | Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
