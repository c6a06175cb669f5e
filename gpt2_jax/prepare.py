"""From text of any size to a prepared folder.

The folder (see data/shards.py) appears whole or not at all. The tokenizer's separator, if it has
one, stands between two documents. What goes to validation is the last part of the corpus, the last
part of each file, or whole documents, evenly spread; text is split before it is tokenized.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax import files, foreign, signals
from gpt2_jax.data import documents, tokenizers
from gpt2_jax.data.dataset import SPLITS, n_train_characters
from gpt2_jax.data.shards import FORMAT, INPUTS, MANIFEST, MARK, TOKENIZER, SourceLocation
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.progress import Progress
from gpt2_jax.terminal import counted

SPLIT_BY = ('corpus', 'document', 'file')
MAX_BAD = 10  # files that cannot be read, until the first pass ends
MAX_HELD = 1 << 24  # characters without a place to cut


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of the corpus, as the first pass found it."""

    path: str
    documents: int
    characters: int
    bytes: int
    sha256: str


class _Stopped(KeyboardInterrupt):
    """A signal that ends the work arrived; the argument is the signal."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ends the block at one of signals.SIGNALS with a UserError that says so."""

    def stop(number, frame):
        signals.handle(signal.SIG_IGN)  # let what was begun be removed
        raise _Stopped(signal.Signals(number))

    before = signals.handle(stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if isinstance(stopped, _Stopped) else signal.SIGINT
        error = UserError(f'stopped by {number.name}: nothing was written')
        error.exit_code = 128 + number
        raise error from None
    finally:
        signals.restore(before)


@_stopped_by_signals()
def prepare(
    inputs: list[str],
    out_dir: str,
    *,
    tokenizer_name: str,
    val_fraction: float,
    shard_tokens: int,
    text_field: str = 'text',
    split_by: str = 'corpus',
    special_tokens: bool = False,
) -> dict[str, Any]:
    """Writes the documents in files (see documents.find_files), in order, as a prepared folder.

    Returns its manifest. Two passes over the files, one block at a time: the first pass counts and
    collects the alphabet, the second pass encodes. With `special_tokens`, <|endoftext|> in a text
    is the token of that name, else ordinary text. Raises UserError for a file that cannot be read
    or changes between the passes, for texts that are all empty, for a split without tokens (but
    `val_fraction` may be 0), if `out_dir` holds anything, and for one of signals.SIGNALS; then
    nothing is written.
    """
    if shard_tokens < 1:
        raise UsageError(f'shard_tokens is {shard_tokens}: expected at least 1')
    n_train_characters(1, val_fraction)  # refuse a wrong fraction before the first pass, not after
    learns_alphabet = tokenizer_name == 'char'
    # A missing vocabulary, too, is an error before the first pass.
    tokenizer = None if learns_alphabet else tokenizers.make_tokenizer(tokenizer_name, '')
    if special_tokens and getattr(tokenizer, 'separator', None) is None:
        raise UsageError(
            f'the {tokenizer_name} tokenizer has no special tokens: leave the option out'
        )
    with Progress('looking for files'):
        paths, left_out = documents.find_files(inputs)
    _warn_of_repeated(paths)
    folder = files.user_path(out_dir).resolve()
    with files.new_folder(folder) as partial:
        sources, alphabet = _count(paths, text_field, learns_alphabet)
        totals = {'files': len(sources)} | {
            name: sum(getattr(source, name) for source in sources)
            for name in ('documents', 'characters', 'bytes')
        }
        if split_by == 'document' and 0 < val_fraction * totals['documents'] < 1:
            raise UserError(
                f'val_fraction = {val_fraction} of {counted(totals["documents"], "documents")} is '
                'less than one document: use a larger fraction, or split by corpus'
            )
        tokenizer = tokenizer or tokenizers.make_tokenizer(tokenizer_name, alphabet)
        encode = tokenizer.encode
        if special_tokens:
            encode = functools.partial(tokenizers.encode_special, tokenizer)
        # tiktoken and numpy encode outside the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            writers = [
                _SplitWriter(partial, split, tokenizer, encode, shard_tokens, pool)
                for split in SPLITS
            ]
            _encode(sources, writers, text_field, split_by, val_fraction)
            with Progress('encoding and writing the rest'):
                splits = {writer.split: writer.finish() for writer in writers}
        n_train, n_val = (splits[split]['tokens'] for split in SPLITS)
        if not n_train or (val_fraction and not n_val):
            raise UserError(
                f'val_fraction = {val_fraction} leaves {n_train:,} tokens to train on and '
                f'{n_val:,} to validate on: expected some of each; use another fraction, or more '
                'text'
            )
        left_out['empty files'] += len(paths) - len(sources)
        manifest = {
            'format': FORMAT,
            'tokenizer': {
                'name': tokenizer.name,
                'vocab_size': tokenizer.vocab_size,
                'sha256': tokenizers.fingerprint(tokenizer),
            },
            'dtype': writers[0].dtype.name,
            'val_fraction': val_fraction,
            'split_by': split_by,
            'special_tokens': special_tokens,
            'splits': splits,
            'inputs': totals | {'left_out': {reason: n for reason, n in left_out.items() if n}},
        }
        lines = (json.dumps(dataclasses.asdict(source)) + '\n' for source in sources)
        files.write_text(partial / INPUTS, ''.join(lines))
        files.write_text(partial / TOKENIZER, tokenizers.to_json(tokenizer))
        files.write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        signals.handle(signal.SIG_IGN)  # too late to say that nothing was written
    return manifest


