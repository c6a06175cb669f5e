"""Which text a step trained on, and which steps trained on a text. Nothing is logged for it.

The batch of a step is a function of (tokens, seed, step), and so is its inverse (letters as in
data/batches.py): the target at token p is, in epoch e, in window w = (p - 1 - offset_e) div T,
and window w is row g = e n + inverse_order_e(w), counted through all steps, B to a step.

Steps are counted as in metrics.jsonl: step 1 is the first update. Token positions count from 0,
from the beginning of the training text. No JAX.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.data import batches
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.load import load_dataset
from gpt2_jax.data.tokenizers import ByteTokenizer
from gpt2_jax.diagnostics.origins import Origin, Origins, TokenBytes, open_origins
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.terminal import counted, in_one_line
from gpt2_jax.workdir import history

BLOCK = 1 << 22  # tokens searched at once
PAIRS = 1 << 16  # of a text and an epoch, looked up at once
MAX_PAIRS = 1 << 25  # looked up in all: their sightings take about 5 GB
NO_TEXT = b'\xff'  # stands for a separator in a search; never a byte of UTF-8
CONTEXT = 24  # tokens shown on each side of an occurrence


class Addressing(NamedTuple):
    """What the batches of a run are a function of: N tokens, a seed, B rows of T tokens.

    `order` is the setting train.order.
    """

    n_tokens: int
    seed: int
    batch_size: int
    seq_len: int
    order: str = 'keyed'

    @property
    def n_windows(self) -> int:
        """The windows of an epoch."""
        return batches.n_windows(self.n_tokens, self.seq_len)

    @property
    def window_order(self) -> batches.Order:
        """The order of the windows of every epoch."""
        return batches.ORDERS[self.order](self.n_windows, self.seq_len, self.seed)


class Sightings(NamedTuple):
    """Rows that trained on a text, in the order of training; arrays of one length.

    text: which of the texts. step (from 1), row: where. first, last: the targets of the row that
    belong to the text. whole: whether the row has all of it.
    """

    text: np.ndarray
    step: np.ndarray
    row: np.ndarray
    first: np.ndarray
    last: np.ndarray
    whole: np.ndarray


def row_starts(addressing: Addressing, step: int) -> np.ndarray:
    """The position of the first input of each row of `step`: (B,).

    Row i holds the T + 1 tokens from there; its targets are all but the first one.
    """
    B = addressing.batch_size
    return batches.row_starts(addressing.window_order, np.arange((step - 1) * B, step * B))


def sightings(addressing: Addressing, start, stop, steps: int) -> Sightings:
    """Every row of the first `steps` steps with any of tokens start[i] .. stop[i] - 1 as a target.

    A text that crosses the border of two windows is in two rows, in part in each. Raises UsageError
    if there are more rows than fit into memory.
    """
    start, stop = np.atleast_1d(start), np.atleast_1d(stop)
    n, B, T = addressing.n_windows, addressing.batch_size, addressing.seq_len
    n_rows = steps * B
    n_epochs = -(-n_rows // n)
    if n_epochs * len(start) > MAX_PAIRS:
        raise UsageError(
            f'{len(start):,} places in each of {n_epochs:,} epochs are more than the '
            f'{MAX_PAIRS:,} that fit into memory: give a longer text or a smaller --by_step'
        )
    epochs, order, found = np.arange(n_epochs), addressing.window_order, []
    # For each text and epoch, the first window that has a part of it, the second, and so on.
    for block in np.array_split(epochs, 1 + len(epochs) * len(start) // PAIRS):
        offset = order.offset(block)[:, None]
        lowest, highest = (start - 1 - offset) // T, (stop - 2 - offset) // T
        for more in range(int((highest - lowest).max(initial=-1)) + 1):
            window = lowest + more
            at, here = np.nonzero((window >= 0) & (window <= highest) & (window < n))
            window, epoch = window[at, here], block[at]
            g = epoch * n + order.position(epoch, window)
            here, window, at, g = (x[g < n_rows] for x in (here, window, at, g))
            target = offset[at, 0] + window * T + 1  # the position of the row's first target
            first = np.maximum(start[here] - target, 0)
            last = np.minimum(stop[here] - 1 - target, T - 1)
            whole = last - first + 1 == (stop - start)[here]
            found.append(np.stack([g // B + 1, g % B, here, first, last, whole]))
    step, row, text, first, last, whole = np.concatenate([np.zeros((6, 0), int), *found], axis=1)
    sorting = np.lexsort((text, row, step))
    return Sightings(*(x[sorting] for x in (text, step, row, first, last, whole.astype(bool))))


def occurrences(
    tokens: Tokens, token_bytes: TokenBytes, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where a text stands in the tokens: (start, stop), the tokens start[i] .. stop[i] - 1 hold it.

    Compared byte by byte, so the tokens may begin before the text and end after it. Raises
    UsageError for an empty text, and UserError for half of a surrogate pair.
    """
    wanted = bytes(ByteTokenizer().encode(text))
    if not wanted:
        raise UsageError('the text to find is empty: give at least one character')
    found = []
    for begin in range(0, len(tokens), BLOCK):
        # Every token but a separator has a byte or more: the text has at most as many tokens.
        ids = tokens.read(begin, min(begin + BLOCK + len(wanted), len(tokens)))
        data, ends = token_bytes.join(ids, NO_TEXT)
        at = np.fromiter(_find_all(data, wanted), np.int64)
        start = np.searchsorted(ends, at, 'right')
        stop = np.searchsorted(ends, at + len(wanted) - 1, 'right') + 1
        found.append(begin + np.stack([start, stop])[:, start < BLOCK])
    return tuple(np.concatenate([np.zeros((2, 0), int), *found], axis=1))


