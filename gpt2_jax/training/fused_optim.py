"""AdamW by fused GPU kernels: several leaves at once, on each device its own shards.

The equations are in optim.py, and the kernels in kernels/adamw.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.kernels.adamw import MAX_LEAVES, adamw, join, squares
from gpt2_jax.parallel import collectives
from gpt2_jax.training.optim import (
    DECAYED,
    AdamW,
    DirectOptimizer,
    bias_correction,
    clip_factor,
    round_kernels,
)
from gpt2_jax.training.optim import make_optimizer as make_optax

BLOCK_MATRICES = 4  # leaves in one call of the kernels: a block has four matrices


def make_optimizer(
    settings: AdamW, round_to: str | None = None, mesh: Mesh | None = None
) -> DirectOptimizer:
    """optim.make_optimizer's update, by kernels that read and write each leaf once.

    XLA computes updates, moments and norms in several passes, and copies leaves that one pass reads
    and another overwrites: the copies alone take 1.3 of 28 ms a step (124M, H100).

    The state is optax's state, so a checkpoint does not depend on the kernels that made it. If
    `round_to` is given, the update also returns the leaves 'kernel' in this dtype. On a mesh each
    device updates its own shards.
    """
    update_shards = functools.partial(_update_shards, settings, round_to)

    def update(grads, state, params):
        if mesh is None or mesh.size == 1:
            weights = [1.0] * len(jax.tree.leaves(params))
            return update_shards(weights, lambda x: x, grads, state, params)
        rounded = round_kernels(params, round_to) if round_to else None
        spec, state_spec, rounded_spec = (
            collectives.specs(mesh, tree) for tree in (params, state, rounded)
        )
        weights = [
            1 / collectives.copies(mesh, leaf_spec)
            for leaf_spec in jax.tree.leaves(spec, is_leaf=lambda leaf: isinstance(leaf, P))
        ]
        total = functools.partial(jax.lax.psum, axis_name=mesh.axis_names)
        return jax.shard_map(
            functools.partial(update_shards, weights, total),
            mesh=mesh,
            in_specs=(spec, state_spec, spec),
            out_specs=(spec, state_spec, rounded_spec, P()),
            check_vma=False,
        )(grads, state, params)

    return DirectOptimizer(make_optax(settings).init, update, round_to)


def _update_shards(
    settings: AdamW,
    round_to: str | None,
    weights: list[float],
    total: Callable,
    grads,
    state: optax.OptState,
    params,
):
    """The update of one device's shards, as DirectOptimizer returns it.

    `weights` has a number for each leaf, so that sums count a shard once, however many devices hold
    it. `total` sums over the devices.
    """
    schedule, beta1, beta2, eps, weight_decay, clip_norm = settings
    # Two counters: the schedule's is set back when another run is continued.
    adam, at = (
        optax.tree.get(state, name) for name in ('ScaleByAdamState', 'ScaleByScheduleState')
    )
    groups = leaf_groups(params, weights)
    grads = [
        leaves if group.kind else [join(leaves)]
        for group, leaves in zip(groups, grouped(grads, groups), strict=True)
    ]
    grad_norm = jnp.sqrt(weighted_sum([squares(leaves) for leaves in grads], groups, total))
    count = adam.count + 1
    scalars = {
        'learning_rate': schedule(at.count),
        'factor': clip_factor(grad_norm, clip_norm) if clip_norm else 1.0,
        'correct1': 1 / bias_correction(beta1, count),
        'correct2': 1 / bias_correction(beta2, count),
    }
    scalars_4 = jnp.stack([jnp.float32(x) for x in scalars.values()])
    updated = []  # for each group (m, v, params, rounded, sums of squares)
    others = (grouped(tree, groups) for tree in (adam.mu, adam.nu, params))
    for group, *leaves in zip(groups, grads, *others, strict=True):
        updated.append(
            adamw(
                *leaves,
                scalars_4,
                rates=(beta1, beta2, eps, weight_decay if group.kind else 0.0),
                joined=not group.kind,
                dtype=round_to if group.kind == 'kernel' else None,
            )
        )
    *columns, sums = zip(*updated, strict=True)
    m, v, params, rounded = (ungrouped(column, groups, params) for column in columns)
    update_norm, param_norm = jnp.sqrt(weighted_sum(sums, groups, total))
    state = optax.tree.set(
        state,
        ScaleByAdamState=optax.ScaleByAdamState(count, m, v),
        ScaleByScheduleState=optax.ScaleByScheduleState(at.count + 1),
    )
    norms = {'grad_norm': grad_norm, 'update_norm': update_norm, 'param_norm': param_norm}
    return params, state, rounded if round_to else None, norms


class Group(NamedTuple):
    """Leaves, by number, that the optimizer's kernels take together.

    `kind` is 'kernel', 'embedding', or '' for vectors. `weight` is the factor of their sums
    of squares.
    """

    kind: str
    weight: float
    leaves: list[int]


def leaf_groups(params, weights: list[float]) -> list[Group]:
    """All leaves of the parameters in groups of one kind and weight."""
    together: dict[tuple[str, float], list[int]] = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = path[-1].key
        together.setdefault((name if name in DECAYED else '', weights[i]), []).append(i)
    groups = []
    for (kind, weight), leaves in together.items():
        size = BLOCK_MATRICES if kind else MAX_LEAVES
        parts = [leaves[start : start + size] for start in range(0, len(leaves), size)]
        groups += [Group(kind, weight, part) for part in parts]
    return groups


def grouped(tree, groups: list[Group]) -> list[list[jax.Array]]:
    """The leaves of each group."""
    leaves = jax.tree.leaves(tree)
    return [[leaves[i] for i in group.leaves] for group in groups]


def ungrouped(leaves_of_groups, groups: list[Group], like):
    """The inverse of `grouped`; `like` gives the structure. None for a group without leaves."""
    structure = jax.tree.structure(like)
    leaves = [None] * structure.num_leaves
    for group, its_leaves in zip(groups, leaves_of_groups, strict=True):
        for i, leaf in zip(group.leaves, its_leaves, strict=False):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def weighted_sum(sums: list[jax.Array], groups: list[Group], total: Callable):
    """The sum over all groups and devices: a group's sums, (.., programs), times its weight."""
    # Without the barrier XLA would sum in the kernel that joins: 47 us instead of 6.
    weighted = [sum_ * group.weight for group, sum_ in zip(groups, sums, strict=True)]
    return total(jax.lax.optimization_barrier(jnp.concatenate(weighted, -1)).sum(-1))
