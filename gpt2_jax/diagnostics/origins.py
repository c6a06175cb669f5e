"""Where training tokens came from: file, line and byte, counted from marks.

A mark says that a token begins at some place of a file. Between two marks the place follows from
the tokens themselves: their bytes, and the line ends among them. No JAX.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax import files
from gpt2_jax.data import bin_files, corpora, documents, shards
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.shards import MARK
from gpt2_jax.data.tokenizers import END_OF_TEXT, Tokenizer
from gpt2_jax.errors import UsageError

NEWLINE = ord('\n')
BLOCK = 1 << 20  # tokens looked through at once


class TokenBytes:
    """The UTF-8 bytes of tokens, many at once. A separator has none."""

    def __init__(self, tokenizer: Tokenizer):
        lengths_V = np.array(tokenizer.byte_lengths)
        ids = np.arange(len(lengths_V))
        data = np.frombuffer(tokenizer.decode_bytes(ids[lengths_V > 0]), np.uint8)
        ends_V = np.cumsum(lengths_V)
        line_ends = np.concatenate([[0], np.cumsum(data == NEWLINE)])
        self.data, self.starts_V, self.lengths_V = data, ends_V - lengths_V, lengths_V
        self.newlines_V = line_ends[ends_V] - line_ends[self.starts_V]

    def join(self, ids: np.ndarray, no_text: bytes = b'') -> tuple[bytes, np.ndarray]:
        """The bytes of tokens (N,) in a row, and where each token ends in them.

        A separator stands as the bytes `no_text`.
        """
        lengths_N = self.lengths_V[ids]
        is_separator = lengths_N == 0
        if no_text:
            lengths_N = np.where(is_separator, len(no_text), lengths_N)
        ends_N = np.cumsum(lengths_N)
        # Byte j of token i lies at starts_V[id] + j.
        shift_N = np.where(is_separator, 0, self.starts_V[ids]) - (ends_N - lengths_N)
        at = np.arange(ends_N[-1] if len(ends_N) else 0) + np.repeat(shift_N, lengths_N)
        joined = self.data[np.clip(at, 0, len(self.data) - 1)]
        if no_text and is_separator.any():
            joined[np.repeat(is_separator, lengths_N)] = np.tile(
                np.frombuffer(no_text, np.uint8), int(is_separator.sum())
            )
        return joined.tobytes(), ends_N

    def texts(self, ids: np.ndarray) -> list[str]:
        """The text of each token (N,); U+FFFD for part of a character."""
        spans = zip(self.starts_V[ids].tolist(), self.lengths_V[ids].tolist(), strict=True)
        return [self.data[at : at + n].tobytes().decode('utf-8', 'replace') for at, n in spans]


class Origin(NamedTuple):
    """A place in a file. Lines and records count from 1, bytes from 0.

    In a text file, `line` and `byte` are of the place itself. In JSON Lines and Parquet, `line` and
    `byte` are of the record, and `within` counts the bytes of its text before the place. In a file
    of tokens there are no lines, and `within` counts the tokens before it. None: unknown.
    """

    file: str
    line: int | None
    byte: int | None
    within: int | None = None

    def __str__(self):
        if self.line is None:
            return f'{self.file}, token {self.within:,}'
        if self.within is not None:
            return f'{self.file}:{self.line}, byte {self.within:,} of its text'
        return f'{self.file}:{self.line}, byte {self.byte:,}'


class Origins(NamedTuple):
    """The marks of a training text. `kinds[i]` of file i: 'text', 'records' or 'tokens'."""

    files: tuple[str, ...]
    kinds: tuple[str, ...]
    marks: np.ndarray  # of MARK, in the order of their tokens

    def locate(self, tokens: Tokens, token_bytes: TokenBytes, position: int) -> Origin:
        """The place that the token at `position` came from."""
        mark = self.marks[np.searchsorted(self.marks['token'], position, 'right') - 1]
        file, kind = self.files[mark['file']], self.kinds[mark['file']]
        start = int(mark['token'])
        if kind == 'tokens':
            return Origin(file, None, None, position - start)
        n_bytes = n_lines = 0
        for begin in range(start, position, BLOCK):
            ids = tokens.read(begin, min(begin + BLOCK, position))
            # The tokenizer's separator has no bytes. Between a mark and the next document it comes
            # from a text in which it was written out.
            written_out = int((token_bytes.lengths_V[ids] == 0).sum())
            n_bytes += int(token_bytes.lengths_V[ids].sum()) + written_out * len(END_OF_TEXT)
            n_lines += int(token_bytes.newlines_V[ids].sum())
        line, byte = int(mark['line']), int(mark['byte'])
        if kind == 'records':
            return Origin(file, line, byte if byte >= 0 else None, int(mark['within']) + n_bytes)
        return Origin(file, line + n_lines, byte + n_bytes)

    def tokens_of_line(
        self, tokens: Tokens, token_bytes: TokenBytes, line: int, file: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) of the training tokens of a line, or of a record.

        Arrays of one element, or more if a large file has several marks in the line.

        Raises UsageError if the line is not in the training text, or if the file is not.
        """
        if line < 1:
            raise UsageError(f'--line={line} is not allowed: lines are counted from 1')
        chosen = [i for i, name in enumerate(self.files) if file in (None, name, Path(name).name)]
        if len(chosen) != 1:
            names = ', '.join(Path(name).name for name in self.files[:5])
            raise UsageError(
                f'--line={line} needs --file: the training text comes from {names}'
                if file is None
                else f'--file={file}: expected one of {names}'
            )
        if self.kinds[chosen[0]] == 'tokens':
            raise UsageError(f'{self.files[chosen[0]]} holds tokens and has no lines')
        bounds = np.append(self.marks['token'], len(tokens))
        found, last = [], 0
        for i in np.flatnonzero(self.marks['file'] == chosen[0]):
            here, (start, stop) = self.marks[i], bounds[i : i + 2].tolist()
            if self.kinds[chosen[0]] == 'records':
                last = int(here['line'])
                if last == line and start < stop:
                    found.append((start, stop))
            elif (first := int(here['line'])) <= line:
                span, last = self._span(tokens, token_bytes, start, stop, first, line)
                found += [span] if span else []
        if not found:
            raise UsageError(
                f'line {line} of {self.files[chosen[0]]} is not in the training text, whose last '
                f'line is {last}'
            )
        return tuple(np.array(found).T)

    @staticmethod
    def _span(tokens, token_bytes, start, stop, first, line):
        """The tokens of start .. stop - 1 with a byte in that line, and the line where they end.

        `first` is the line of token `start`.
        """
        span = None
        for begin in range(start, stop, BLOCK):
            ids = tokens.read(begin, min(begin + BLOCK, stop))
            newlines = token_bytes.newlines_V[ids]
            after = first + np.cumsum(newlines)
            # A line end belongs to the line that it ends.
            last_byte = token_bytes.starts_V[ids] + token_bytes.lengths_V[ids] - 1
            ends_line = (token_bytes.data[last_byte] == NEWLINE) & (token_bytes.lengths_V[ids] > 0)
            inside = np.flatnonzero((after - newlines <= line) & (after - ends_line >= line))
            inside = inside[token_bytes.lengths_V[ids[inside]] > 0]
            if len(inside):
                low, high = begin + int(inside[0]), begin + int(inside[-1]) + 1
                span = (span[0] if span else low, high)
            first = int(after[-1])
            if first > line:
                break
        return span, first


