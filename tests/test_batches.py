"""Batches: the addressing rule in plain loops, every token once, rows alike for every reader."""

import multiprocessing.reduction
import re
import runpy
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax import permutation
from gpt2_jax.config import SETTINGS
from gpt2_jax.data import batches
from gpt2_jax.data.batches import (
    ORDERS,
    WindowSource,
    eval_batches,
    prefetch,
    row_starts,
    train_batch,
)
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.shards import open_shards
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.prepare import prepare

# 11 windows: batches span epochs, and epochs end within batches.
N, T, B, SEED = 103, 8, 5, 3


def sequence(n=N, cuts=()):
    return Tokens(tuple(np.split(np.arange(n, dtype=np.uint16), cuts)))


def batch(tokens, step, **kwargs):
    return train_batch(
        tokens, **{'seed': SEED, 'step': step, 'batch_size': B, 'seq_len': T} | kwargs
    )


def keyed_epoch(n, epoch):
    key = permutation.make_key(SEED, epoch)
    offset = int(permutation.hash_uint64(key)) % T
    return offset, [int(permutation.permute(i, key, n)) for i in range(n)]


def table_epoch(n, epoch):
    raw = np.random.Philox(np.random.SeedSequence([SEED, epoch])).random_raw(n + 1).tolist()
    return raw[0] % T, sorted(range(n), key=lambda w: raw[1:][w])


EPOCHS = {'keyed': keyed_epoch, 'table': table_epoch}