def _find_all(data: bytes, wanted: bytes) -> Iterator[int]:
    at = data.find(wanted)
    while at >= 0:
        yield at
        at = data.find(wanted, at + 1)


class Run(NamedTuple):
    """A run as the ledger needs it: its configuration, text, and where the text came from."""

    folder: Path
    config: ConfigDict
    dataset: Dataset
    addressing: Addressing
    origins: Origins
    token_bytes: TokenBytes

    def where(self, position: int) -> Origin:
        """The place in a file that a training token came from."""
        return self.origins.locate(self.dataset.train, self.token_bytes, position)

    def text(self, start: int, stop: int) -> str:
        """The training text of tokens start .. stop - 1, with U+FFFD for half a character."""
        start, stop = max(start, 0), min(stop, len(self.dataset.train))
        if start >= stop:
            return ''
        return self.dataset.tokenizer.decode(self.dataset.train.read(start, stop))


def open_run(folder: Path, corpus: str | None = None) -> Run:
    """Opens the text that a run trained on. Raises UserError if the text has changed since.

    `corpus` says where the text is now, if it was moved.
    """
    config = history.read_config(folder)
    if corpus is not None:
        config.data.corpus = corpus
    recorded = history.read_corpus(folder)
    dataset = load_dataset(**config.data, notify=lambda text: None)
    if recorded and recorded['sha256'] != dataset.sha256:
        raise UserError(
            f'the text of {folder} has changed: data.corpus = {config.data.corpus!r} now has the '
            f'SHA-256 {dataset.sha256[:12]}, and the run trained on {recorded["sha256"][:12]}: '
            'restore the text'
        )
    train = config.train
    addressing = Addressing(
        len(dataset.train), train.seed, train.batch_size, train.seq_len, train.order
    )
    if addressing.n_windows < 1:
        raise UserError(
            f'the training text of {folder} has {addressing.n_tokens} tokens: too few for a window'
        )
    origins = open_origins(config.data.corpus, config.data.fallback, dataset)
    return Run(folder, config, dataset, addressing, origins, TokenBytes(dataset.tokenizer))


class Found(NamedTuple):
    """What `find` found: texts[i] stands at tokens start[i] .. stop[i] - 1."""

    run: Run
    start: np.ndarray
    stop: np.ndarray
    sightings: Sightings
    by_step: int


