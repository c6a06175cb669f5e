"""Random permutations of 0 .. n - 1 without a table: any element, and its inverse, from a key.

A permutation is a Feistel network on pairs (left, right) with left < a and right < b, where a b is
a little more than n (the generalised network and the cycle walking of Black and Rogaway 2002,
Ciphers with Arbitrary Finite Domains). Each round adds a hash of one half to the other half:

    left  <- (left  + hash(right + k_j)) mod a      rounds 0, 2, ..
    right <- (right + hash(left  + k_j)) mod b      rounds 1, 3, ..

and a result >= n is permuted again until it is below n, which takes about one pass for a large n.
The memory and the time for an element do not depend on n. All arithmetic is on uint64 integers, so
a permutation is the same on every machine and in every version of numpy. It is not a cipher: who
sees some elements may find the key.
"""

import math

import numpy as np

# With 24 rounds all n! permutations are equally frequent for n = 2 .. 8: over 500,000 keys, no
# chi-square test tells them from drawn ones. With 16 rounds it does.
ROUNDS = 24
GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def hash_uint64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit.

    The output function of SplitMix64 (Steele, Lea and Flood 2014; David Stafford's Mix13).
    """
    with np.errstate(over='ignore'):  # numpy warns for scalars: products are meant modulo 2^64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_key(seed: int, number: np.ndarray) -> np.ndarray:
    """The key, uint64, of permutation `number` >= 0 of a seed >= 0; an array of numbers: of each.

    Element `number` of the stream of SplitMix64 that starts at a hash of the seed.
    """
    start = hash_uint64(np.asarray((seed + GAMMA) % 2**64, np.uint64))
    with np.errstate(over='ignore'):
        return hash_uint64(start + (np.asarray(number).astype(np.uint64) + 1) * np.uint64(GAMMA))


def permute(x: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """The elements x, in 0 .. n - 1, of the permutation of `key`: int64, for n up to 2^62.

    x and key broadcast: each element may have its own key.
    """
    return _walk(x, key, n, inverse=False)


def unpermute(y: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """Where the elements y of the permutation are: the x with permute(x, key, n) = y."""
    return _walk(y, key, n, inverse=True)


def _walk(x: np.ndarray, key: np.ndarray, n: int, inverse: bool) -> np.ndarray:
    x, key = np.broadcast_arrays(np.asarray(x).astype(np.uint64), key)
    shape, key = x.shape, key.ravel()
    y = _pass(x.ravel(), key, n, inverse)
    while len(outside := np.flatnonzero(y >= n)):
        y[outside] = _pass(y[outside], key[outside], n, inverse)
    return y.astype(np.int64).reshape(shape)


def _pass(x: np.ndarray, key: np.ndarray, n: int, inverse: bool) -> np.ndarray:
    """The network once, or its inverse: x = left + a right, (N,)."""
    a = math.isqrt(n - 1) + 1
    a += a % 2  # for an even a, odd permutations are as likely as even ones
    sizes = np.uint64(a), np.uint64(-(-n // a))
    halves = [x % sizes[0], x // sizes[0]]
    for j in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        side, size = j % 2, sizes[j % 2]
        round_key = hash_uint64(key + np.uint64((j + 1) * GAMMA % 2**64))
        shift = hash_uint64(halves[1 - side] + round_key) % size
        halves[side] = (halves[side] + (size - shift if inverse else shift)) % size
    return halves[0] + sizes[0] * halves[1]
