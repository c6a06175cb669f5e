"""A prepared folder: token shards on disk, verified when they are opened, read when they are used.

The folder holds `tokenizer.json`, the token ids as `train_00000.npy`, ... and `val_00000.npy`, ...,
where they came from as `train_marks.npy` and `val_marks.npy`, and `manifest.json`: counts, the
fingerprint of the tokenizer, and the SHA-256 of every shard. prepare.py writes it. N is a number of
tokens.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax import files, foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.data.dataset import SPLITS, Dataset, from_files
from gpt2_jax.data.id_files import IdsInFile, KeptFile, verify_files
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.foreign import PLAIN_NAME, SHA256, Maybe, integer, one_of

FORMAT = 1  # of manifest.json; other formats are refused
MANIFEST, TOKENIZER = 'manifest.json', 'tokenizer.json'
DTYPES = ('uint8', 'uint16', 'uint32')  # of ids
SCHEMA = {
    'dtype': one_of(*DTYPES),
    'tokenizer': {'sha256': SHA256},
    'splits': {
        split: {
            'shards': [{'file': PLAIN_NAME, 'tokens': integer(1), 'sha256': SHA256}],
            'marks': Maybe({'file': PLAIN_NAME, 'sha256': SHA256}),  # older versions wrote none
        }
        for split in SPLITS
    },
}
AGAIN = 'prepare the folder again from its texts'
RESTORE = 'restore it from a copy, or prepare the folder again'
# As np.save writes it: magic, version 1.0, the length of the header, the header. Not evaluated.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)\{'descr': '[<|](u[124])', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),\), \} *\n"
)

INPUTS = 'inputs.jsonl'  # the files that were read, one a line
# Where tokens came from: token `token` of a split begins at `byte` of input `file`, in line `line`.
# In JSON Lines and Parquet, line and byte are of the record (byte -1: unknown), and `within` counts
# the bytes of its text before the token. One mark for each document, and for each block of about a
# megabyte in it.
MARK = np.dtype(
    [('token', '<i8'), ('file', '<i4'), ('line', '<i8'), ('byte', '<i8'), ('within', '<i8')]
)


class SourceLocation(NamedTuple):
    """A location in an input, as in MARK.

    `is_record` says whether the document is a line or a row of its file.
    """

    is_record: bool
    file: int
    line: int
    byte: int
    within: int

    def after(self, text: str) -> 'SourceLocation':
        """The location after a text that begins here."""
        n_bytes = len(text.encode())
        if self.is_record:
            return self._replace(within=self.within + n_bytes)
        return self._replace(line=self.line + text.count('\n'), byte=self.byte + n_bytes)


def is_prepared(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder for `open_shards`."""
    return os.path.exists(os.path.join(path, MANIFEST))


def open_shards(folder: str | os.PathLike) -> Dataset:
    """Opens a prepared folder whose files are what the manifest says, by size, form and SHA-256.

    The SHA-256 of large data is computed once, in the background (see id_files.verify_files).
    Raises UserError naming the file that is missing, damaged, of another format or tokenizer, or
    that holds an id outside the vocabulary. Nothing outside the folder is opened.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifest = foreign.read_json(path, {'format': integer(0)}, AGAIN)
    if manifest['format'] != FORMAT:
        raise foreign.error(path, f'has format {manifest["format"]}, expected {FORMAT}', AGAIN)
    foreign.check(manifest, SCHEMA, path, AGAIN)
    dtype, fingerprint = np.dtype(manifest['dtype']), manifest['tokenizer']['sha256']
    shards = [
        (split, shard['file'], shard['tokens'], shard['sha256'])
        for split in SPLITS
        for shard in manifest['splits'][split]['shards']
    ]
    tokenizer = _open_tokenizer(folder / TOKENIZER, fingerprint)
    opened = [
        (split, _open_shard(folder / file, dtype, n_tokens)) for split, file, n_tokens, _ in shards
    ]
    sums, ids = [sha256 for *_, sha256 in shards], [ids for _, ids in opened]
    verify_files(ids, tokenizer.vocab_size, sha256=sums, remedy=RESTORE)
    return from_files(folder.resolve().name, tokenizer, opened, [fingerprint, shards])


def _open_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    tokenizer = tokenizers.from_json(foreign.read_text(path), path)
    found = tokenizers.fingerprint(tokenizer)
    if found != fingerprint:
        problem = (
            f'is not the tokenizer of these shards: its SHA-256 is {found[:12]}.., '
            f'the manifest says {fingerprint[:12]}..'
        )
        raise foreign.error(path, problem, RESTORE)
    return tokenizer


def _open_shard(path: Path, dtype: np.dtype, n_tokens: int) -> IdsInFile:
    """A shard's ids (n_tokens,) of `dtype`, not verified yet."""
    if not os.path.exists(path):
        raise foreign.error(path, 'is missing, and the manifest names it', RESTORE)
    file = KeptFile(path)
    with foreign.parsing(path, 'token ids'):
        header = NPY.match(os.pread(file.descriptor, 256, 0))
    if not header:
        raise foreign.error(path, 'is damaged: it is not a .npy file of token ids', RESTORE)
    found = np.dtype(f'<{header[1].decode()}'), int(header[2])
    if found != (dtype, n_tokens):
        problem = f'holds {found[1]} tokens of {found[0]}, the manifest says {n_tokens} of {dtype}'
        raise foreign.error(path, problem, RESTORE)
    expected = header.end() + n_tokens * dtype.itemsize
    if file.n_bytes != expected:
        problem = f'is damaged: it has {file.n_bytes:,} bytes, expected {expected:,}'
        raise foreign.error(path, problem, RESTORE)
    return IdsInFile(str(path), file.version, found[0], header.end(), n_tokens)


def open_marks(folder: str | os.PathLike) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Where the training tokens came from: the names of the inputs, and MARKs.

    None if an older version, without marks, prepared the folder. Raises UserError if the marks are
    damaged.
    """
    folder = Path(folder)
    manifest = foreign.read_json(folder / MANIFEST, SCHEMA, AGAIN)
    about = manifest['splits']['train'].get('marks')
    if about is None:
        return None
    path = folder / about['file']
    with foreign.open_file(path) as file, foreign.parsing(path, 'marks', RESTORE):
        if files.sha256(path) != about['sha256']:
            raise foreign.error(path, "is damaged: its SHA-256 is not the manifest's", RESTORE)
        marks = np.load(file, allow_pickle=False)
    if marks.dtype != MARK or marks.ndim != 1 or not len(marks):
        raise foreign.error(path, 'is damaged: it holds no marks', RESTORE)
    lines = foreign.read_text(folder / INPUTS).splitlines()
    schema = {'path': str}
    names = [foreign.parse_json(line, folder / INPUTS, schema, RESTORE)['path'] for line in lines]
    return tuple(names), marks
