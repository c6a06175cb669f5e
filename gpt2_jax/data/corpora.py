"""Where a text comes from: any text file, or a corpus by name, found locally or downloaded.

The text of a named corpus is `input.txt` in one of the corpus's folders; see files.py.
"""

import dataclasses
import difflib
import hashlib
import os
from pathlib import Path

from gpt2_jax import files
from gpt2_jax.errors import UserError
from gpt2_jax.files import Source

CORPORA = {
    'tinyshakespeare': Source(
        url='https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
        'input.txt',
        sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
        n_bytes=1_115_394,
    ),
}
EMBEDDED = 'python-topics'  # needs no file: the English help texts that come with CPython


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text and its identity: the SHA-256 of its UTF-8. `path` is None if there is no file."""

    name: str
    path: Path | None
    text: str = dataclasses.field(repr=False)
    sha256: str


class CorpusNotFound(UserError):
    """A corpus known by name has no local copy, and its download failed."""


def find_text(name_or_path: str | os.PathLike) -> Corpus:
    """The text in a file, or the corpus of that name; a file wins over a name.

    Raises CorpusNotFound for a known name without a copy. Raises UserError for an unknown name,
    for a local copy that is not the published text, and for a file that is empty, unreadable or
    not UTF-8.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):
        return _read(path.stem, path)
    if name == EMBEDDED:
        return _embedded()
    if name in CORPORA:
        found = next((path for path in _places(name) if os.path.exists(path)), None)
        return _read(name, found or _download(name), CORPORA[name].sha256)
    if os.path.isdir(path):
        raise UserError(
            f'{name} is a folder, and not a prepared one (it has no manifest.json): '
            f'give a text file, or a folder written by scripts/prepare.py'
        )
    known = [*CORPORA, EMBEDDED]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
    raise UserError(
        f'no text file and no corpus called {name!r}: {hint}'
        f'give a text file, a prepared folder or one of {", ".join(known)}'
    )


def _places(name: str) -> list[Path]:
    """The local places of a named corpus, in the order of search; the user's cache comes last."""
    return [folder / 'input.txt' for folder in files.local_folders(name)]


def _read(name: str, path: Path, sha256: str | None = None) -> Corpus:
    """The text of a file, no newline translated. Its SHA-256 must be `sha256`, if given."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'cannot read the text {path}: {error.strerror}') from None
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and digest != sha256:
        raise UserError(
            f'{path} is not the published {name}: its SHA-256 is {digest}, expected {sha256}; move '
            'it away to get the published text, or give its path as data.corpus to use it as it is'
        )
    text = ''.join(files.decode_utf8([data], path))
    if not text:
        raise UserError(f'the text {path} is empty: expected at least one character')
    return Corpus(name, path, text, digest)


def _embedded() -> Corpus:
    try:
        from pydoc_data.topics import topics  # 0.7 MB: only if asked for
    except ImportError:
        raise CorpusNotFound(
            f'this Python comes without its help texts (pydoc_data), so there is no corpus '
            f'{EMBEDDED!r}: give the path of a text file as data.corpus'
        ) from None
    text = '\n'.join(topics[key] for key in sorted(topics))
    return Corpus(EMBEDDED, None, text, hashlib.sha256(text.encode()).hexdigest())


def _download(name: str) -> Path:
    """Downloads a corpus into the user's cache."""
    source, (*_, path) = CORPORA[name], _places(name)
    try:
        files.download(name, source, path)
    except OSError as error:
        raise CorpusNotFound(
            f'no local copy of {name}, and its download failed ({str(error).strip("<>")}): put the '
            f'text at {_places(name)[0]} or {path}, or set GPT2_JAX_DATA_DIR to a folder that '
            f'holds {name}/input.txt, or give the path of any text file as data.corpus; the text '
            f'is published at {source.url}'
        ) from None
    return path
