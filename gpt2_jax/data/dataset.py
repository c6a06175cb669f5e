"""A data set: a sequence of token ids to train on, and another to validate on."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
import weakref
from fractions import Fraction
from typing import BinaryIO

import numpy as np

from gpt2_jax import foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError

SPLITS = ('train', 'val')
BLOCK_TOKENS = 1 << 22  # read at once to verify a file


class KeptFile:
    """A file for reading that stays open until nothing refers to it."""

    def __init__(self, file: BinaryIO):
        self.name, self.descriptor = file.name, os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)


@dataclasses.dataclass(frozen=True, eq=False)
class IdsInFile:
    """`n` ids in a file, `offset` bytes from its beginning, read when they are used.

    They are read, not memory-mapped. If the file is cut short during a run, a read fails with one
    line, while a map would end the process with a bus error.
    """

    file: KeptFile
    dtype: np.dtype
    offset: int
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> 'IdsInFile':
        start, stop, _ = part.indices(self.n)
        offset = self.offset + start * self.dtype.itemsize
        return dataclasses.replace(self, offset=offset, n=stop - start)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        ids = np.empty(self.n, self.dtype)
        view, offset = memoryview(ids).cast('B'), self.offset
        while view:
            with foreign.parsing(self.file.name, 'tokens'):
                n_bytes = os.preadv(self.file.descriptor, [view], offset)
            if not n_bytes:
                remedy = 'restore it from a copy; the same command resumes'
                raise foreign.error(self.file.name, 'was cut short while it was in use', remedy)
            view, offset = view[n_bytes:], offset + n_bytes
        return ids


def verify_ids(
    ids: IdsInFile, vocab_size: int, *, sha256: str | None = None, remedy: str = ''
) -> str:
    """Reads all of the file of `ids`; returns the SHA-256 of its bytes, in hex.

    Raises UserError if that is not `sha256`, when one is given, and for an id outside the
    vocabulary.
    """
    path, outside = ids.file.name, None
    digest = hashlib.sha256(os.pread(ids.file.descriptor, ids.offset, 0))
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = np.asarray(ids[start : start + BLOCK_TOKENS])
        digest.update(block)
        if outside is None and block.max() >= vocab_size:
            at = int((block >= vocab_size).argmax())
            problem = (
                f'holds token {block[at]} at position {start + at}, outside the vocabulary '
                f'[0, {vocab_size})'
            )
            outside = foreign.error(path, problem, remedy)
            if sha256 is None:
                break
    found = digest.hexdigest()
    if sha256 is not None and found != sha256:
        problem = f'is damaged: its SHA-256 is {found[:12]}.., the manifest says {sha256[:12]}..'
        raise foreign.error(path, problem, remedy)
    if outside:
        raise outside
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence of N token ids, kept in one or more arrays, in memory or in files."""

    arrays: tuple[np.ndarray | IdsInFile, ...]
    # ends[i] is the number of tokens in arrays[:i + 1].
    ends: tuple[int, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        ends = tuple(itertools.accumulate(len(array) for array in self.arrays))
        object.__setattr__(self, 'ends', ends)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def part(self, start: int, stop: int) -> 'Tokens':
        """Ids start .. stop - 1, at least one, without a copy."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f'no tokens [{start}, {stop}) in a sequence of {len(self)}')
        i = bisect.bisect_right(self.ends, start)
        pieces = []
        while start < stop:
            begin = self.ends[i] - len(self.arrays[i])
            pieces.append(self.arrays[i][start - begin : stop - begin])
            start, i = self.ends[i], i + 1
        return Tokens(tuple(pieces))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start .. stop - 1, at least one, (stop - start,); a view if one array holds them.

        Raises UserError if a file was cut short since it was opened.
        """
        pieces = [np.asarray(piece) for piece in self.part(start, stop).arrays]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens to train and to validate on. `sha256` is of the tokens, their split and tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    sha256: str


def from_text(name: str, text: str, tokenizer: Tokenizer, val_fraction: float) -> Dataset:
    """A data set in memory: the tokens and the split that prepare.py would write for one file."""
    cut = n_train_characters(len(text), val_fraction)
    train, val = (Tokens((tokenizer.encode(part),)) for part in (text[:cut], text[cut:]))
    identity = [
        hashlib.sha256(text.encode()).hexdigest(),
        tokenizers.fingerprint(tokenizer),
        val_fraction,
    ]
    return Dataset(name, tokenizer, train, val, sha256_of(identity))


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """The data set with the last `fraction` of its training tokens as its validation tokens.

    The former validation tokens are left out. Raises UserError if one of the two parts is empty.
    """
    n = len(dataset.train)
    cut = round(n * (1 - fraction))
    if not 0 < cut < n:
        raise UserError(
            f'data.holdout = {fraction} leaves {cut} of {n} training tokens to train on and '
            f'{n - cut} to validate on: expected some of each'
        )
    return dataclasses.replace(
        dataset,
        train=dataset.train.part(0, cut),
        val=dataset.train.part(cut, n),
        sha256=sha256_of([dataset.sha256, 'holdout', fraction]),
    )


def sha256_of(identity: list) -> str:
    """SHA-256 of a list of plain values that identify a data set, in hex."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def n_train_characters(n_characters: int, val_fraction: float) -> int:
    """The number of characters before the split: all but the last ceil(n val_fraction).

    The fraction is read as the decimal that the user wrote: in binary, 100 x 0.07 is a little over
    7 and would take 8 characters. Raises UsageError for a fraction outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f'val_fraction is {val_fraction}: expected at least 0 and below 1')
    return n_characters - math.ceil(n_characters * Fraction(str(val_fraction)))