def _warn_of_repeated(paths: list[str]) -> None:
    if repeated := [path for path, n in collections.Counter(paths).items() if n > 1]:
        more = f', and {len(repeated) - 1:,} more' if len(repeated) > 1 else ''
        about = f'given more than once, and read each time: {foreign.escape(repeated[0])}{more}'
        print(about, file=sys.stderr)


def _size(path: str) -> int:
    """The bytes of a file; 0 for one that was removed since it was found: reading it names it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _count(
    paths: list[str], text_field: str, learns_alphabet: bool
) -> tuple[list[InputFile], set[str]]:
    """The first pass: the files that are not empty, and the alphabet, if asked for."""
    sources, alphabet, bad = [], set(), {}
    with Progress('pass 1 of 2: read', sum(map(_size, paths))) as progress:
        for path in paths:
            digest, n_bytes, n_documents, n_characters = hashlib.sha256(), 0, 0, 0

            def observe(block, digest=digest):
                nonlocal n_bytes
                n_bytes += len(block)
                digest.update(block)
                progress.add(len(block))

            try:
                for document in documents.read(path, text_field, observe):
                    n_documents += 1
                    for block in document:
                        n_characters += len(block)
                        if learns_alphabet:
                            alphabet.update(block)
            except UserError as error:
                bad[path] = error
                if len(bad) == MAX_BAD:
                    break
            if n_characters:
                about = n_documents, n_characters, n_bytes, digest.hexdigest()
                sources.append(InputFile(path, *about))
    if bad:
        first, *others = bad
        if not others:
            raise bad[first]
        and_so_on = ', ..' if len(bad) == MAX_BAD else ''
        these = ', '.join(map(foreign.escape, others))
        raise UserError(f'{bad[first]}; these cannot be read either: {these}{and_so_on}')
    if not sources:
        what = f'{paths[0]} is' if len(paths) == 1 else f'all {len(paths)} files are'
        raise UserError(f'the text {what} empty: expected at least one character')
    return sources, alphabet


def _encode(
    sources: list[InputFile],
    writers: list['_SplitWriter'],
    text_field: str,
    split_by: str,
    val_fraction: float,
) -> None:
    """The second pass: hands every document, or its two parts, to the writers of the splits."""
    train, val = writers
    numbers, share = itertools.count(), Fraction(str(val_fraction))
    # The characters that go to training before the next go to validation.
    left = n_train_characters(sum(source.characters for source in sources), val_fraction)
    with Progress('pass 2 of 2: encoded', sum(source.bytes for source in sources)) as progress:
        for file, source in enumerate(sources):
            digest = hashlib.sha256()
            is_record = documents.file_kind(source.path) != documents.TEXT

            def observe(block, digest=digest):
                digest.update(block)
                progress.add(len(block))

            if split_by == 'file':
                left = n_train_characters(source.characters, val_fraction)
            found = documents.read_placed(source.path, text_field, observe)
            for line, byte, blocks in found:
                train.begin_document()
                val.begin_document()
                location = SourceLocation(is_record, file, line, -1 if byte is None else byte, 0)
                if split_by == 'document':
                    left = 0 if _is_val(next(numbers), share) else sys.maxsize
                for block in blocks:
                    train.add(block[:left], location)
                    location = location.after(block[:left])
                    val.add(block[left:], location)
                    location = location.after(block[left:])
                    left = max(0, left - len(block))
            if digest.hexdigest() != source.sha256:
                remedy = 'run again when nothing writes to it'
                raise foreign.error(source.path, 'changed while it was read', remedy)


def _is_val(number: int, share: Fraction) -> bool:
    """Whether document `number` is for validation: `share` of the documents, evenly spread."""
    return math.floor((number + 1) * share) > math.floor(number * share)


class _Encoded(NamedTuple):
    """The ids (N,) of texts, their UTF-8 bytes, and (index of its first id, location) of each."""

    ids: np.ndarray
    n_bytes: int
    marks: list[tuple[int, SourceLocation]]


class _SplitWriter:
    """Encodes the documents of one split in the threads of `pool`, and writes them in shards."""

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        encode: Callable[[str], np.ndarray],
        shard_tokens: int,
        pool: ThreadPoolExecutor,
    ):
        self.folder, self.split, self.tokenizer, self.pool = folder, split, tokenizer, pool
        self.encode = encode
        self.dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        self.separator = np.array([tokenizer.separator or 0], self.dtype)
        self.buffer = np.empty(shard_tokens, self.dtype)
        self.filled = self.n_bytes = 0
        self.shards, self.marks, self.n_tokens = [], [], 0
        self.split_is_empty = self.document_is_empty = True
        self.held = []  # blocks of the current document that are not in `texts` yet
        self.held_from = None  # the location of the first of them
        self.n_held = 0  # characters in `held` and in `texts`
        self.texts = []  # (location, text) to be encoded, each by itself; None is a separator
        self.encoding = collections.deque()  # futures, in order

    def begin_document(self):
        """The blocks that follow belong to another document."""
        if text := ''.join(self.held):
            self.texts.append((self.held_from, text))
        self.held, self.document_is_empty = [], True

    def add(self, block: str, location: SourceLocation):
        """Adds the next part of the current document. An empty document gets no separator."""
        if not block:
            return
        is_first = self.document_is_empty and not self.split_is_empty
        if is_first and self.tokenizer.separator is not None:
            self.texts.append(None)
        self.split_is_empty = self.document_is_empty = False
        if not self.held:
            self.held_from = location
        self.held.append(block)
        self.n_held += len(block)
        if self.n_held >= documents.BLOCK_BYTES:
            if cut := self.tokenizer.cut(block):
                self.held[-1] = block[:cut]
                self.texts.append((self.held_from, ''.join(self.held)))
                self.held, self.held_from = [block[cut:]], location.after(block[:cut])
            self._submit()

    def _submit(self):
        if self.texts:
            self.encoding.append(self.pool.submit(self._encode, self.texts))
            self.texts, self.n_held = [], sum(map(len, self.held))
        elif self.n_held > MAX_HELD:
            raise UserError(
                f'a document has no visible character before a space or newline in {MAX_HELD:,} '
                'characters, so it cannot be tokenized in parts: break its lines'
            )
        while len(self.encoding) > 2 * (os.cpu_count() or 1):
            self._store(self.encoding.popleft().result())

    def _encode(self, texts: list[tuple[SourceLocation, str] | None]) -> _Encoded:
        """Encodes each text by itself; None is the separator."""
        pieces = [self.separator if text is None else self.encode(text[1]) for text in texts]
        ids, n_bytes = np.concatenate(pieces), sum(len(text[1].encode()) for text in texts if text)
        if self.tokenizer.separator is not None:  # special tokens have no bytes
            n_special = int(np.count_nonzero(ids == self.separator)) - texts.count(None)
            n_bytes -= n_special * len(tokenizers.END_OF_TEXT)
        starts = itertools.accumulate(map(len, pieces), initial=0)
        marks = [(at, text[0]) for at, text in zip(starts, texts, strict=False) if text]
        return _Encoded(ids, n_bytes, marks)

    def _store(self, encoded: _Encoded):
        ids = encoded.ids
        marks = [(self.n_tokens + start, *location[1:]) for start, location in encoded.marks]
        self.marks.append(np.array(marks, MARK))
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
            ids = self.buffer[: self.filled]
            with files.new_file(path) as file:
                header = np.lib.format.header_data_from_array_1_0(ids)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(ids.data)
            self.shards.append(
                {'file': path.name, 'tokens': len(ids), 'sha256': files.sha256(path)}
            )
            self.filled = 0

    def finish(self) -> dict[str, Any]:
        """Encodes and writes the rest; returns this split's entry of the manifest."""
        self.begin_document()
        self._submit()
        while self.encoding:
            self._store(self.encoding.popleft().result())
        self._flush()
        path = self.folder / f'{self.split}_marks.npy'
        with files.new_file(path) as file:
            np.save(file, np.concatenate([np.zeros(0, MARK), *self.marks]), allow_pickle=False)
        return {
            'tokens': sum(shard['tokens'] for shard in self.shards),
            'bytes': self.n_bytes,
            'shards': self.shards,
            'marks': {'file': path.name, 'sha256': files.sha256(path)},
        }


