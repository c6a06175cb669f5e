"""Curvature of the loss: Hessian-vector products, and the ends of the Hessian's spectrum.

H is the matrix of second derivatives of the mean loss of a text in all parameters. It has as many
rows as the model has parameters, so it is never built: a product H v costs about three gradients
(Pearlmutter 1994, "Fast exact multiplication by the Hessian"), and Lanczos' method finds the ends
of its spectrum from a few of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gpt2_jax.errors import UserError
from gpt2_jax.lens.activations import mean_loss
from gpt2_jax.lens.subject import as_subject, as_tokens, check_whole, leaf_shapes, run
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel.devices import allow_transfers


@functools.lru_cache(maxsize=16)
def _product(cfg) -> Callable:
    """The compiled function (params, tokens_BT, v_P, start, stop) -> H v, forward over reverse.

    Vectors are flat, with the leaves of the parameters one after the other. Entries of v outside
    start .. stop count as 0, and so do entries of H v.
    """

    def product(params, tokens_BT, v_P, start, stop):
        flat_P, unravel = ravel_pytree(params)
        inside_P = (jnp.arange(flat_P.size) >= start) & (jnp.arange(flat_P.size) < stop)
        tangent = unravel(jnp.where(inside_P, v_P, 0).astype(flat_P.dtype))

        def gradient(params):
            return jax.grad(lambda p: mean_loss(run(cfg, p, tokens_BT), tokens_BT))(params)

        product_P, _ = ravel_pytree(jax.jvp(gradient, (params,), (tangent,))[1])
        return jnp.where(inside_P, product_P, 0)

    return jax.jit(product)


@allow_transfers
def hessian_vector(source, text, vector):
    """H v for a tree `vector` of the shapes of the parameters; a tree of the same shapes, numpy.

    Raises UserError if the shapes differ, else as `capture`.
    """
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)
    given, expected = leaf_shapes(vector), leaf_shapes(subject.params)
    for name in expected | given:
        if given.get(name) != expected.get(name):
            raise UserError(
                f'the vector must have the leaves and the shapes of the parameters: {name} is '
                f'{given.get(name, "missing")}, expected {expected.get(name, "no such leaf")}'
            )
    v_P, unravel = ravel_pytree(jax.tree.map(jnp.float32, vector))
    product_P = _product(subject.cfg)(subject.params, tokens_BT, v_P, 0, v_P.size)
    return jax.tree.map(np.array, unravel(product_P))


class Curvature(NamedTuple):
    """The largest and the smallest eigenvalue of a symmetric matrix, and the products it took."""

    top: float
    bottom: float
    products: int


@allow_transfers
def curvature(
    source,
    text,
    *,
    by_layer: bool = True,
    most: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, Curvature]:
    """The ends of the Hessian's spectrum on a text: {'all': .., 'wte': .., 'h_0': .., 'ln_f': ..}.

    'all' is the whole Hessian; the others, left out unless `by_layer`, are its diagonal blocks: the
    second derivatives in the parameters of one layer alone. Lanczos' method from a random start,
    until both ends move by less than `tolerance` of the larger one twice in a row, and at most
    `most` products each. Raises as `capture`.
    """
    check_whole('most', most, 1)
    check_whole('seed', seed, 0)
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)
    product = functools.partial(_product(subject.cfg), subject.params, tokens_BT)
    ranges = group_ranges(subject.params)
    size = ranges['all'][1]
    random_P, found = np.random.default_rng(seed).standard_normal(size, np.float32), {}
    for group, (start, stop) in ranges.items():
        if by_layer or group == 'all':
            start_P = np.zeros_like(random_P)
            start_P[start:stop] = random_P[start:stop]
            group_product = functools.partial(product, start=start, stop=stop)
            found[group] = lanczos(group_product, start_P, most, tolerance)
    return found


def group_ranges(params) -> dict[str, tuple[int, int]]:
    """Where each top-level part of the parameters lies in the flat vector: {'h_0': (0, 9), ..}."""
    ranges, end = {'all': (0, count_params(params))}, 0
    for name in sorted(params):  # the order in which JAX flattens a dict
        ranges[name] = end, end + count_params(params[name])
        end = ranges[name][1]
    return ranges


@jax.jit
def _dot(a_P, b_P):
    return jnp.vdot(a_P, b_P, precision='highest')


@jax.jit
def _orthogonal(w_P, alpha, v_P, beta, before_P):
    """What is left of w without its parts along the last two vectors, and its norm."""
    w_P = w_P - alpha * v_P - beta * before_P
    # Scaled, so that the squares neither overflow nor vanish.
    largest = jnp.maximum(jnp.abs(w_P).max(), jnp.finfo(w_P.dtype).tiny)
    return w_P, largest * jnp.linalg.norm(w_P / largest)


def lanczos(product: Callable, start_P, most: int, tolerance: float) -> Curvature:
    """The ends of the spectrum of a symmetric operator from at most `most` products.

    Lanczos 1950. Three vectors are kept, and none is orthogonalised against older ones: rounding
    then repeats eigenvalues that were found already, and leaves the ends of the spectrum as they
    are. Both ends are nan if a product is not finite.
    """
    start_P = start_P / np.abs(start_P).max()
    v_P = jnp.asarray(start_P / np.linalg.norm(start_P))
    before_P, beta = jnp.zeros_like(v_P), 0.0
    alphas, betas, ends = [], [], []
    while True:
        w_P = product(v_P)
        alphas.append(float(_dot(v_P, w_P)))
        if not np.isfinite(alphas[-1]):
            return Curvature(np.nan, np.nan, len(alphas))
        ritz = np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        ends.append((ritz[0], ritz[-1]))
        w_P, norm = _orthogonal(w_P, alphas[-1], v_P, beta, before_P)
        beta = float(norm)
        radius = np.abs(ritz).max()
        settled = len(ends) >= 3 and np.ptp(ends[-3:], axis=0).max() <= tolerance * radius
        if settled or beta <= 1e-6 * radius or len(alphas) == most:
            return Curvature(float(ritz[-1]), float(ritz[0]), len(alphas))
        betas.append(beta)
        before_P, v_P = v_P, w_P / beta
