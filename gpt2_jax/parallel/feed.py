"""From rows in numpy to global arrays: the batches of a run, on the devices of its mesh."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from gpt2_jax.data import batches
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.parallel.mesh import own_rows, put_batch

Batch = dict[str, jax.Array]


def train_batch(
    mesh: Mesh, tokens: Tokens, *, seed: int, order: str, step: int, batch_size: int, seq_len: int
) -> Batch:
    """The global batch of update number `step`: see batches.train_batch, also for its UserError.

    Of several processes each reads the rows of its own devices.
    """
    lo, hi = own_rows(mesh, batch_size)
    rows = batches.train_batch(
        tokens,
        seed=seed,
        order=order,
        step=step,
        batch_size=batch_size,
        seq_len=seq_len,
        lo=lo,
        hi=hi,
    )
    return put_batch(mesh, rows, first=lo, n_rows=batch_size)


@contextlib.contextmanager
def train_batches(
    mesh: Mesh,
    tokens: Tokens,
    *,
    start: int,
    stop: int,
    seed: int,
    order: str,
    batch_size: int,
    seq_len: int,
) -> Iterator[Iterator[Batch]]:
    """The batches of updates start .. stop - 1 as an iterator; one thread makes them ahead of time.

    Use as a context manager: the thread ends with it.
    """

    def make(step):
        return train_batch(
            mesh,
            tokens,
            seed=seed,
            order=order,
            step=step,
            batch_size=batch_size,
            seq_len=seq_len,
        )

    with contextlib.closing(batches.prefetch(make, start, stop)) as stream:
        yield stream
