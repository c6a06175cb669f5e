"""The batch of step s as a pure function of (tokens, seed, s). Numpy only.

Letters as in `model.py`: B batch, T time. N is the number of tokens, e an epoch, n its number of windows:

    n = floor((N - T) / T)      window w of epoch e = tokens offset_e + w T .. offset_e + w T + T,  0 <= w < n
    g = s B + i                 row i of step s = window order_e[g mod n] of epoch e = g div n

offset_e is random below T, and order_e a random order of the n windows: within an epoch no target comes twice, and
between epochs the windows begin elsewhere. Rows are numbered through, so one batch may straddle epochs.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpt2_jax.data.dataset import Tokens
from gpt2_jax.errors import UserError

Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, T: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """An epoch's (offset in [0, T), order (n,)), drawn from (seed, epoch), both at least 0.

    Only the raw 64-bit stream of the bit generator is used, which numpy keeps the same in every version; its
    `shuffle` and `integers` it may change, and with them the batches of a run that is resumed later.
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
) -> Batch:
    """Rows lo .. hi - 1 (all, by default) of the global batch of `step`: inputs and targets, int32 (hi - lo, T).

    Raises UserError where the tokens are too few for one window.
    """
    T, hi = seq_len, batch_size if hi is None else hi
    n = (len(tokens) - T) // T
    if n < 1:
        raise UserError(
            f'the training text has {len(tokens)} tokens, too few for train.seq_len = {T}, which needs '
            f'{2 * T}: use a shorter train.seq_len or more text'
        )
    inputs, targets = np.empty((2, hi - lo, T), np.int32)
    for row, g in enumerate(range(step * batch_size + lo, step * batch_size + hi)):
        offset, order = epoch_order(n, T, seed, g // n)
        start = offset + int(order[g % n]) * T
        window = tokens.read(start, start + T + 1)
        inputs[row], targets[row] = window[:-1], window[1:]
    return {'inputs': inputs, 'targets': targets}


def eval_batches(
    tokens: Tokens, *, batch_size: int, seq_len: int, stride: int | None = None
) -> Iterator[Batch]:
    """All N - 1 targets exactly once, in order, in windows of T; by default each begins with an empty context.

    With a stride S <= T windows begin S apart, and only the last S targets of each count, but all of the first one:
    every other target is seen with a context of more than T - S tokens, for T / S times the work.

    Yields inputs and targets int32 (B, T) and mask float32 (B, T): 1 at a target that counts, 0 elsewhere and at the
    padding after the last one, which fills its window and its batch, so that every batch has one shape. UserError
    below 2 tokens.
    """
    B, T, S, n_targets = batch_size, seq_len, stride or seq_len, len(tokens) - 1
    if n_targets < 1:
        raise UserError(
            f'evaluation needs at least 2 tokens, and there are {len(tokens)}: use more text, or leave '
            'more of it to validate on (data.val_fraction, data.holdout)'
        )
    starts = range(0, max(n_targets - T + S, 1), S)
    for first in range(0, len(starts), B):
        inputs, targets = np.zeros((2, B, T), np.int32)
        mask = np.zeros((B, T), np.float32)
        for row, start in enumerate(starts[first : first + B]):
            window = tokens.read(start, min(start + T, n_targets) + 1)
            size = len(window) - 1
            inputs[row, :size], targets[row, :size], mask[row, T - S if start else 0 : size] = (
                window[:-1],
                window[1:],
                1,
            )
        yield {'inputs': inputs, 'targets': targets, 'mask': mask}


def prefetch(
    make: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Iterator[Batch]:
    """make(step) for each step in [start, stop), computed up to `depth` steps ahead in one background thread.

    An error of `make` is raised where its batch would have come. The thread ends with the generator.
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
