"""Where a text comes from: any text file, or a corpus by name, found locally or downloaded.

The text of a named corpus is `input.txt` in one of the corpus's folders; see files.py.
"""

import dataclasses
import difflib
import hashlib
import os
import random
import string
from pathlib import Path

from gpt2_jax import files, foreign
from gpt2_jax.data import documents
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
MAX_CHARACTERS = 1 << 30  # of a text held in memory
EMBEDDED = 'python-topics'  # needs no file: the English help texts that come with CPython
REPEATED = 'repeated-letters'  # needs no file: see `_repeated`


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text, and the SHA-256 of its file; `path` is None if there is no file."""

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
    name, path = str(name_or_path), files.user_path(name_or_path)
    if os.path.exists(path) and not os.path.isdir(path):
        return _read(path.stem, path)
    if name == EMBEDDED:
        return _embedded()
    if name == REPEATED:
        return _repeated()
    if name in CORPORA:
        found = next((path for path in _places(name) if os.path.exists(path)), None)
        return _read(name, found or _download(name), CORPORA[name].sha256)
    if os.path.isdir(path):
        raise foreign.error(
            name, 'is a folder, and not a prepared one (it has no manifest.json)', _remedy(path)
        )
    known = [*CORPORA, EMBEDDED, REPEATED]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
    raise UserError(
        f'no text file and no corpus called {foreign.show(name)}: {hint}'
        f'give a text file, a prepared folder or one of {", ".join(known)}'
    )


def _remedy(folder: Path) -> str:
    """What to do with a folder that is not prepared."""
    if any(name.endswith('.bin') for name in os.listdir(folder)):
        return f'for its files of GPT-2 tokens give the pattern {foreign.escape(str(folder))}/*.bin'
    return f'scripts/prepare.py --input {foreign.escape(str(folder))} makes one of the texts in it'


def _places(name: str) -> list[Path]:
    """The local places of a named corpus, in the order of search; the user's cache comes last."""
    return [folder / 'input.txt' for folder in files.local_folders(name)]


def _read(name: str, path: Path, sha256: str | None = None) -> Corpus:
    """The text of a file, no newline translated. Its SHA-256 must be `sha256`, if given."""
    if sha256 and (found := files.sha256(path)) != sha256:
        problem = f'is not the published {name}: SHA-256 {found[:12]}.., expected {sha256[:12]}..'
        remedy = 'move it away, or give its path as data.corpus to use it as it is'
        raise foreign.error(path, problem, remedy)
    if documents.file_kind(path) != documents.TEXT:
        remedy = 'give scripts/prepare.py this file, and data.corpus the folder that it writes'
        raise foreign.error(path, 'holds documents, not one text', remedy)
    digest, blocks, n_characters = hashlib.sha256(), [], 0
    for document in documents.read(str(path), '', digest.update):
        for block in document:
            blocks.append(block)
            n_characters += len(block)
            if n_characters > MAX_CHARACTERS:
                problem = f'has over {MAX_CHARACTERS:,} characters, too many to hold in memory'
                raise foreign.error(path, problem, 'prepare it by scripts/prepare.py')
    if not n_characters:
        raise foreign.error(path, 'is empty', 'expected at least one character')
    return Corpus(name, path, ''.join(blocks), digest.hexdigest())


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


def _repeated() -> Corpus:
    """Passages of 24 to 40 random letters, each of which repeats its beginning again and again.

    Nothing but the repetition can be learned. In a third of the passages the beginning is two
    letters long, so that the next letter is always the last but one: these passages teach a head to
    look at the token before. In the others the beginning is 8 to 16 letters long, so that no head
    can find the earlier letter by counting.
    """
    draw = random.Random(0)
    passages = []
    for _ in range(65_000):
        period = 2 if draw.random() < 1 / 3 else draw.randint(8, 16)
        beginning = ''.join(draw.choices(string.ascii_lowercase, k=period))
        passages.append((beginning * 20)[: draw.randint(24, 40)])
    text = ''.join(passages)
    return Corpus(REPEATED, None, text, hashlib.sha256(text.encode()).hexdigest())


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
