"""GPT-2 tokens that others prepared: 16-bit .bin files, with the header of llm.c or without one.

llm.c writes 256 int32 before the tokens: a magic number, the version, the number of tokens, zeros.
nanoGPT writes no header. The magic number, read as two tokens, has one outside GPT-2's vocabulary,
so neither kind can be mistaken for the other.
"""

import os
import re
from pathlib import Path

import numpy as np

from gpt2_jax import files, foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.data.dataset import SPLITS, Dataset, from_files
from gpt2_jax.data.id_files import IdsInFile, KeptFile, verify_files
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UserError

HEADER, MAGIC, VERSION = 256, 20240520, 1
# Dates, as magic numbers of other tokenizers are: 20240801 for Llama 3.
OTHER_MAGICS = range(20240101, 20250601)
VALIDATION = re.compile(r'(?<![a-z])(val|valid|validation|eval)(?![a-z])', re.IGNORECASE)
EXPECTED = 'expected GPT-2 tokens of 16 bits'


def open_token_files(
    pattern: str, tokenizer: Tokenizer, wanted: tuple[str, ...] = SPLITS
) -> Dataset:
    """Opens the files that match a pattern, in the order of their names.

    They are verified as in id_files.py. A file with 'val' (or 'valid', 'validation', 'eval') as a
    word of its name is for validation, any other for training. Only the files of the `wanted`
    splits are opened, and each of these splits must have some. Raises UserError naming a file that
    is damaged, or that holds tokens outside the vocabulary of `tokenizer`.
    """
    paths = files.matching(pattern)
    splits = ['val' if VALIDATION.search(path.name) else 'train' for path in paths]
    for split in wanted:
        if split not in splits:
            raise UserError(
                f'no {split} file among the {len(paths)} that match {foreign.escape(pattern)}: '
                "expected .bin files of GPT-2 tokens, with the word 'val' in the names of those "
                'for validation only, as in web_val_0.bin'
            )
    used = [pair for pair in zip(splits, paths, strict=True) if pair[0] in wanted]
    opened = [(split, _open(path)) for split, path in used]
    digests = verify_files([ids for _, ids in opened], tokenizer.vocab_size, remedy=EXPECTED)
    identity = [tokenizers.fingerprint(tokenizer)]
    identity += [(split, digest) for (split, _), digest in zip(used, digests, strict=True)]
    return from_files(used[0][1].resolve().parent.name, tokenizer, opened, identity)


def _open(path: Path) -> IdsInFile:
    """A file's tokens (N,), not verified yet."""
    file = KeptFile(path)
    n_bytes = file.n_bytes
    with foreign.parsing(path, 'token ids'):
        start = os.pread(file.descriptor, 4 * HEADER, 0)
    header = np.frombuffer(start[: len(start) // 4 * 4], '<i4')
    offset = 4 * HEADER if MAGIC in header[:1] else 0
    if offset > n_bytes:
        raise foreign.error(
            path, 'is damaged: it ends within the header of llm.c', 'fetch it again'
        )
    if offset and header[1] != VERSION:
        problem = f'has the header of llm.c in version {header[1]}, expected {VERSION}'
        raise foreign.error(path, problem, EXPECTED)
    if len(header) > 1 and header[0] in OTHER_MAGICS and not offset:
        problem = f'has another header of llm.c, magic {header[0]}, version {header[1]}'
        raise foreign.error(path, problem, f'{EXPECTED}, magic {MAGIC}, version {VERSION}')
    if offset and n_bytes - offset != 2 * int(header[2]):
        problem = (
            f'is damaged: its header says {header[2]:,} tokens of 2 bytes, and '
            f'{n_bytes - offset:,} bytes follow it'
        )
        raise foreign.error(path, problem, 'fetch it again')
    if n_bytes % 2 or n_bytes == offset:
        raise foreign.error(path, f'holds {n_bytes - offset:,} bytes of tokens', EXPECTED)
    if not offset and (path.parent / 'meta.pkl').exists():
        raise foreign.error(
            path,
            'is beside meta.pkl, so nanoGPT wrote it with another vocabulary than GPT-2',
            'prepare the text itself by scripts/prepare.py, or move meta.pkl away',
        )
    return IdsInFile(str(path), file.version, np.dtype('<u2'), offset, (n_bytes - offset) // 2)
