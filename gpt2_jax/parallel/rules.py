"""One table that says how each parameter is sharded; no JAX.

The model contains no sharding. The path of an optimizer moment ends in its parameter's path, so the
same table serves the moments.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

# Path pattern -> mesh axis of each dimension. Tensor parallelism (Shoeybi et al. 2019, Megatron-LM,
# section 3) shards heads, feed-forward columns and the vocabulary; fsdp shards another dimension of
# the same leaf (Rajbhandari et al. 2020, ZeRO, stage 3).
PARTITION_RULES = (
    (r'attn/c_attn/kernel$', ('fsdp', None, 'tensor', None)),
    (r'attn/c_attn/bias$', (None, 'tensor', None)),
    (r'attn/c_proj/kernel$', ('tensor', None, 'fsdp')),
    (r'mlp/c_fc/kernel$', ('fsdp', 'tensor')),
    (r'mlp/c_fc/bias$', ('tensor',)),
    (r'mlp/c_proj/kernel$', ('tensor', 'fsdp')),
    (r'wte/embedding$', ('tensor', 'fsdp')),
    (r'wpe/embedding$', (None, 'fsdp')),
    (r'', ()),  # biases of the residual stream, LayerNorms, counters: replicated
)


def rule(name: str) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a leaf, by its path: 'h_0/mlp/c_fc/kernel'."""
    return next(axes for pattern, axes in PARTITION_RULES if re.search(pattern, name))


def axes(
    name: str, shape: tuple[int, ...], mesh: Mapping[str, int], drop: str | None = None
) -> tuple[str | None, ...]:
    """`rule`, without the axis `drop` and without axes that do not divide their dimension.

    `mesh` holds the size of each mesh axis.
    """

    def keep(axis: str | None, size: int) -> str | None:
        return axis if axis and axis != drop and size % mesh[axis] == 0 else None

    return tuple(keep(axis, shape[i]) for i, axis in enumerate(rule(name)))


def local_size(name: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> int:
    """Elements of a leaf that one device holds."""
    return math.prod(shape) // math.prod(mesh[axis] for axis in axes(name, shape, mesh) if axis)


def undivided(
    leaves: Iterable[tuple[str, tuple[int, ...]]], mesh: Mapping[str, int]
) -> Iterator[str]:
    """Yields a line for each (name, shape) with a dimension that its mesh axis does not divide.

    Each device holds that dimension whole. Blocks are named together: h_*. The bytes are those of
    the parameters and their two moments, in fp32.
    """
    found: dict[tuple, int] = {}
    for name, shape in leaves:
        for size, axis in zip(shape, rule(name), strict=False):
            if axis and size % mesh[axis]:
                more = local_size(name, shape, mesh) * (mesh[axis] - 1) / mesh[axis]
                key = re.sub(r'^h_\d+', 'h_*', name), size, axis
                found[key] = found.get(key, 0) + round(12 * more)
    for (name, size, axis), more in found.items():
        yield (
            f'{name}: {size:,} is not a multiple of mesh.{axis} = {mesh[axis]}, so each device '
            f'holds it whole: {more / 2**20:,.1f} MiB more than its share, moments included'
        )
