"""The batch of step s as a pure function of (tokens, seed, s). Numpy only.

B is the number of rows of a batch and T their length, as in `model/gpt2.py`. A text of N tokens has
n windows in each epoch, and row i of the batch of step s is found as follows:

    g                   = s B + i, the number of the row, counted from the start of the run
    row g               = window order_e(g mod n) of epoch e = g div n
    window w of epoch e = tokens offset_e + w T .. offset_e + w T + T,  0 <= w < n
    n                   = floor(N / T) - 1: one window fewer than the text holds, so that n windows
                          fit at any offset

A window has T + 1 tokens: the first T are the inputs, the last T the targets. offset_e is a random
number in 0 .. T - 1, and order_e a random permutation of the n windows. So no target is used twice
within an epoch, the windows of the next epoch begin at other positions, and one batch may span
epochs. Both depend on (seed, e) alone, and none of this holds a table of the windows: a step takes
the same time and memory in a text of 100 billion tokens.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, SupportsIndex, TypeVar

import numpy as np

from gpt2_jax import permutation
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.terminal import counted

# The number of rows whose windows are found together. The permutation takes 0.9 ms for 64 rows and
# 2.2 ms for 4,096. In its short operations numpy holds Python's global lock, and the loop waits.
ROWS_AT_ONCE = 4096

Item = TypeVar('Item')
HostBatch = dict[str, np.ndarray]  # 'inputs' and 'targets', and 'mask' in evaluation: all (B, T)


@dataclasses.dataclass(frozen=True)
class KeyedOrder:
    """The offset of each epoch and the order of its windows, by a keyed permutation.

    All arguments are integer arrays that broadcast, and so are the results, int64.
    """

    n_windows: int
    seq_len: int
    seed: int

    def offset(self, epoch: np.ndarray) -> np.ndarray:
        """offset_e, in 0 .. T - 1."""
        key = permutation.make_key(self.seed, epoch)
        return (permutation.hash_uint64(key) % np.uint64(self.seq_len)).astype(np.int64)

    def window(self, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
        """order_e(position): the window at a position, 0 .. n - 1, of the epoch."""
        key = permutation.make_key(self.seed, epoch)
        return permutation.permute(position, key, self.n_windows)

    def position(self, epoch: np.ndarray, window: np.ndarray) -> np.ndarray:
        """The inverse: where the epoch has that window."""
        key = permutation.make_key(self.seed, epoch)
        return permutation.unpermute(window, key, self.n_windows)


@dataclasses.dataclass(frozen=True)
class TableOrder:
    """The same by sorting n random numbers: the order of the runs of older versions.

    Each epoch has a table of all windows, which is made at its beginning. Only the raw 64-bit
    stream is used, which numpy keeps the same in every version.
    """

    n_windows: int
    seq_len: int
    seed: int

    def offset(self, epoch: np.ndarray) -> np.ndarray:
        """offset_e, in 0 .. T - 1."""
        offsets = [int(_raw(self.seed, e, 1)[0]) % self.seq_len for e in epoch.ravel().tolist()]
        return np.array(offsets, np.int64).reshape(epoch.shape)

    def window(self, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
        """order_e(position)."""
        out = np.empty(position.shape, np.int64)
        for e in np.unique(epoch).tolist():
            out[epoch == e] = _table(self.n_windows, self.seed, e)[position[epoch == e]]
        return out

    def position(self, epoch: np.ndarray, window: np.ndarray) -> np.ndarray:
        """The inverse: where the epoch has that window."""
        out = np.empty(window.shape, np.int64)
        for e in np.unique(epoch).tolist():
            inverse = np.argsort(_table(self.n_windows, self.seed, e))
            out[epoch == e] = inverse[window[epoch == e]]
        return out


def _raw(seed: int, epoch: int, count: int) -> np.ndarray:
    """The random numbers of an epoch in a TableOrder: the first one gives the offset."""
    return np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)


@functools.lru_cache(maxsize=4)
def _table(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all windows of an epoch in a TableOrder."""
    return np.argsort(_raw(seed, epoch, n + 1)[1:], kind='stable')


Order = KeyedOrder | TableOrder
ORDERS = {'keyed': KeyedOrder, 'table': TableOrder}  # the values of the setting train.order


def n_windows(n_tokens: int, seq_len: int) -> int:
    """The windows of an epoch, n; below 1 if the tokens are too few to train on."""
    return n_tokens // seq_len - 1


def row_starts(order: Order, rows: np.ndarray) -> np.ndarray:
    """The positions in the text of the first input of each of the rows g: int64, like `rows`."""
    epoch, position = np.divmod(rows, order.n_windows)
    return order.offset(epoch) + order.window(epoch, position) * order.seq_len


@functools.lru_cache(maxsize=4)
def _starts(order: Order, block: int) -> np.ndarray:
    """row_starts of one block of ROWS_AT_ONCE rows, kept for the next steps."""
    rows = np.arange(block * ROWS_AT_ONCE, (block + 1) * ROWS_AT_ONCE)
    return row_starts(order, rows)


