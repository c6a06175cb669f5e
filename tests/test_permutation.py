"""Keyed permutations: each is one, all are equally frequent, and their values never change."""

import itertools
import math

import numpy as np
import pytest

from gpt2_jax.permutation import hash_uint64, make_key, permute, unpermute

LARGE = [4093, 4095, 4096, 4097, 65_537, 99_991]
HUGE = [2**32 - 1, 2**32, 2**32 + 15, 10**11, 2**62]


def whole(n, seed=0, number=0):
    return permute(np.arange(n), make_key(seed, number), n)


def z_score(counts, expected):
    """Pearson's chi-square of the counts, in standard deviations from its mean."""
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize('sizes', [range(1, 130), LARGE], ids=['small', 'large'])
def test_each_is_a_permutation_and_has_its_inverse(sizes):
    for n in sizes:
        y = whole(n, seed=n)
        assert y.dtype == np.int64
        assert np.bincount(y, minlength=n).tolist() == [1] * n
        assert np.array_equal(unpermute(y, make_key(n, 0), n), np.arange(n))


@pytest.mark.parametrize('n', HUGE)
def test_huge_sizes(n):
    x = np.concatenate([np.arange(500), np.arange(n - 500, n), n // 1000 * np.arange(1, 999)])
    y = permute(x, make_key(1, 2), n)
    assert len(set(y.tolist())) == len(x)
    assert y.min() >= 0
    assert y.max() < n
    assert np.array_equal(unpermute(y, make_key(1, 2), n), x)
    # Spread evenly over 0 .. n - 1, however close the inputs.
    assert abs(z_score(np.histogram(y[:500].astype(float), 10, (0, n))[0], 50)) < 4


def test_an_element_needs_no_other():
    keys = make_key(5, np.arange(40))
    table = permute(np.arange(23), keys[:, None], 23)
    for number in (0, 7, 39):
        assert np.array_equal(table[number], whole(23, 5, number))
        assert int(permute(11, keys[number], 23)) == table[number, 11]
    assert np.array_equal(permute(np.full(40, 11), keys, 23), table[:, 11])


@pytest.mark.parametrize('n', [2, 3, 4, 5, 6, 7])
def test_all_permutations_are_equally_frequent(n):
    draws = 60_000
    table = permute(np.arange(n), make_key(0, np.arange(draws))[:, None], n)
    code = n ** np.arange(n)
    possible = np.sort(np.array(list(itertools.permutations(range(n)))) @ code)
    counts = np.bincount(np.searchsorted(possible, table @ code), minlength=len(possible))
    assert counts.sum() == draws
    assert abs(z_score(counts, draws / len(possible))) < 5


@pytest.mark.parametrize('n', [7, 12, 30, 97, 1000])
def test_any_two_elements_go_anywhere(n):
    """Of neighbours and of distant elements, the pairs of images are those of drawn permutations.

    So are the pairs (image in one permutation, image in the next one).
    """
    draws, bins = 20_000, min(n, 12)
    keys = make_key(0, np.arange(draws))
    sizes = np.bincount(np.arange(n) * bins // n) / n
    for a, b in ((0, 1), (n - 2, n - 1), (0, n - 1), (n // 2, n // 3)):
        x, y = permute(a, keys, n), permute(b, keys, n)
        # The image of b lies 1 .. n - 1 beyond the image of a, each as often, wherever that is.
        distance = ((y - x) % n - 1) * (bins - 1) // (n - 1)
        assert (x != y).all()
        expected = np.bincount(np.arange(n - 1) * (bins - 1) // (n - 1)) / (n - 1)
        for other, shares in ((distance, expected), (np.roll(x * bins // n, 1), sizes)):
            counts, *_ = np.histogram2d(
                x * bins // n, other, [np.arange(len(sizes) + 1), np.arange(len(shares) + 1)]
            )
            assert abs(z_score(counts, np.outer(sizes, shares) * draws)) < 5


def test_neighbours_do_not_stay_neighbours():
    """Over large orders: how far apart neighbours land, and runs of consecutive elements."""
    n = 20_000
    for number in range(5):
        y = whole(n, seed=3, number=number)
        gap = np.diff(y)
        assert (abs(gap) == 1).sum() < 12  # 2 are expected
        assert abs(np.corrcoef(y[:-1], y[1:])[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(y, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
        assert (y == np.arange(n)).sum() < 10  # fixed elements: 1 is expected


def test_permutations_of_other_keys_are_independent():
    n = 20_000
    tables = [whole(n, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0), (2**32 - 1, 7))]
    for a, b in itertools.combinations(tables, 2):
        assert (a == b).sum() < 10
        counts, *_ = np.histogram2d(a, b, 20)
        assert abs(z_score(counts, n / 400)) < 5


def test_keys_differ():
    keys = {int(key) for seed in range(50) for key in make_key(seed, np.arange(200))}
    assert len(keys) == 50 * 200


def test_the_values_never_change():
    """A run resumed with another numpy or on another machine must see the same batches."""
    assert int(hash_uint64(np.uint64(0))) == 0
    assert hash_uint64(np.array([1, 2**64 - 1], np.uint64)).tolist() == [
        6238072747940578789,
        13029008266876403067,
    ]
    assert make_key(0, np.arange(2)).tolist() == [12035550249420947055, 12935080325729570654]
    assert whole(11, 3, 0).tolist() == [7, 4, 0, 1, 10, 2, 8, 9, 5, 3, 6]
    large = permute(np.arange(3), make_key(3, 1), 2**40 + 7)
    assert large.tolist() == [697671444070, 143803231341, 34985348999]


def test_the_rule_in_plain_integers():
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    for n, seed, number in [(1, 0, 0), (5, 1, 3), (1000, 7, 0), (2**61 - 1, 2**32 - 1, 10**6)]:
        start = mix((seed + gamma) % 2**64)
        key = mix((start + (number + 1) * gamma) % 2**64)
        a = 2 * -(-(math.isqrt(n - 1) + 1) // 2)
        b = -(-n // a)
        for x in {0, n // 3, n - 1}:
            y = None
            while y is None or y >= n:
                y = x if y is None else y
                left, right = y % a, y // a
                for j in range(0, 24, 2):
                    k, after = (mix((key + i * gamma) % 2**64) for i in (j + 1, j + 2))
                    left = (left + mix((right + k) % 2**64)) % a
                    right = (right + mix((left + after) % 2**64)) % b
                y = left + a * right
            assert int(permute(x, make_key(seed, number), n)) == y
