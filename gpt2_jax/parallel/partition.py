"""The shardings of the parameters and of the optimizer state, by the table in rules.py."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.parallel import rules


def shardings(mesh: Mesh, tree, drop: str | None = None):
    """The sharding of each leaf in a tree of arrays or shapes, without the mesh axis `drop`.

    It follows the leaf's rule, without axes that do not divide their dimension.
    """

    def sharding(path, leaf):
        return NamedSharding(mesh, P(*rules.axes(leaf_name(path), leaf.shape, mesh.shape, drop)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


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


def one_replica(x):
    """The same array without replicas: on the first of the devices that hold the same part of it.

    All of its devices must belong to this process. Nothing is copied. An array of numpy, as
    scripts/convert.py saves, has no replicas.
    """
    sharding = getattr(x, 'sharding', None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return x
    mesh, spec = sharding.mesh, sharding.spec
    used = {name for axes in spec if axes for name in ([axes] if isinstance(axes, str) else axes)}
    devices = mesh.devices[
        tuple(slice(None) if name in used else slice(1) for name in mesh.axis_names)
    ]
    parts = {part.device: part.data for part in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        x.shape,
        NamedSharding(Mesh(devices, mesh.axis_names), spec),
        [parts[device] for device in devices.flat],
    )


def leaf_name(path) -> str:
    """'h_0/attn/c_attn/kernel', from a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree) -> dict[str, Any]:
    """The leaves of a tree, in order, by name: see `leaf_name`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