def _starts_between(order: Order, first: int, end: int) -> list[int]:
    """row_starts of the rows first .. end - 1."""
    blocks = range(first // ROWS_AT_ONCE, (end - 1) // ROWS_AT_ONCE + 1)
    starts = np.concatenate([_starts(order, block) for block in blocks])
    skipped = blocks[0] * ROWS_AT_ONCE
    return starts[first - skipped : end - skipped].tolist()


def train_batch(
    tokens: Tokens,
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    order: str = 'keyed',
    lo: int = 0,
    hi: int | None = None,
) -> HostBatch:
    """Rows lo .. hi - 1 of the global batch of `step`: inputs and targets, int32 (hi - lo, T).

    By default all rows. Raises UserError if the tokens do not fill one window.
    """
    T = seq_len
    hi = batch_size if hi is None else hi
    n = n_windows(len(tokens), T)
    if n < 1:
        raise UserError(
            f'the training text has {counted(len(tokens), "tokens")}, too few for train.seq_len = '
            f'{T}, which needs {2 * T}: use a shorter train.seq_len or more text'
        )
    inputs, targets = np.empty((2, hi - lo, T), np.int32)  # first: it fails if B T is too large
    first = step * batch_size
    starts = _starts_between(ORDERS[order](n, T, seed), first + lo, first + hi)
    for row, start in enumerate(starts):
        window = tokens.read(start, start + T + 1)
        inputs[row], targets[row] = window[:-1], window[1:]
    return {'inputs': inputs, 'targets': targets}


class WindowSource:
    """The windows of a text in their order: a `grain.sources.RandomAccessDataSource`.

    Element w has the inputs and targets, int32 (T,), of window w of an epoch with offset 0. grain
    shuffles and batches them. grain is not needed here: its protocol is `len`, an index, and a text
    that identifies the source in a checkpoint of its own.
    """

    def __init__(self, tokens: Tokens, seq_len: int):
        if seq_len < 1:
            raise UsageError(f'seq_len = {seq_len}: expected at least 1')
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.seq_len

    def __getitem__(self, w: SupportsIndex) -> HostBatch:
        start = range(len(self))[operator.index(w)] * self.seq_len  # IndexError outside
        window = self.tokens.read(start, start + self.seq_len + 1).astype(np.int32)
        return {'inputs': window[:-1], 'targets': window[1:]}

    def __repr__(self) -> str:
        return f'WindowSource({len(self.tokens)} tokens, seq_len={self.seq_len})'


class Window(NamedTuple):
    """Token ids (n,), n >= 2, the last `n_targets` of which count as targets."""

    ids: np.ndarray
    n_targets: int


def eval_starts(n_targets: int, T: int, S: int, max_targets: int) -> Sequence[int]:
    """The positions at which the windows of an evaluation begin: T targets each, S apart.

    The windows cover all targets. With `max_targets`, fewer windows are spread evenly over the
    text: at least one, and no more than `max_targets` targets allow if the first of them begins the
    text. Nothing is random, so every evaluation of a run sees the same targets.
    """
    starts = range(0, max(n_targets - T + S, 1), S)  # up to the first that reaches the end
    n_windows = max(1, 1 + (max_targets - T) // S)
    if not max_targets or max_targets >= n_targets or n_windows >= len(starts):
        return starts
    full = starts[: (n_targets - T) // S + 1]  # without a last window that is cut short
    # The middles of n_windows equal parts of the text.
    return [full[(2 * i + 1) * len(full) // (2 * n_windows)] for i in range(n_windows)]


def eval_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    seq_len: int,
    stride: int | None = None,
    max_targets: int = 0,
) -> Iterator[HostBatch]:
    """The batches of an evaluation: by default all N - 1 targets once, in order, in windows of T.

    By default each window begins with an empty context. With a stride S <= T (here S is the stride)
    windows begin S tokens apart, and only the last S targets of a window count, except in the
    first window, where all count. Then every target after the first window has a context of more
    than T - S tokens, at T / S times the work. `max_targets` limits the windows as in
    `eval_starts`; 0: no limit.

    Yields inputs and targets int32 (B, T), and mask float32 (B, T): 1 at a target that counts,
    else 0. The last window and the last batch are padded, so that every batch has one shape.
    Raises UserError if there are fewer than 2 tokens.
    """
    B, T, S, n_targets = batch_size, seq_len, stride or seq_len, len(tokens) - 1
    if n_targets < 1:
        raise UserError(
            f'evaluation needs at least 2 tokens, and there are {len(tokens)}: use more text, or '
            'keep more of it for validation (data.val_fraction, data.holdout)'
        )

    def window(start: int) -> Window:
        ids = tokens.read(start, min(start + T, n_targets) + 1)
        return Window(ids, len(ids) - 1 - (T - S if start else 0))

    starts = eval_starts(n_targets, T, S, max_targets)
    for first in range(0, len(starts), B):
        yield pad_batch(map(window, starts[first : first + B]), B, T)


def pad_windows(windows: Sequence[Window], B: int, T: int) -> Iterator[HostBatch]:
    """The batches of an evaluation of these windows."""
    for first in range(0, len(windows), B):
        yield pad_batch(windows[first : first + B], B, T)


def pad_batch(windows: Iterable[Window], B: int, T: int) -> HostBatch:
    """A batch of evaluation of up to B windows.

    A window of more than T + 1 ids is truncated on the left. Windows and rows that are missing are
    padded with zeros: the model is causal, so that padding changes no target before it.
    """
    inputs, targets = np.zeros((2, B, T), np.int32)
    mask = np.zeros((B, T), np.float32)
    for row, (ids, n_targets) in enumerate(windows):
        ids = ids[-(T + 1) :]
        end = len(ids) - 1
        inputs[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        mask[row, end - n_targets : end] = 1
    return {'inputs': inputs, 'targets': targets, 'mask': mask}


def prefetch(make: Callable[[int], Item], start: int, stop: int, depth: int = 2) -> Iterator[Item]:
    """make(step) for each step in [start, stop), computed up to `depth` steps ahead in one thread.

    An error in `make` is raised in place of its batch. The thread ends with the generator.
    """
    with ThreadPoolExecutor(1, 'prefetch') as pool:
        ahead = collections.deque(
            pool.submit(make, step) for step in range(start, min(start + depth, stop))
        )
        try:
            for step in range(start, stop):
                if step + depth < stop:
                    ahead.append(pool.submit(make, step + depth))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
