"""How the parameters and the optimizer state are sharded: one table of path patterns.

The model contains no sharding. The path of an optimizer moment ends in its parameter's path, so the
same table serves the moments.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Path pattern -> mesh axis of each dimension. Tensor parallelism (Shoeybi et al. 2019, Megatron-LM,
# section 3) shards heads, feed-forward columns and the vocabulary; fsdp shards another dimension of
# the same leaf (Rajbhandari et al. 2020, ZeRO, stage 3).
PARTITION_RULES = (
    (r'attn/c_attn/kernel$', P('fsdp', None, 'tensor', None)),
    (r'attn/c_attn/bias$', P(None, 'tensor', None)),
    (r'attn/c_proj/kernel$', P('tensor', None, 'fsdp')),
    (r'mlp/c_fc/kernel$', P('fsdp', 'tensor')),
    (r'mlp/c_fc/bias$', P('tensor')),
    (r'mlp/c_proj/kernel$', P('tensor', 'fsdp')),
    (r'wte/embedding$', P('tensor', 'fsdp')),
    (r'wpe/embedding$', P(None, 'fsdp')),
    (r'', P()),  # biases of the residual stream, LayerNorms, counters: replicated
)


def shardings(mesh: Mesh, tree, drop: str | None = None):
    """The sharding of each leaf in a tree of arrays or shapes, without the mesh axis `drop`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh, drop)), tree
    )


def make_unshard(mesh: Mesh):
    """The function that gathers parameters over 'fsdp' for use; they stay split over 'tensor'.

    Without it XLA splits the activations by feature instead, and moves them at every matrix
    product.
    """
    if mesh.shape['fsdp'] == 1:
        return lambda params: params
    return lambda params: jax.lax.with_sharding_constraint(
        params, shardings(mesh, params, drop='fsdp')
    )


def _spec(path, leaf, mesh: Mesh, drop: str | None) -> P:
    """The rule of one leaf, without `drop` and without axes that do not divide their dimension."""
    name = '/'.join(
        str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path
    )
    rule = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, name))

    def keep(axis: str | None, size: int) -> str | None:
        return axis if axis and axis != drop and size % mesh.shape[axis] == 0 else None

    return P(*(keep(axis, leaf.shape[i]) for i, axis in enumerate(rule)))