def open_origins(corpus: str, fallback: str, dataset: Dataset) -> Origins:
    """Where the training tokens of the setting data.corpus came from.

    A prepared folder has marks of its own; one that was prepared before there were marks gives the
    shard and the token in it. Raises UserError as loading the data set does.
    """
    if corpus.endswith('.bin'):
        paths = files.matching(corpus)
        return _token_files(
            [str(p) for p in paths if not bin_files.VALIDATION.search(p.name)], dataset
        )
    if shards.is_prepared(corpus):
        found = shards.open_marks(corpus)
        if found is None:
            names = sorted(path.name for path in Path(corpus).glob('train_*.npy'))
            return _token_files(names, dataset)
        names, marks = found
        is_text = [documents.file_kind(name) == documents.TEXT for name in names]
        return Origins(names, tuple('text' if text else 'records' for text in is_text), marks)
    try:
        found = corpora.find_text(corpus)
    except corpora.CorpusNotFound:
        found = corpora.find_text(fallback)
    byte = next(documents.read_placed(str(found.path), '')).byte if found.path else 0
    name = str(found.path or found.name)
    return Origins((name,), ('text',), np.array([(0, 0, 1, byte, 0)], MARK))


def _token_files(names: list[str], dataset: Dataset) -> Origins:
    """The files themselves, one array of the data set each."""
    starts = [0, *dataset.train.ends][: len(names)]
    marks = np.array([(start, i, 0, 0, 0) for i, start in enumerate(starts)], MARK)
    return Origins(tuple(names), ('tokens',) * len(names), marks)