@pytest.mark.parametrize('order', EPOCHS)
def test_addressing_rule_in_plain_loops(order):
    n = (N - T) // T
    stream = []
    for epoch in range(4):
        offset, windows = EPOCHS[order](n, epoch)
        stream += [offset + w * T for w in windows]
    for step in range(len(stream) // B):
        got = batch(sequence(), step, order=order)
        assert got['inputs'].dtype == got['targets'].dtype == np.int32
        for row in range(B):
            start = stream[step * B + row]
            assert got['inputs'][row].tolist() == list(range(start, start + T))
            assert got['targets'][row].tolist() == list(range(start + 1, start + T + 1))


@pytest.mark.parametrize(
    ('order', 'offsets', 'windows'),
    [
        ('keyed', [5, 1, 0, 3], [7, 4, 0, 1, 10, 2, 8, 9, 5, 3, 6]),
        ('table', [6, 4, 4, 7], [0, 1, 9, 6, 4, 5, 10, 8, 7, 3, 2]),
    ],
)
def test_the_stream_never_changes(order, offsets, windows):
    """A run resumed later with another numpy must see the same batches: these values are fixed."""
    made = ORDERS[order](11, 8, 3)
    assert made.offset(np.arange(4)).tolist() == offsets
    assert made.window(np.zeros(11, int), np.arange(11)).tolist() == windows


def test_the_orders_are_the_values_of_the_setting():
    assert set(ORDERS) == set(EPOCHS)
    assert all(SETTINGS['train.order'][1].test(name) for name in ORDERS)


@pytest.mark.parametrize('order', ORDERS)
def test_positions_are_the_inverse_of_windows(order):
    made, epoch = ORDERS[order](37, 8, 3), np.arange(6)[:, None] + np.zeros(37, int)
    windows = made.window(epoch, np.arange(37) + np.zeros((6, 1), int))
    assert np.array_equal(made.position(epoch, windows), np.arange(37) + np.zeros((6, 1), int))
    assert len({tuple(row) for row in windows.tolist()}) == 6


def test_a_batch_of_any_step_needs_no_table():
    """Of a text of 10^15 tokens, which no table of windows would fit: no target twice."""
    order = ORDERS['keyed'](10**15 // 1024 - 1, 1024, 0)
    per_epoch = order.n_windows
    rows = np.concatenate([np.arange(first, first + 500) for first in (0, per_epoch - 500)])
    windows = (row_starts(order, rows) - int(order.offset(np.array(0)))) // 1024
    assert len(set(windows.tolist())) == 1000
    assert 0 <= windows.min() <= windows.max() < per_epoch
    assert np.median(windows) == pytest.approx(per_epoch / 2, rel=0.1)


@pytest.mark.parametrize('order', ORDERS)
def test_an_epoch_uses_each_window_once(order):
    n = (N - T) // T
    batches = [batch(sequence(), step, order=order)['targets'] for step in range(2 * n)]
    stream = np.concatenate(batches)
    epochs = stream[: B * n].reshape(-1, n * T)
    for targets in epochs:
        assert len(set(targets.tolist())) == n * T
        assert targets.max() - targets.min() == n * T - 1  # consecutive windows
    assert len({targets.min() for targets in epochs}) > 1  # at other offsets
    orders = {tuple(targets - targets.min()) for targets in epochs}
    assert len(orders) == len(epochs)
    first, other = (batch(sequence(), 0, order=order, seed=seed) for seed in (SEED, SEED + 1))
    assert not np.array_equal(first['inputs'], other['inputs'])


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('batch_size', [3, 1365, 2048, 4096, 5000])
def test_rows_are_found_together_and_are_the_same(order, batch_size):
    """Batches within one block of rows, at its edges, and across several blocks."""
    n = N // T - 1
    for step in (0, 1, 2, 3, 1000):
        rows = np.arange(step * batch_size, (step + 1) * batch_size)
        inputs = batch(sequence(), step, batch_size=batch_size, order=order)['inputs']
        assert np.array_equal(inputs[:, 0], row_starts(ORDERS[order](n, T, SEED), rows))


def test_the_windows_of_a_block_of_rows_are_found_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        batches,
        'row_starts',
        lambda order, rows: asked.append((order.seed, rows[0])) or row_starts(order, rows),
    )
    batches._starts.cache_clear()
    for step in range(200):
        batch(sequence(), step, batch_size=64, seed=SEED)
        batch(sequence(), step, batch_size=64, seed=SEED + 1)  # of another run in this process
    blocks = [batches.ROWS_AT_ONCE * block for block in range(4)]
    assert asked == [(seed, first) for first in blocks for seed in (SEED, SEED + 1)]
    assert batches._starts.cache_info().currsize == 4  # of the 8 blocks used: a long run keeps few


def test_a_long_run_keeps_few_tables_of_windows():
    batches._table.cache_clear()
    batch(sequence(), 0, order='table')  # a block of rows, of hundreds of epochs
    assert batches._table.cache_info().currsize == 4


@pytest.mark.parametrize('n_tokens', [2 * T, 2 * T + 1, 3 * T - 1, 3 * T, 10 * T + 3])
def test_windows_stay_inside_at_every_length(n_tokens):
    n = (n_tokens - T) // T
    targets = [batch(sequence(n_tokens), step, batch_size=n)['targets'] for step in range(200)]
    assert np.min(targets) == 1  # every offset is drawn, from the first ..
    assert np.max(targets) == n * T + T - 1  # .. to the last, which still has its target
    assert np.max(targets) < n_tokens


def test_a_row_does_not_depend_on_the_rows_asked_for():
    for step in (0, 2, 7):
        whole = batch(sequence(), step)
        for cuts in ([0, 5], [0, 1, 4, 5], range(6)):
            parts = [
                batch(sequence(), step, lo=lo, hi=hi)
                for lo, hi in zip(cuts, list(cuts)[1:], strict=False)
            ]
            for key, value in whole.items():
                assert np.array_equal(np.concatenate([part[key] for part in parts]), value)


def test_too_short_text():
    batch(sequence(2 * T), 0)
    with pytest.raises(
        UserError, match=r'15 tokens, too few for train.seq_len = 8, which needs 16: .*shorter'
    ):
        batch(sequence(2 * T - 1), 0)


@pytest.mark.parametrize('n_tokens', [0, 1, T, T + 1, 2 * T, 2 * T + 1, N])
def test_a_window_source_has_each_whole_window_once(n_tokens):
    source = WindowSource(sequence(n_tokens, (1, 20) if n_tokens == N else ()), T)
    elements = list(source)
    assert len(source) == len(elements) == max(n_tokens - 1, 0) // T
    for w, element in enumerate(elements):
        assert element['inputs'].tolist() == list(range(w * T, w * T + T))
        assert element['targets'].tolist() == list(range(w * T + 1, w * T + T + 1))
        assert element['inputs'].dtype == element['targets'].dtype == np.int32
        assert np.array_equal(source[np.int64(w)]['inputs'], element['inputs'])
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(UsageError, match='seq_len = 0: expected at least 1'):
        WindowSource(source.tokens, 0)
    assert repr(source) == f'WindowSource({n_tokens} tokens, seq_len=8)'


def test_grain_reads_a_folder_as_the_page_says(tmp_path, monkeypatch, capsys):
    grain = pytest.importorskip('grain')
    text = ''.join(np.random.default_rng(0).choice(list('abcdefgh '), 3000))
    (tmp_path / 'book.txt').write_text(text)
    folder = tmp_path / 'prepared/books'
    prepare(
        [str(tmp_path / 'book.txt')],
        str(folder),
        tokenizer_name='char',
        val_fraction=0.1,
        shard_tokens=500,
    )
    windows = WindowSource(open_shards(folder).train, 64)
    assert isinstance(windows, grain.sources.RandomAccessDataSource)
    page = (Path(__file__).parents[1] / 'docs/library.md').read_text('utf-8')
    (program,) = [b for b in re.findall(r'```python\n(.*?)```', page, re.S) if 'grain' in b]
    (tmp_path / 'program.py').write_text(program)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = runpy.run_path('program.py')
    assert capsys.readouterr().out == '(8, 64) (8, 64)\n' * (len(windows) // 8)
    assert len(windows) // 8 == 5
    # The element of a shuffled dataset is a window, and each comes once.
    shuffled = grain.MapDataset.source(names['windows']).shuffle(seed=0)
    starts = [shuffled[i]['inputs'] for i in range(len(shuffled))]
    assert sorted(x.tobytes() for x in starts) == sorted(x['inputs'].tobytes() for x in windows)
    # Its worker processes receive a copy of the source.
    (copy,) = multiprocessing.reduction.ForkingPickler.loads(
        multiprocessing.reduction.ForkingPickler.dumps((windows,))
    )
    assert np.array_equal(copy[7]['targets'], windows[7]['targets'])


@pytest.mark.parametrize(
    'n_tokens', [2, 3, T, T + 1, T + 2, B * T, B * T + 1, B * T + 2, 3 * B * T + 1, N]
)
@pytest.mark.parametrize('cuts', [(), (1, 2)])
def test_evaluation_covers_each_target_once(n_tokens, cuts):
    seen = []
    for got in eval_batches(sequence(n_tokens, cuts), batch_size=B, seq_len=T):
        assert all(value.shape == (B, T) for value in got.values())
        assert (got['inputs'].dtype, got['targets'].dtype, got['mask'].dtype) == (
            np.int32,
            np.int32,
            np.float32,
        )
        used = got['mask'] == 1
        assert np.all(used | (got['mask'] == 0))
        assert used.any()
        assert np.array_equal(got['targets'][used], got['inputs'][used] + 1)
        for inputs, mask in zip(got['inputs'], used, strict=True):
            start = inputs[0]  # windows begin at multiples of T, with nothing before them
            assert not mask.any() or (
                start % T == 0 and np.array_equal(inputs[mask], start + np.arange(mask.sum()))
            )
        seen += got['targets'][used].tolist()
    assert seen == list(range(1, n_tokens))


@pytest.mark.parametrize(
    'n_tokens', [2, T, T + 1, T + 2, T + 3, T + 4, B * T + 1, 3 * B * T + 2, N]
)
@pytest.mark.parametrize('stride', [1, 3, T - 1, T])
def test_a_stride_covers_each_target_once(n_tokens, stride):
    seen = []
    for got in eval_batches(sequence(n_tokens, (1, 2)), batch_size=B, seq_len=T, stride=stride):
        for inputs, targets, mask in zip(
            got['inputs'], got['targets'], got['mask'] == 1, strict=True
        ):
            counted = targets[mask]
            assert np.array_equal(counted, inputs[mask] + 1)
            if mask.any():
                start, end = inputs[0], counted[-1]
                assert start % stride == 0
                assert np.array_equal(inputs[: end - start], np.arange(start, end))
                assert mask.sum() == min(end, T if start == 0 else end - start - (T - stride))
            seen += counted.tolist()
    assert seen == list(range(1, n_tokens))


@pytest.mark.parametrize('n_tokens', [0, 1])
def test_nothing_to_evaluate(n_tokens):
    with pytest.raises(UserError, match=f'at least 2 tokens, and there are {n_tokens}:'):
        next(eval_batches(sequence(n_tokens), batch_size=B, seq_len=T))


def alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


@pytest.mark.parametrize(('start', 'stop'), [(0, 9), (4, 9), (0, 1), (3, 3)])
def test_prefetch_equals_a_plain_loop(start, stop):
    made = []
    assert list(prefetch(lambda step: made.append(step) or step * 10, start, stop)) == [
        step * 10 for step in range(start, stop)
    ]
    assert made == list(range(start, stop))
    assert not alive()


def test_prefetch_works_ahead_but_not_far():
    made = []
    batches = prefetch(
        lambda step: made.append(step) or threading.current_thread().name, 0, 100, depth=2
    )
    assert next(batches).startswith('prefetch')
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2]  # the current batch and two ahead
    batches.close()
    assert not alive()
    assert len(made) == 3


def test_prefetch_raises_in_its_place():
    def make(step):
        if step == 3:
            raise UserError('step 3 is damaged')
        return step

    got = []
    with pytest.raises(UserError, match='step 3'):
        for step in prefetch(make, 0, 10):
            got.append(step)
    assert got == [0, 1, 2]
    assert not alive()


def test_prefetch_cancels_batches_that_are_not_begun():
    made, begun, go_on = [], threading.Event(), threading.Event()

    def make(step):
        made.append(step)
        if step == 1:
            begun.set()
            go_on.wait(5)

    batches = prefetch(make, 0, 100, depth=9)
    next(batches)
    assert begun.wait(5)
    threading.Timer(0.05, go_on.set).start()
    batches.close()  # waits for step 1, which has begun, and for no other step
    assert made == [0, 1]
    assert not alive()


def test_prefetch_ends_with_its_consumer():
    for step in prefetch(lambda step: step, 0, 10**6):
        if step == 5:
            break
    assert not alive()
