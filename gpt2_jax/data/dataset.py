"""A data set: a sequence of token ids to train on, and another to validate on."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from fractions import Fraction

import numpy as np

from gpt2_jax.data import tokenizers
from gpt2_jax.data.id_files import IdsInFile
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError

SPLITS = ('train', 'val')


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence of N token ids, kept in one or more arrays, in memory or in files."""

    arrays: tuple[np.ndarray | IdsInFile, ...]

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """ends[i] is the number of tokens in arrays[:i + 1]."""
        return tuple(itertools.accumulate(map(len, self.arrays)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def part(self, start: int, stop: int) -> 'Tokens':
        """Ids start .. stop - 1, at least one, without a copy."""
        return Tokens(tuple(self._pieces(start, stop)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start .. stop - 1, at least one, (stop - start,); a view if one array holds them.

        Raises UserError if a file was cut short or changed since it was verified.
        """
        pieces = [piece.__array__() for piece in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> list[np.ndarray | IdsInFile]:
        """The parts of the arrays that hold ids start .. stop - 1."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f'no tokens [{start}, {stop}) in a sequence of {len(self)}')
        i = bisect.bisect_right(self.ends, start)
        pieces = []
        while start < stop:
            begin = self.ends[i] - len(self.arrays[i])
            pieces.append(self.arrays[i][start - begin : stop - begin])
            start, i = self.ends[i], i + 1
        return pieces


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens to train and to validate on. `sha256` is of the tokens, their split and tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    sha256: str


def from_files(
    name: str, tokenizer: Tokenizer, opened: list[tuple[str, IdsInFile]], identity: list
) -> Dataset:
    """A data set in files, each with its split; `identity` is as in `sha256_of`."""
    train, val = (
        Tokens(tuple(ids for split, ids in opened if split == wanted)) for wanted in SPLITS
    )
    return Dataset(name, tokenizer, train, val, sha256_of(identity))


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
