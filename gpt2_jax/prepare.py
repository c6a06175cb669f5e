"""From text of any size to a prepared folder.

The folder (see data/shards.py) appears whole or not at all. The last characters of each file go to
validation; they are split off before tokenizing. The tokenizer's separator, if it has one, stands
between two documents.
"""

import collections
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax import files
from gpt2_jax.data import documents, tokenizers
from gpt2_jax.data.dataset import SPLITS, n_train_characters
from gpt2_jax.data.shards import FORMAT, MANIFEST, MARK, TOKENIZER
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError


def prepare(
    inputs: list[str],
    out_dir: str,
    *,
    tokenizer_name: str,
    val_fraction: float,
    shard_tokens: int,
    text_field: str = 'text',
) -> dict:
    """Writes the documents in files (see documents.py), in order, as a prepared folder.

    Returns its manifest. Two passes over the files, one block at a time: the first pass counts and
    collects the alphabet, the second pass encodes. Raises UserError for a file that cannot be
    read, is empty or changes between the passes, and if `out_dir` holds anything: nothing is
    overwritten.
    """
    if shard_tokens < 1:
        raise UsageError(f'shard_tokens is {shard_tokens}: expected at least 1')
    n_train_characters(1, val_fraction)  # refuse a wrong fraction before the first pass, not after
    learns_alphabet = tokenizer_name == 'char'
    # A missing vocabulary, too, is an error before the first pass.
    tokenizer = None if learns_alphabet else tokenizers.make_tokenizer(tokenizer_name, '')
    with files.new_folder(Path(out_dir).resolve()) as folder:
        sources, alphabet = _count(inputs, text_field, learns_alphabet)
        tokenizer = tokenizer or tokenizers.make_tokenizer(tokenizer_name, alphabet)
        return _write(folder, sources, text_field, tokenizer, val_fraction, shard_tokens)


def _count(
    inputs: list[str], text_field: str, learns_alphabet: bool
) -> tuple[list[tuple[str, dict]], set[str]]:
    """The first pass: each path with its entry of the manifest, and the alphabet, if asked for."""
    sources, alphabet = [], set()
    for path in inputs:
        sha256, n_documents, n_characters = _input_sha256(path), 0, 0
        for document in documents.read(path, text_field):
            n_documents += 1
            for block in document:
                n_characters += len(block)
                if learns_alphabet:
                    alphabet.update(block)
        if not n_characters:
            raise UserError(f'the text {path} is empty: expected at least one character')
        about = {
            'documents': n_documents,
            'characters': n_characters,
            'bytes': os.path.getsize(path),
            'sha256': sha256,
        }
        sources.append((path, about))
    return sources, alphabet


