"""GPT-2's vocabulary: the 50,000 merges of its byte-pair encoding, found locally or downloaded.

OpenAI calls the file `vocab.bpe`, the hub calls it `merges.txt`. It may be in one of the folders of
`gpt2` (see files.py), or in tiktoken's cache, `$TIKTOKEN_CACHE_DIR`. No file found is changed.
"""

import hashlib
import os
from pathlib import Path

from gpt2_jax import foreign
from gpt2_jax.errors import UserError
from gpt2_jax.files import Source, download, local_folders

NAMES = ('vocab.bpe', 'merges.txt')
SOURCE = Source(
    url='https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
    sha256='1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    n_bytes=456_318,
)
MAX_BYTES = 1 << 20  # of a file with merges
# The hash of the merges alone: some copies have another version line, or carriage returns.
MERGES_SHA256 = 'ac33235097fe06d4a8fff0feac994644809e6eb6ab70669e1e9fd40ae032428e'


def find_merges() -> str:
    """GPT-2's merges, one a line, downloaded if there is no local copy.

    Raises UserError if the copy is not the published file, or if there is none and the download
    fails.
    """
    path = next((path for path in _places() if path.exists()), None)
    if path is None:
        path = local_folders('gpt2')[-1] / NAMES[0]
        try:
            download("GPT-2's vocabulary", SOURCE, path)
        except OSError as error:
            raise UserError(
                f"no local copy of GPT-2's vocabulary, and its download failed "
                f'({str(error).strip("<>")}): put {" or ".join(NAMES)} into '
                f'{local_folders("gpt2")[0]} or {path.parent}, or set GPT2_JAX_DATA_DIR to a '
                f'folder that holds gpt2/{NAMES[0]}, or TIKTOKEN_CACHE_DIR to a cache of tiktoken '
                f'that has it; the file is published at {SOURCE.url}'
            ) from None
    return read_merges(path)


def read_merges(path: Path) -> str:
    """The merges in a file. Raises UserError if it does not hold GPT-2's merges."""
    data = foreign.read_bytes(path, MAX_BYTES).replace(b'\r\n', b'\n')
    merges = data.partition(b'\n')[2] if data.startswith(b'#version') else data
    digest = hashlib.sha256(merges).hexdigest()
    if digest != MERGES_SHA256:
        problem = (
            f"does not hold GPT-2's merges: SHA-256 {digest[:12]}.., not {MERGES_SHA256[:12]}.."
        )
        raise foreign.error(path, problem, 'move it away to get the published file')
    return merges.decode('utf-8')


def _places() -> list[Path]:
    """Every local place, in the order of search."""
    places = [folder / name for folder in local_folders('gpt2') for name in NAMES]
    if cache := os.environ.get('TIKTOKEN_CACHE_DIR'):
        # tiktoken names a cached file by the SHA-1 of its URL.
        places.append(Path(cache, hashlib.sha1(SOURCE.url.encode()).hexdigest()))
    return places
