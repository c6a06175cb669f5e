"""Changing activations while the model runs: edit, ablate, patch.

    edit(m, 'ROMEO:', {'h_3.attn.2': 0})                       replace a head's output by 0
    edit(m, 'ROMEO:', {'h_3.mlp_post': lambda x: 0.5 * x})     any function of the activation
    ablate(m, 'ROMEO:', 'h_*.attn.*')                          each head by itself
    patch(m, 'ROMEO:', 'JULIET', 'h_*.resid_pre@-1')           each one taken from another text

Addresses are those of sites.py, texts and models those of subject.py; numpy out, the batch first.
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import foreign
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.lens.activations import capturing, parts_of
from gpt2_jax.lens.sites import Site, axes_of, axis_size, expand, names_of
from gpt2_jax.lens.subject import (
    Subject,
    as_numpy,
    as_subject,
    as_tokens,
    call_traced,
    next_token_losses,
    run,
)
from gpt2_jax.parallel.devices import allow_transfers

ABLATIONS = ('zero', 'mean')


@allow_transfers
def edit(
    source, text, edits: Mapping[str, object], names: str | Iterable[str] = 'logits'
) -> dict[str, np.ndarray]:
    """What `capture(source, text, names)` gives if the model runs with the edits.

    `edits` maps an address to what takes its place: a number or an array, broadcast to the shape
    that the address has; or a function of it that JAX can trace, whose result is broadcast too.
    Edits at one activation apply in the order given, and what comes later in the forward pass sees
    them. A masked score stays masked, so no token sees a later one. Raises UserError if a shape
    does not fit or a value is no real number, else as `capture`.
    """
    if not isinstance(edits, Mapping):
        raise UsageError(
            f'edits is of type {type(edits).__name__}: expected {{address: number, array or '
            "function}, such as {'h_0.attn.0': 0}"
        )
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text)
    T = tokens_BT.shape[1]
    changes = [
        (site, change)
        for address, change in edits.items()
        for site in expand(subject.cfg, address, T)
    ]
    wanted = expand(subject.cfg, names, T)
    kept = names_of(wanted)

    @jax.jit
    def edited(params, tokens_BT):
        taken = {}

        def tap(name, x):
            before = x
            for site, change in changes:
                if site.name == name:
                    x = _with_part(x, site, change)
            x = _masked(name, before, x)
            if name in kept:
                taken[name] = x
            return x

        run(subject.cfg, params, tokens_BT, tap)
        return taken

    return parts_of(wanted, edited(subject.params, tokens_BT))


def _with_part(x, site: Site, change):
    """The activation with the part that the site addresses changed."""
    part = x[site.index()]
    name = f'the edit of {site.address}'
    value = call_traced(name, change, part) if callable(change) else change
    try:
        new = jnp.asarray(value)
    except (TypeError, ValueError):
        new = None
    if new is None or jnp.iscomplexobj(new):
        raise UserError(
            f'{name} is {foreign.show(value)}: expected a number, an array of numbers, or a '
            'function that gives one'
        )
    try:
        new = jnp.broadcast_to(new, part.shape).astype(x.dtype)
    except ValueError:
        raise UserError(f'{name} has the shape {new.shape}: expected {part.shape}') from None
    return new if part.shape == x.shape else x.at[site.index()].set(new)


def _masked(name: str, before, x):
    """The changed activation x; a score that the causal mask hid before the change stays hidden."""
    if x is before or not name.endswith('attn_scores'):
        return x
    return jnp.where(before == -jnp.inf, before, x)


@functools.lru_cache(maxsize=64)
def _replacing(cfg, names: tuple[str, ...], measure: Callable) -> Callable:
    """The compiled function (params, tokens_BT, masks, values) -> measure(logits_BTV, tokens_BT).

    Where a mask is True the value takes the activation's place. The masks choose the site, so one
    compiled function serves all of them.
    """

    def replaced(params, tokens_BT, masks, values):
        def tap(name, x):
            if name not in names:
                return x
            return _masked(name, x, jnp.where(masks[name], values[name].astype(x.dtype), x))

        value = call_traced('measure', measure, run(cfg, params, tokens_BT, tap), tokens_BT)
        if not isinstance(value, jax.Array):
            raise UsageError(f'measure gives {type(value).__name__}: expected one array of JAX')
        return value

    return jax.jit(replaced)


def _sweep(
    subject: Subject, tokens_BT, sites: list[Site], values, measure
) -> dict[str, np.ndarray]:
    """The measure for each site, with that site alone replaced by its part of `values`."""
    cfg, T = subject.cfg, tokens_BT.shape[1]
    function = _replacing(cfg, names_of(sites), measure)

    def mask(axes: str, index=None):
        shape = [1 if axis == 'B' else axis_size(cfg, axis, T) for axis in axes]
        array = np.zeros(shape, bool)
        if index is not None:
            array[index] = True
        return array

    nothing = {site.name: mask(site.axes) for site in sites}
    return {
        site.address: as_numpy(
            function(
                subject.params,
                tokens_BT,
                nothing | {site.name: mask(site.axes, site.index())},
                values,
            )
        )
        for site in sites
    }


@allow_transfers
def ablate(
    source,
    text,
    sites: str | Iterable[str],
    *,
    by: str = 'zero',
    measure: Callable = next_token_losses,
) -> dict[str, np.ndarray]:
    """Each token's loss if one site alone is ablated: {address: (B, T - 1)}, in nats.

    Entry t is the loss of token t + 1, as in `token_losses`. by='zero' replaces the activation by
    0, by='mean' by its mean over the batch and the positions of this text, which keeps its usual
    share. `measure(logits_BTV, tokens_BT)` may put anything else in the place of the losses. Raises
    as `edit`.
    """
    if by not in ABLATIONS:
        raise UsageError(f'by = {by!r}: expected {" or ".join(map(repr, ABLATIONS))}')
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)
    found = expand(subject.cfg, sites, tokens_BT.shape[1])
    values = {}
    for name, x in capturing(subject.cfg, names_of(found))(subject.params, tokens_BT).items():
        axes = tuple(i for i, axis in enumerate(axes_of(name)) if axis in 'BT')
        if by == 'mean':  # of scores: over the queries that see the key
            values[name] = x.mean(axes, keepdims=True, where=x != -jnp.inf)
        else:
            values[name] = jnp.zeros((1,) * x.ndim, x.dtype)
    return _sweep(subject, tokens_BT, found, values, measure)


@allow_transfers
def patch(
    source,
    text,
    donor_text,
    sites: str | Iterable[str],
    *,
    donor=None,
    measure: Callable = next_token_losses,
) -> dict[str, np.ndarray]:
    """Each token's loss if one site alone comes from another run: {address: (B, T - 1)}.

    The activation comes from `donor_text`, which has as many tokens as `text`, or from the model
    `donor` (another checkpoint, say) on that text. `measure` as in `ablate`. Raises UserError if
    the two texts or the two models differ in shape, else as `edit`.
    """
    subject = as_subject(source)
    giver = subject if donor is None else as_subject(donor)
    tokens_BT, donor_BT = as_tokens(subject, text, least=2), as_tokens(giver, donor_text, least=2)
    if tokens_BT.shape != donor_BT.shape:
        raise UserError(
            f'a text of {tokens_BT.shape[1]} tokens cannot be patched from one of '
            f'{donor_BT.shape[1]}: both need the same number of tokens and of rows'
        )
    found = expand(subject.cfg, sites, tokens_BT.shape[1])
    names = names_of(found)
    values = capturing(giver.cfg, names)(giver.params, donor_BT)
    ours = jax.eval_shape(capturing(subject.cfg, names), subject.params, tokens_BT)
    for name in names:
        theirs = values[name].shape if name in values else None
        if theirs != ours[name].shape:
            raise UserError(
                f'{name} of the donor has the shape {theirs}: expected {ours[name].shape}'
            )
    return _sweep(subject, tokens_BT, found, values, measure)
