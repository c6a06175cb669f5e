"""A prepared folder: token shards on disk, verified and memory-mapped when they are opened.

The folder holds `tokenizer.json`, the token ids as `train_00000.npy`, ... and `val_00000.npy`,
..., where they came from as `train_marks.npy` and `val_marks.npy`, and `manifest.json`: counts, the
fingerprint of the tokenizer, and the SHA-256 of every shard. prepare.py writes it. N is a number of
tokens.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt2_jax import files
from gpt2_jax.data import tokenizers
from gpt2_jax.data.dataset import SPLITS, Dataset, Tokens, sha256_of
from gpt2_jax.data.documents import holds_records
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UserError

FORMAT = 1  # of manifest.json; other formats are refused
MANIFEST, TOKENIZER = 'manifest.json', 'tokenizer.json'

# Where tokens came from: token `token` of a split begins at `byte` of file `file` of the manifest's
# inputs, in line `line`. In JSON Lines and Parquet, line and byte are of the record (byte -1:
# unknown), and `within` counts the bytes of its text before the token. One mark for each document,
# and for each block of about a megabyte in it.
MARK = np.dtype(
    [('token', '<i8'), ('file', '<i4'), ('line', '<i8'), ('byte', '<i8'), ('within', '<i8')]
)


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder for `open_shards`."""
    return os.path.exists(os.path.join(path, MANIFEST))


def open_shards(folder: str | os.PathLike) -> Dataset:
    """Memory-maps a prepared folder after checking each of its files against the manifest.

    Raises UserError naming the file that is missing, damaged, of another format or of another
    tokenizer.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text('utf-8'))
        if manifest['format'] != FORMAT:
            raise UserError(
                f'{path} has format {manifest["format"]}, expected {FORMAT}: prepare it again'
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
    tokenizer = _open_tokenizer(folder / TOKENIZER, fingerprint)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing runs outside the interpreter lock
        opened = list(
            pool.map(lambda shard: _open_shard(folder / shard[1], dtype, *shard[2:]), shards)
        )
    arrays = {split: [] for split in SPLITS}
    for (split, *_), ids in zip(shards, opened, strict=True):
        arrays[split].append(ids)
    return Dataset(
        folder.resolve().name,
        tokenizer,
        train=Tokens(tuple(arrays['train'])),
        val=Tokens(tuple(arrays['val'])),
        sha256=sha256_of([fingerprint, shards]),
    )


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
        digest = files.sha256(path)
        if digest != sha256:
            raise UserError(
                f'{path} is damaged: its SHA-256 is {digest}, the manifest says {sha256}; restore '
                'it from a copy, or prepare the folder again'
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
            f'{path} holds {ids.shape} tokens of {ids.dtype}, the manifest says ({n_tokens},) of '
            f'{dtype}: prepare the folder again'
        )
    return np.asarray(ids)  # a plain array: the memmap subclass costs time at every slice


def open_marks(
    folder: str | os.PathLike, split: str = 'train'
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray] | None:
    """Where the tokens of a split came from: file names, 'text' or 'records' for each, and MARKs.

    None if the folder was prepared before marks existed. Raises UserError if they are damaged.
    """
    folder = Path(folder)
    manifest = json.loads((folder / MANIFEST).read_text('utf-8'))
    about = manifest['splits'][split].get('marks')
    if about is None:
        return None
    path = folder / about['file']
    try:
        if files.sha256(path) != about['sha256']:
            raise UserError(
                f'{path} is damaged: its SHA-256 is not the one in the manifest; restore it from a '
                'copy, or prepare the folder again'
            )
        marks = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    names = tuple(source['file'] for source in manifest['inputs'])
    kinds = tuple('records' if holds_records(name) else 'text' for name in names)
    return names, kinds, marks