def _write(
    folder: Path,
    sources: list[tuple[str, dict]],
    text_field: str,
    tokenizer: Tokenizer,
    val_fraction: float,
    shard_tokens: int,
) -> dict:
    """The second pass: writes every file of a prepared folder; returns its manifest."""
    # tiktoken and numpy encode outside the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        train, val = (
            _SplitWriter(folder, split, tokenizer, shard_tokens, pool) for split in SPLITS
        )
        for number, (path, about) in enumerate(sources):
            left = n_train_characters(about['characters'], val_fraction)
            is_record = documents.holds_records(path)
            for line, byte, blocks in documents.read_placed(path, text_field):
                train.begin_document()
                val.begin_document()
                place = Place(is_record, number, line, -1 if byte is None else byte, 0)
                for block in blocks:
                    train.add(block[:left], place)
                    place = place.after(block[:left])
                    val.add(block[left:], place)
                    place = place.after(block[left:])
                    left = max(0, left - len(block))
            if _input_sha256(path) != about['sha256']:
                raise UserError(
                    f'the text {path} changed while it was read: run again when nothing '
                    'writes to it'
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
    files.write_text(folder / TOKENIZER, tokenizers.to_json(tokenizer))
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


class Place(NamedTuple):
    """A place in an input, as shards.MARK has it. `is_record`: the document is a line or a row."""

    is_record: bool
    file: int
    line: int
    byte: int
    within: int

    def after(self, text: str) -> 'Place':
        """The place after a text that begins here."""
        n_bytes = len(text.encode())
        if self.is_record:
            return self._replace(within=self.within + n_bytes)
        return self._replace(line=self.line + text.count('\n'), byte=self.byte + n_bytes)


class _Encoded(NamedTuple):
    """The ids (N,) of texts, their UTF-8 bytes, and (index of its first id, place) of each."""

    ids: np.ndarray
    n_bytes: int
    marks: list[tuple[int, Place]]


def _encode(tokenizer: Tokenizer, texts: list[tuple[Place | None, str]]) -> _Encoded:
    """Encodes each text by itself. A text without a place is the separator."""
    separator = np.array([tokenizer.separator or 0], np.min_scalar_type(tokenizer.vocab_size - 1))
    ids = [tokenizer.encode(text) if place else separator for place, text in texts]
    starts = itertools.accumulate(map(len, ids), initial=0)
    marks = [(start, place) for start, (place, _) in zip(starts, texts, strict=False) if place]
    return _Encoded(np.concatenate(ids), sum(len(text.encode()) for _, text in texts), marks)


class _SplitWriter:
    """Encodes the documents of one split in the threads of `pool`, and writes them in shards."""

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
        self.shards, self.marks, self.n_tokens = [], [], 0
        self.split_is_empty = self.document_is_empty = True
        self.held = []  # blocks of the current document that are not in `texts` yet
        self.held_from = None  # the place of the first of them
        self.n_held = 0  # characters in `held` and in `texts`
        self.texts = []  # (place, text) to be encoded, each by itself: see `_encode`
        self.encoding = collections.deque()  # futures, in order

    def begin_document(self):
        """The blocks that follow belong to another document."""
        if text := ''.join(self.held):
            self.texts.append((self.held_from, text))
        self.held, self.document_is_empty = [], True

    def add(self, block: str, place: Place):
        """Adds the next part of the current document. An empty document gets no separator."""
        if not block:
            return
        is_first = self.document_is_empty and not self.split_is_empty
        if is_first and self.tokenizer.separator is not None:
            self.texts.append((None, ''))
        self.split_is_empty = self.document_is_empty = False
        if not self.held:
            self.held_from = place
        self.held.append(block)
        self.n_held += len(block)
        if self.n_held >= documents.BLOCK_BYTES:
            if cut := self.tokenizer.cut(block):
                self.held[-1] = block[:cut]
                self.texts.append((self.held_from, ''.join(self.held)))
                self.held, self.held_from = [block[cut:]], place.after(block[:cut])
            self._submit()

    def _submit(self):
        if self.texts:
            self.encoding.append(self.pool.submit(_encode, self.tokenizer, self.texts))
            self.texts, self.n_held = [], sum(map(len, self.held))
        while len(self.encoding) > 2 * (os.cpu_count() or 1):
            self._store(self.encoding.popleft().result())

    def _store(self, encoded: _Encoded):
        ids = encoded.ids
        self.marks += [(self.n_tokens + start, *place[1:]) for start, place in encoded.marks]
        self.n_tokens += len(ids)
        self.n_bytes += encoded.n_bytes
        while len(ids):
            taken = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            ids = ids[len(taken) :]
            if self.filled == len(self.buffer):
                self._flush()

    def _flush(self):
        """Writes the tokens in the buffer, if there are any, as the next shard."""
        if self.filled:
            path = self.folder / f'{self.split}_{len(self.shards):05d}.npy'
            np.save(path, self.buffer[: self.filled], allow_pickle=False)
            self.shards.append(
                {'file': path.name, 'tokens': self.filled, 'sha256': files.sha256(path)}
            )
            self.filled = 0

    def finish(self) -> dict:
        """Encodes and writes the rest; returns this split's entry of the manifest."""
        self.begin_document()
        self._submit()
        while self.encoding:
            self._store(self.encoding.popleft().result())
        self._flush()
        marks = self.folder / f'{self.split}_marks.npy'
        np.save(marks, np.array(self.marks, MARK), allow_pickle=False)
        return {
            'tokens': sum(shard['tokens'] for shard in self.shards),
            'bytes': self.n_bytes,
            'shards': self.shards,
            'marks': {'file': marks.name, 'sha256': files.sha256(marks)},
        }


def _input_sha256(path: str) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise UserError(f'cannot read the text {path}: {error.strerror}') from None
