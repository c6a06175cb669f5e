"""GPT-2 tokens that others prepared: 16-bit .bin files, with the header of llm.c or without one.

llm.c writes 256 int32 before the tokens: a magic number, the version, the number of tokens, zeros.
nanoGPT writes no header. The magic number, read as two tokens, has one outside GPT-2's vocabulary,
so neither kind can be mistaken for the other.
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
BLOCK_TOKENS = 1 << 22  # checked at once


def open_token_files(
    pattern: str, tokenizer: Tokenizer, wanted: tuple[str, ...] = SPLITS
) -> Dataset:
    """Memory-maps the files that match a glob, in the order of their names.

    Each is read once, to check it. A file with 'val' in its name is for validation, any other for
    training. Only the files of the `wanted` splits are opened, and each of these splits must have
    some. Raises UserError naming a file that is damaged, or that holds tokens outside the
    vocabulary of `tokenizer`.
    """
    paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    splits = ['val' if 'val' in path.name else 'train' for path in paths]
    for split in wanted:
        if split not in splits:
            raise UserError(
                f'no {split} file among the {len(paths)} that match {pattern}: expected .bin files '
                "of GPT-2 tokens, with 'val' in the names of those for validation only"
            )
    used = [pair for pair in zip(paths, splits, strict=True) if pair[1] in wanted]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside the interpreter lock
        opened = list(pool.map(lambda pair: _open(pair[0], tokenizer.vocab_size), used))
    arrays = {split: [] for split in SPLITS}
    identity = [tokenizers.fingerprint(tokenizer)]
    for (_, split), (ids, digest) in zip(used, opened, strict=True):
        arrays[split].append(ids)
        identity.append((split, digest))
    return Dataset(
        used[0][0].resolve().parent.name,
        tokenizer,
        train=Tokens(tuple(arrays['train'])),
        val=Tokens(tuple(arrays['val'])),
        sha256=sha256_of(identity),
    )


def _open(path: Path, vocab_size: int) -> tuple[np.ndarray, str]:
    """A file's tokens (N,), memory-mapped, and the SHA-256 of all its bytes."""
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
                f'{path} holds {n_bytes - offset:,} bytes: expected one or more tokens of 2 bytes'
            )
        digest = hashlib.sha256(header[: offset // 4])
        # A plain array over the map: the memmap subclass costs time at every slice.
        ids = np.asarray(np.memmap(path, '<u2', 'r', offset))
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = ids[start : start + BLOCK_TOKENS]
        if block.max() >= vocab_size:
            at = int((block >= vocab_size).argmax())
            raise UserError(
                f'{path} holds token {block[at]} at position {start + at}, outside the vocabulary '
                f'[0, {vocab_size}): expected 16-bit GPT-2 tokens'
            )
        digest.update(block)
    return ids, digest.hexdigest()