def find(
    folder: Path,
    *,
    text: str | None = None,
    token_offset: int | None = None,
    line: int | None = None,
    file: str | None = None,
    by_step: int | None = None,
    corpus: str | None = None,
) -> Found:
    """Every step and row of a run that trained on a text, on one token, or on a line of a file.

    Exactly one of `text`, `token_offset` and `line` is given; `file` chooses among several files.
    Steps up to `by_step`, by default all that the configuration plans. `corpus` is as in
    `open_run`. Raises UsageError.
    """
    if sum(x is not None for x in (text, token_offset, line)) != 1:
        raise UsageError('give one of --text, --token_offset and --line')
    if file is not None and line is None:
        raise UsageError('--file belongs to --line: it chooses the file of that line')
    run = open_run(folder, corpus)
    steps = run.config.train.steps if by_step is None else by_step
    n = len(run.dataset.train)
    if not 0 <= steps <= run.config.train.steps:
        raise UsageError(
            f'--by_step={steps} is not allowed: expected 0 to {run.config.train.steps}, the '
            'train.steps of the run'
        )
    if text is not None:
        start, stop = occurrences(run.dataset.train, run.token_bytes, text)
    elif token_offset is not None:
        if not 0 <= token_offset < n:
            raise UsageError(f'--token_offset={token_offset}: the training text has {n} tokens')
        start, stop = np.array([token_offset]), np.array([token_offset + 1])
    else:
        start, stop = run.origins.tokens_of_line(run.dataset.train, run.token_bytes, line, file)
    return Found(run, start, stop, sightings(run.addressing, start, stop, steps), steps)


def to_json(found: Found) -> dict[str, Any]:
    """All of it, as plain values for JSON."""
    run, seen = found.run, found.sightings
    by_text = [[] for _ in found.start]
    for i, step, row, first, last, whole in zip(*map(np.ndarray.tolist, seen), strict=True):
        place = {'step': step, 'row': row, 'targets': [first, last], 'whole': whole}
        by_text[i].append(place)
    return {
        'run': str(run.folder),
        'by_step': found.by_step,
        'times': int(seen.whole.sum()),
        'occurrences': [
            {
                'tokens': [start, stop],
                'text': run.text(start, stop),
                **run.where(start)._asdict(),
                'seen': rows,
            }
            for start, stop, rows in zip(
                found.start.tolist(), found.stop.tolist(), by_text, strict=True
            )
        ],
    }


def to_lines(found: Found, limit: int) -> list[str]:
    """The same for a terminal: at most `limit` occurrences, and as many steps of each."""
    run, seen, n = found.run, found.sightings, len(found.start)
    parts = int((~seen.whole).sum())
    lines = [
        f'{counted(n, "places")} in the training text of {run.folder} ({run.dataset.name}); '
        f'trained on {int(seen.whole.sum()):,} times by step {found.by_step:,}'
        + (f', and {parts:,} times in part, across the border of two rows' if parts else '')
    ]
    for i in range(min(n, limit)):
        start, stop = int(found.start[i]), int(found.stop[i])
        before, after = run.text(start - CONTEXT, start), run.text(stop, stop + CONTEXT)
        shown = run.text(start, min(stop, start + 4 * CONTEXT))
        more = '..' if stop > start + 4 * CONTEXT else ''
        lines += [
            '',
            f'{run.where(start)}, training token {start:,}',
            f'  {in_one_line(before)}[{in_one_line(shown)}{more}]{in_one_line(after)}',
        ]
        here = np.flatnonzero(seen.text == i)
        places = [
            f'step {seen.step[j]:,} row {seen.row[j]}' + ('' if seen.whole[j] else ' (in part)')
            for j in here[:limit]
        ]
        places += [f'and {len(here) - limit:,} more'] if len(here) > limit else []
        lines.append('  ' + (', '.join(places) or 'not trained on'))
    if n > limit:
        lines += ['', f'and {n - limit:,} more places: --limit={n} or --format=json shows all']
    return lines
