"""Why an update went wrong: it is computed again with every activation and gradient in view.

The places of an update, in the order of its arithmetic: the parameters it starts from, the
activations of the forward pass (as in lens/sites.py), their gradients from the last to the first,
the gradients of the parameters, and the parameters after it. `examine` finds the first of them that
holds a value that is not finite, with its layer, head, position and source text.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.origins import Origin
from gpt2_jax.diagnostics.replay import Replay, complete_records, floats, micro_batches
from gpt2_jax.errors import UserError
from gpt2_jax.lens.sites import all_names, axes_of, axis_size
from gpt2_jax.lens.subject import leaf_shapes
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.ops import FAST

UPDATES_BEFORE = 20  # whose metrics lead up to the one that is examined
PASSAGE = 16  # targets of the passage that costs most


class Summary(NamedTuple):
    """An array in a few numbers: rms and largest size of its finite elements, and the others.

    `n_bad` elements are not finite; the first of them has the index `at` in the flat array and the
    value `value`. Without one, they are 0 and the first element.
    """

    shape: tuple[int, ...]
    rms: float
    largest: float
    n_bad: int
    at: int
    value: float


class Culprit(NamedTuple):
    """The first value of an update that is not finite.

    `phase` is 'parameter before', 'activation', 'gradient of activation', 'gradient of parameter'
    or 'parameter after'; `name` an activation or a parameter array, in which `n_bad` of `size`
    values are not finite. row, head and position are None if the array has no such axis, and origin
    if the value belongs to no token.
    """

    phase: str
    name: str
    value: float
    n_bad: int
    size: int
    row: int | None = None
    head: int | None = None
    position: int | None = None
    origin: Origin | None = None


class Passage(NamedTuple):
    """The targets of a row that cost most together: from `start` on, and where they stand."""

    row: int
    start: int
    stop: int
    loss: float
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Autopsy:
    """What `examine` found out about update `step`; B rows of T tokens, losses in nats.

    `metrics` are those of this update. `before` has those of earlier updates, with their steps: of
    up to UPDATES_BEFORE recorded updates, and then of up to UPDATES_BEFORE replayed ones.
    `activations` and `gradients` are summaries by name, in the order of the forward pass, of the
    micro-batch with the culprit, or of the last micro-batch. `parameters` are (before, gradient,
    after) by name. tokens_BT1 are the inputs and the last target.
    """

    step: int
    checkpoint: int
    culprit: Culprit | None
    passage: Passage | None
    metrics: dict[str, float]
    before: list[dict[str, float]]
    activations: dict[str, Summary]
    gradients: dict[str, Summary]
    parameters: dict[str, tuple[Summary, Summary, Summary]]
    tokens_BT1: np.ndarray
    origins: list[Origin]
    losses_BT: np.ndarray


def examine(replay: Replay, step: int) -> Autopsy:
    """Computes update `step` of a run again, and looks at everything in it.

    Raises UserError for a step that the run does not plan.
    """
    planned = replay.run.config.train.steps
    if not 1 <= step <= planned:
        raise UserError(f'{replay.run.folder} plans {planned:,} updates, and none is {step}')
    first = max(replay.nearest(step - 1) + 1, step - UPDATES_BEFORE)
    checkpoint, state = replay.state_before(first)
    records = complete_records(replay.run.folder)
    before = [
        {'step': earlier, **metrics} for earlier, metrics in records.items() if earlier < first
    ][-UPDATES_BEFORE:]
    for earlier in range(first, step):
        state, metrics = replay.update(earlier, state)
        before.append({'step': earlier, **floats(metrics)})
    setup, batch = replay.setup(step), replay.batch(step)
    params = jax.tree.map(jnp.copy, state.params)
    n = setup.config.train.grad_accum_steps
    losses_BT = replay.losses(step, params)
    gradient = replay.gradient(step, params)
    state, metrics = replay.update(step, state)
    trees = [_summaries(tree) for tree in (params, gradient, state.params)]
    parameters = {name: tuple(tree[name] for tree in trees) for name in trees[0]}

    look = looking(dataclasses.replace(setup.model.cfg, remat='none', attention='xla'))
    culprit = _bad_parameter(parameters, 'parameter before', 0)
    for m, (part, key) in enumerate(micro_batches(batch, replay.dropout_key(step), n)):
        activations, gradients = (
            _in_order(found, setup.model.cfg, part['inputs'].shape)
            for found in jax.device_get(look(params, part, key))
        )
        backward = dict(reversed(gradients.items()))
        found = _bad_activation(activations, 'activation')
        found = found or _bad_activation(backward, 'gradient of activation')
        if found:
            # Micro-batch m has rows m, m + n, .. of the batch.
            row = None if found.row is None else found.row * n + m
            culprit = culprit or found._replace(row=row)
            break
    culprit = culprit or _bad_parameter(parameters, 'gradient of parameter', 1)
    culprit = culprit or _bad_parameter(parameters, 'parameter after', 2)
    starts_B = ledger.row_starts(replay.run.addressing, step)
    if culprit and culprit.row is not None and culprit.position is not None:
        at = int(starts_B[culprit.row]) + culprit.position
        culprit = culprit._replace(origin=replay.run.where(at))
    return Autopsy(
        step=step,
        checkpoint=checkpoint,
        culprit=culprit,
        passage=_worst_passage(replay.run, starts_B, losses_BT),
        metrics=floats(metrics),
        before=before,
        activations=activations,
        gradients=gradients,
        parameters=parameters,
        tokens_BT1=np.concatenate([batch['inputs'], batch['targets'][:, -1:]], 1),
        origins=[replay.run.where(int(start)) for start in starts_B],
        losses_BT=losses_BT,
    )


@functools.lru_cache(maxsize=4)
def looking(cfg):
    """The compiled function (params, batch, dropout_key) -> summaries of activations, of gradients.

    Both by name. The loss is the sum over the targets of the batch.
    """

    def look(params, batch, key):
        taken = {}

        def loss(added):
            def tap(name, x):
                taken[name] = x if added is None else x + added[name]
                return taken[name]

            model = GPT2(cfg, FAST._replace(tap=tap))
            logits_BTV = model.apply({'params': params}, batch['inputs'], key)
            return token_losses(logits_BTV, batch['targets']).sum(), dict(taken)

        # Adding 0 to an activation changes nothing, and the gradient of what is added is its own.
        _, shapes = jax.eval_shape(loss, None)
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        gradients, activations = jax.grad(loss, has_aux=True)(zeros)
        # A masked score is -inf, as it has to be.
        activations = {
            name: jnp.where(x == -jnp.inf, 0, x) if name.endswith('attn_scores') else x
            for name, x in activations.items()
        }
        return [{name: summarise(x) for name, x in xs.items()} for xs in (activations, gradients)]

    return jax.jit(look)


def summarise(x) -> tuple:
    """(rms, largest, n_bad, at, value) of an array: see Summary, whose shape it lacks."""
    x = x.astype(jnp.float32).ravel()
    is_bad = ~jnp.isfinite(x)
    good = jnp.where(is_bad, 0, x)
    at = jnp.argmax(is_bad)
    largest = jnp.abs(good).max()
    # Scaled, so that the squares of large values do not overflow.
    scale = jnp.maximum(largest, 1e-30)
    return scale * jnp.sqrt(((good / scale) ** 2).mean()), largest, is_bad.sum(), at, x[at]


def _summaries(tree) -> dict[str, Summary]:
    """The summary of each parameter array."""
    values = jax.device_get([_summarised(leaf) for leaf in jax.tree.leaves(tree)])
    shapes = leaf_shapes(tree).items()
    return {
        name: Summary(shape, *(x.item() for x in value))
        for (name, shape), value in zip(shapes, values, strict=True)
    }


_summarised = jax.jit(summarise)


def _in_order(found: dict[str, tuple], cfg, batch_shape: tuple[int, int]) -> dict[str, Summary]:
    """Summaries of activations in the order of the forward pass, with their shapes."""
    B, T = batch_shape
    summaries = {}
    for name in all_names(cfg):
        shape = tuple(B if axis == 'B' else axis_size(cfg, axis, T) for axis in axes_of(name))
        summaries[name] = Summary(shape, *(x.item() for x in found[name]))
    return summaries


def _bad_activation(summaries: dict[str, Summary], phase: str) -> Culprit | None:
    """The first activation with a value that is not finite, and where the value stands."""
    for name, (shape, _, _, n_bad, at, value) in summaries.items():
        if n_bad:
            place = dict(zip(axes_of(name), map(int, np.unravel_index(at, shape)), strict=True))
            where = {'row': place.get('B'), 'head': place.get('H'), 'position': place.get('T')}
            return Culprit(phase, name, value, n_bad, math.prod(shape), **where)
    return None


def _bad_parameter(parameters, phase: str, which: int) -> Culprit | None:
    """The first parameter array with a value that is not finite, and its head if it has heads."""
    for name, summaries in parameters.items():
        shape, _, _, n_bad, at, value = summaries[which]
        if n_bad:
            place, head = np.unravel_index(at, shape), None
            if '/attn/c_attn/' in name:  # (.., 3, H, K)
                head = int(place[-2])
            elif name.endswith('/attn/c_proj/kernel'):  # (H, K, D)
                head = int(place[0])
            return Culprit(phase, name, value, n_bad, math.prod(shape), head=head)
    return None


def _worst_passage(run: ledger.Run, starts_B: np.ndarray, losses_BT: np.ndarray) -> Passage | None:
    """The PASSAGE targets in a row with the highest mean loss; None if a loss is not finite."""
    if not np.isfinite(losses_BT).all():
        return None
    size = min(PASSAGE, losses_BT.shape[1])
    means = np.lib.stride_tricks.sliding_window_view(losses_BT, size, axis=1).mean(-1)
    row, start = map(int, np.unravel_index(means.argmax(), means.shape))
    # The first target of a row is its second token.
    origin = run.where(int(starts_B[row]) + 1 + start)
    return Passage(row, start, start + size, float(means[row, start]), origin)
