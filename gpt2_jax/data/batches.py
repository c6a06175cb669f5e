"""The batch of step s as a pure function of (tokens, seed, s). Numpy only.

B is the number of rows of a batch and T their length, as in `model/gpt2.py`. A text of N tokens has
n windows in each epoch, and row i of the batch of step s is found as follows:

    g                   = s B + i, the number of the row, counted from the start of the run
    row g               = window order_e[g mod n] of epoch e = g div n
    window w of epoch e = tokens offset_e + w T .. offset_e + w T + T,  0 <= w < n
    n                   = floor(N / T) - 1: one window fewer than the text holds, so that n windows
                          fit at any offset

A window has T + 1 tokens: the first T are the inputs, the last T the targets. offset_e is a random
number in 0 .. T - 1, and order_e a random order of the n windows. So no target is used twice within
an epoch, the windows of the next epoch begin at other positions, and one batch may span epochs.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from gpt2_jax.data.dataset import Tokens
from gpt2_jax.errors import UserError

Item = TypeVar('Item')
HostBatch = dict[str, np.ndarray]  # 'inputs' and 'targets', and 'mask' in evaluation: all (B, T)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, T: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """The offset of an epoch, in [0, T), and the order of its windows, int64 (n,).

    They depend on (seed, epoch) alone; neither may be negative. Only the raw 64-bit stream is used,
    which numpy keeps the same in every version, and random words are sorted for the order. numpy
    may change `shuffle` and `integers`: then a resumed run would see other batches.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n + 1)
    return int(raw[0]) % T, np.argsort(raw[1:], kind='stable')


def train_batch(
    tokens: Tokens,
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    lo: int = 0,
    hi: int | None = None,
) -> HostBatch:
    """Rows lo .. hi - 1 of the global batch of `step`: inputs and targets, int32 (hi - lo, T).

    By default all rows. Raises UserError if the tokens do not fill one window.
    """
    T = seq_len
    hi = batch_size if hi is None else hi
    n = len(tokens) // T - 1
    if n < 1:
        raise UserError(
            f'the training text has {len(tokens)} tokens, too few for train.seq_len = {T}, which '
            f'needs {2 * T}: use a shorter train.seq_len or more text'
        )
    inputs, targets = np.empty((2, hi - lo, T), np.int32)
    for row, g in enumerate(range(step * batch_size + lo, step * batch_size + hi)):
        offset, order = epoch_order(n, T, seed, g // n)
        start = offset + int(order[g % n]) * T
        window = tokens.read(start, start + T + 1)
        inputs[row], targets[row] = window[:-1], window[1:]
    return {'inputs': inputs, 'targets': targets}


def eval_starts(
    n_targets: int, *, seq_len: int, stride: int | None = None, max_targets: int = 0
) -> Sequence[int]:
    """The positions at which the windows of an evaluation begin.

    By default the windows cover all targets. With `max_targets`, fewer windows are spread evenly
    over the text: at least one, and no more than `max_targets` targets allow if the first of them
    begins the text. Nothing is random, so every evaluation of a run sees the same targets.
    """
    T, S = seq_len, stride or seq_len
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
    starts = eval_starts(n_targets, seq_len=T, stride=S, max_targets=max_targets)
    for first in range(0, len(starts), B):
        inputs, targets = np.zeros((2, B, T), np.int32)
        mask = np.zeros((B, T), np.float32)
        for row, start in enumerate(starts[first : first + B]):
            window = tokens.read(start, min(start + T, n_targets) + 1)
            size = len(window) - 1
            inputs[row, :size], targets[row, :size] = window[:-1], window[1:]
            mask[row, T - S if start else 0 : size] = 1
        yield {'inputs': inputs, 'targets': targets, 'mask': mask}


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
