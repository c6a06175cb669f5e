"""GPT-2 tokens that others have prepared: 16-bit .bin files, with llm.c's header or with none (as nanoGPT's).

llm.c writes 256 int32 before the tokens: a magic number, the version, the number of tokens, zeros. Its magic number,
read as two tokens, has one outside GPT-2's vocabulary, so no file can be taken for the other kind.
"""

import glob
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt2_jax.data import tokenizers
from gpt2_jax.data.dataset import SPLITS, Dataset, Tokens, sha256_of
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UserError

HEADER, MAGIC, VERSION = 256, 20240520, 1
BLOCK = 1 << 22  # tokens checked at once


def open_token_files(
    pattern: str, tokenizer: Tokenizer, wanted: tuple[str, ...] = SPLITS
) -> Dataset:
    """Memory-maps the files that match a glob, in the order of their names, after reading all of them once.

    A file with 'val' in its name is for validation, any other for training; there must be some of each split that is
    `wanted`, and those of another are left alone. Raises UserError naming a file that is damaged, or that holds other
    tokens than `tokenizer` has.
    """
    paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    splits = ['val' if 'val' in path.name else 'train' for path in paths]
    for split in wanted:
        if split not in splits:
            raise UserError(
                f'no {split} file among the {len(paths)} that match {pattern}: expected .bin files of '
                f"GPT-2 tokens, those for validation with 'val' in their names, the others for training"
            )
    paths, splits = zip(
        *[pair for pair in zip(paths, splits, strict=True) if pair[1] in wanted], strict=True
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside the interpreter lock
        arrays, digests = zip(
            *pool.map(lambda path: _open(path, tokenizer.vocab_size), paths), strict=True
        )
    train, val = (
        Tokens(tuple(array for array, of in zip(arrays, splits, strict=True) if of == split))
        for split in SPLITS
    )
    identity = [tokenizers.fingerprint(tokenizer), *zip(splits, digests, strict=True)]
    return Dataset(paths[0].resolve().parent.name, tokenizer, train, val, sha256_of(identity))


def _open(path: Path, vocab_size: int) -> tuple[np.ndarray, str]:
    """A file's tokens, memory-mapped, and the SHA-256 of all its bytes."""
    try:
        n_bytes = path.stat().st_size
        header = np.fromfile(path, '<i4', HEADER)
        offset = 4 * HEADER if MAGIC in header[:1] else 0
        if offset > n_bytes:
            raise UserError(
                f'{path} is damaged: it ends within the header of llm.c; fetch it again'
            )
        if offset and header[1] != VERSION:
            raise UserError(
                f'{path} has the header of llm.c in version {header[1]}: expected {VERSION}'
            )
        if offset and n_bytes - offset != 2 * int(header[2]):
            raise UserError(
                f'{path} is damaged: its header says {header[2]:,} tokens of 2 bytes, and '
                f'{n_bytes - offset:,} bytes follow it; fetch it again'
            )
        if n_bytes % 2 or n_bytes == offset:
            raise UserError(
                f'{path} holds {n_bytes - offset:,} bytes, which are no tokens of 2 bytes each'
            )
        digest = hashlib.sha256(header[: offset // 4])
        ids = np.asarray(
            np.memmap(path, '<u2', 'r', offset)
        )  # still the map, without the cost of the subclass
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        if block.max() >= vocab_size:
            at = int((block >= vocab_size).argmax())
            raise UserError(
                f'{path} holds token {block[at]} at position {start + at}, outside the vocabulary '
                f'[0, {vocab_size}): these are no GPT-2 tokens of 16 bits'
            )
        digest.update(block)
    return ids, digest.hexdigest()