def describe(manifest: dict[str, Any]) -> list[str]:
    """What a prepared folder holds, in lines for people."""
    lines = [f'{"split":<8}{"tokens":>16}{"bytes":>16}{"shards":>8}']
    for split, about in manifest['splits'].items():
        tokens, n_bytes = about['tokens'], about['bytes']
        lines.append(f'{split:<8}{tokens:>16,}{n_bytes:>16,}{len(about["shards"]):>8}')
    tokenizer, inputs = manifest['tokenizer'], manifest['inputs']
    kept = {
        'corpus': 'the last {:.4g} % of the characters of the corpus',
        'document': '{:.4g} % of the documents, evenly spread over the corpus',
        'file': 'the last {:.4g} % of the characters of each file',
    }[manifest['split_by']].format(100 * manifest['val_fraction'])
    special = 'a token' if manifest['special_tokens'] else 'ordinary text'
    read = (counted(inputs[name], name) for name in ('files', 'documents'))
    left_out = ', '.join(counted(n, reason) for reason, n in inputs['left_out'].items())
    return [
        *lines,
        f'validation: {kept}',
        f'tokenizer {tokenizer["name"]}, vocabulary {tokenizer["vocab_size"]:,}, '
        f'{manifest["dtype"]}; <|endoftext|> in a text is {special}',
        f'read {", ".join(read)}, {inputs["bytes"] / 1e6:.1f} MB; '
        f'left out: {left_out or "nothing"}',
    ]
