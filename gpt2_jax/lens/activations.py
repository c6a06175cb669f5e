"""Activations and their gradients, by name, on any text: the model that trains, not a copy.

    capture('runs/quickstart', 'ROMEO:', 'h_*.pattern')      {'h_0.pattern': (1, H, 6, 6), ..}
    gradients('runs/quickstart', 'ROMEO:', 'h_*.resid_pre')  the same names: d loss / d activation

Addresses are those of sites.py, texts and models those of subject.py. Arrays have the batch first,
are numpy, and are fp32; what the model computes in bf16 is widened, which is exact.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.lens.sites import Site, as_patterns, expand, names_of
from gpt2_jax.lens.subject import (
    as_numpy,
    as_subject,
    as_tokens,
    call_traced,
    next_token_losses,
    run,
)
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.parallel.partition import named_leaves


@functools.lru_cache(maxsize=64)
def capturing(cfg, names: tuple[str, ...]) -> Callable:
    """The compiled function (params, tokens_BT) -> {name: activation}."""

    def captured(params, tokens_BT):
        taken = {}

        def take(name, x):
            if name in names:
                taken[name] = x
            return x

        run(cfg, params, tokens_BT, take)
        return taken

    return jax.jit(captured)


@allow_transfers
def capture(source, text, names: str | Iterable[str] = '*') -> dict[str, np.ndarray]:
    """The activations at the addresses that `names` matches, in the order of the forward pass.

    {address: array}, with the shapes of sites.AXES; an address with a unit, or with one position,
    lacks that axis. Looking changes nothing: the logits are the model's, bit for bit. Raises
    UserError for a text or a model that cannot be used, UsageError for an address that names
    nothing.
    """
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text)
    sites = expand(subject.cfg, names, tokens_BT.shape[1])
    names, whole = set(names_of(sites)), {}
    # XLA fuses less if it has to keep more, and rounds differently: the logits come from a program
    # that keeps nothing else, so that they are the model's to the last bit.
    for together in (names & {'logits'}, names - {'logits'}):
        whole |= capturing(subject.cfg, tuple(sorted(together)))(subject.params, tokens_BT)
    return parts_of(sites, whole)


def parts_of(sites: list[Site], whole) -> dict[str, np.ndarray]:
    """{address: the part that the site addresses}, of {name: activation}."""
    whole = {name: as_numpy(x) for name, x in whole.items()}
    return {site.address: whole[site.name][site.index()] for site in sites}


@functools.lru_cache(maxsize=64)
def _differentiating(cfg, names: tuple[str, ...], loss: Callable, with_params: bool) -> Callable:
    """The compiled function (params, tokens_BT) -> ({name: gradient}, those of the parameters)."""

    def perturbed_loss(added, params, tokens_BT):
        def add(name, x):
            return x + added[name] if name in added else x

        value = call_traced('loss', loss, run(cfg, params, tokens_BT, add), tokens_BT)
        is_array = isinstance(value, jax.Array)
        if not is_array or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            found = jax.typeof(value) if is_array else type(value).__name__
            raise UsageError(f'loss gives {found}: expected one real number of JAX, such as a mean')
        return value

    def differentiate(params, tokens_BT):
        # Adding 0 to an activation changes nothing, and the gradient of what is added is its own.
        shapes = jax.eval_shape(capturing(cfg, names), params, tokens_BT)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        if with_params:
            return jax.grad(perturbed_loss, (0, 1))(zeros, params, tokens_BT)
        return jax.grad(perturbed_loss)(zeros, params, tokens_BT), None

    return jax.jit(differentiate)


def mean_loss(logits_BTV, tokens_BT):
    """The mean loss of all next tokens of the text, in nats: what training descends."""
    return next_token_losses(logits_BTV, tokens_BT).mean()


@functools.lru_cache(maxsize=1024)
def loss_at(position: int) -> Callable:
    """The loss of the token after `position`, summed over the batch: a function as `mean_loss`."""
    return lambda logits_BTV, tokens_BT: next_token_losses(logits_BTV, tokens_BT)[:, position].sum()


@allow_transfers
def gradients(
    source,
    text,
    names: str | Iterable[str] = '*',
    *,
    at: int | None = None,
    loss: Callable = mean_loss,
) -> dict[str, np.ndarray]:
    """The gradient of a loss with respect to each named activation: shapes as in `capture`.

    The loss is the mean over all next tokens, or, with `at`, the loss of the prediction that the
    model makes at that position; or any `loss(logits_BTV, tokens_BT)` -> scalar that JAX can
    differentiate. A name with a slash is a parameter: 'h_*/attn/c_attn/kernel', '*/*' for all of
    them. A masked score has gradient 0. Raises as `capture`.
    """
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)
    T = tokens_BT.shape[1]
    if at is not None:
        if loss is not mean_loss:
            raise UsageError('at and loss are both given, and at names a loss: give one')
        if not isinstance(at, int | np.integer) or not -T <= at < T or at % T == T - 1:
            raise UsageError(
                f'at = {at}: the text has {T} tokens, and a loss at positions 0 to {T - 2}; '
                'no token follows the last one'
            )
        loss = loss_at(at % T)
    patterns = as_patterns(names)
    sites = expand(subject.cfg, [name for name in patterns if '/' not in name], T)
    leaves = _expand_params(subject.params, [name for name in patterns if '/' in name])
    function = _differentiating(subject.cfg, names_of(sites), loss, bool(leaves))
    of_names, of_params = function(subject.params, tokens_BT)
    taken = parts_of(sites, of_names)
    if leaves:
        named = named_leaves(of_params)
        taken |= {name: as_numpy(named[name]) for name in leaves}
    return taken


def _expand_params(params, patterns: list[str]) -> list[str]:
    """The parameters that the patterns match. Raises UsageError for a pattern without a match."""
    names = list(named_leaves(params))
    found = []
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UsageError(
                f'no parameter is called {pattern!r}: this model has {", ".join(names[:6])}, ..'
            )
        found += [name for name in matched if name not in found]
    return found
