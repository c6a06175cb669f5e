"""GPT-2's vocabulary: the 50,000 merges of its byte-pair encoding, found locally or downloaded, and verified.

They are `vocab.bpe` or `merges.txt` (the same file, as OpenAI and as the hub name it) in one of the folders of `gpt2`
(see published.py), or in tiktoken's cache, `$TIKTOKEN_CACHE_DIR`. Nothing found is ever changed or deleted.
"""

import hashlib
import os
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.files import Source, download, folders

NAMES = ('vocab.bpe', 'merges.txt')
SOURCE = Source(
    url='https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
    sha256='1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    n_bytes=456_318,
)
# Of the merges alone, with neither the version line nor the carriage returns that some copies have.
MERGES_SHA256 = 'ac33235097fe06d4a8fff0feac994644809e6eb6ab70669e1e9fd40ae032428e'


def find_merges() -> str:
    """The merges of GPT-2, a line each; UserError where a copy is not the published one, or none can be had."""
    path = next((path for path in _places() if path.exists()), None)
    if path is None:
        path = folders('gpt2')[-1] / NAMES[0]
        try:
            download("GPT-2's vocabulary", SOURCE, path)
        except OSError as error:
            raise UserError(
                f"no local copy of GPT-2's vocabulary, and its download failed ({str(error).strip('<>')}): put "
                f'{" or ".join(NAMES)} into {folders("gpt2")[0]} or {path.parent}, or set GPT2_JAX_DATA_DIR to a '
                f"folder that holds gpt2/{NAMES[0]}, or TIKTOKEN_CACHE_DIR to a cache of tiktoken's that has it; it is "
                f'published at {SOURCE.url}'
            ) from None
    return read_merges(path)


def read_merges(path: Path) -> str:
    """The merges in a file of any of these names; UserError where they are not GPT-2's."""
    try:
        data = path.read_bytes().replace(b'\r\n', b'\n')
    except OSError as error:
        raise UserError(f'cannot read the vocabulary {path}: {error.strerror}') from None
    merges = data.partition(b'\n')[2] if data.startswith(b'#version') else data
    digest = hashlib.sha256(merges).hexdigest()
    if digest != MERGES_SHA256:
        raise UserError(
            f"{path} does not hold GPT-2's merges: their SHA-256 is {digest}, expected {MERGES_SHA256}; "
            f'move it away to get the published ones'
        )
    return merges.decode('utf-8')


def _places() -> list[Path]:
    """Every local place, in the order of search."""
    places = [folder / name for folder in folders('gpt2') for name in NAMES]
    if cache := os.environ.get('TIKTOKEN_CACHE_DIR'):
        places.append(
            Path(cache, hashlib.sha1(SOURCE.url.encode()).hexdigest())
        )  # tiktoken's name for the file
    return places
