"""From rows in numpy to global arrays: the batches of a run, on the devices of its mesh."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from gpt2_jax.data import batches
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.parallel.mesh import own_rows, put_batch

Batch = dict[str, jax.Array]


def train_batch(mesh: Mesh, tokens: Tokens, *, batch_size: int, **options) -> Batch:
    """The global batch of an update. Options and errors are those of batches.train_batch.

    In a run of several processes, each reads the rows of its own devices.
    """
    lo, hi = own_rows(mesh, batch_size)
    rows = batches.train_batch(tokens, batch_size=batch_size, lo=lo, hi=hi, **options)
    return put_batch(mesh, rows, first=lo, n_rows=batch_size)


def train_batches(
    mesh: Mesh, tokens: Tokens, *, start: int, stop: int, **options
) -> contextlib.closing[Iterator[Batch]]:
    """The batches of updates start .. stop - 1 as an iterator; one thread makes them ahead of time.

    The options are those of `train_batch`, except `step`. Use as a context manager: the thread ends
    with it.
    """

    def make(step):
        return train_batch(mesh, tokens, step=step, **options)

    return contextlib.closing(batches.prefetch(make, start, stop))
