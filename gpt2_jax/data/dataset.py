"""TODO."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
from fractions import Fraction

import numpy as np

from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError

SPLITS = ('train', 'val')


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence of N token ids, kept in one or more arrays."""

    arrays: tuple[np.ndarray, ...]
    ends: tuple[int, ...] = dataclasses.field(
        init=False, repr=False
    )  # ends[i]: tokens in arrays[:i + 1]

    def __post_init__(self):
        object.__setattr__(
            self, 'ends', tuple(itertools.accumulate(len(array) for array in self.arrays))
        )

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
        """Ids start .. stop - 1, at least one, as (stop - start,); a view where they lie in one array."""
        pieces = self.part(start, stop).arrays
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens to train and to validate on. Equal `sha256` means the same tokens, split and tokenizer."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    sha256: str


def from_text(name: str, text: str, tokenizer: Tokenizer, val_fraction: float) -> Dataset:
    """A dataset in memory, with the tokens and the split that `prepare` would write."""
    cut = n_train_characters(len(text), val_fraction)
    train, val = (Tokens((tokenizer.encode(part),)) for part in (text[:cut], text[cut:]))
    identity = [
        hashlib.sha256(text.encode()).hexdigest(),
        tokenizers.fingerprint(tokenizer),
        val_fraction,
    ]
    return Dataset(name, tokenizer, train, val, sha256_of(identity))


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """The dataset with the last `fraction` of its training tokens to validate on, and its validation tokens unused."""
    n = len(dataset.train)
    cut = round(n * (1 - fraction))
    if not 0 < cut < n:
        raise UserError(
            f'data.holdout = {fraction} leaves {cut} of {n} training tokens to train on and {n - cut} to '
            'validate on: expected some of each'
        )
    return dataclasses.replace(
        dataset,
        train=dataset.train.part(0, cut),
        val=dataset.train.part(cut, n),
        sha256=sha256_of([dataset.sha256, 'holdout', fraction]),
    )


def sha256_of(identity: list) -> str:
    """SHA-256 of a list of plain values: what makes up a dataset."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def n_train_characters(n_characters: int, val_fraction: float) -> int:
    """How many characters come before the cut: all but the last ceil(n val_fraction).

    The fraction is taken as the decimal a person wrote: in binary, 100 x 0.07 is a little over 7, and would take 8.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f'val_fraction is {val_fraction}: expected at least 0 and below 1')
    return n_characters - math.ceil(n_characters * Fraction(str(val_fraction)))
