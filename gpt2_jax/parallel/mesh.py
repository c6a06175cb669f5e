"""The mesh of devices, data x fsdp x tensor, and how a batch lies on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.errors import UsageError


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """The first data x fsdp x tensor devices as a mesh. Raises UsageError if there are fewer.

    A mesh of one device is jax.default_device, if that is one of jax.devices().
    """
    needed, devices = data * fsdp * tensor, jax.devices()
    if needed > len(devices):
        raise UsageError(
            f'mesh.data x mesh.fsdp x mesh.tensor = {needed} devices, but JAX sees {len(devices)} '
            f'{devices[0].platform}; on a CPU, JAX_NUM_CPU_DEVICES={needed} in the environment '
            'simulates them'
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise UsageError(
            f'mesh.data x mesh.fsdp x mesh.tensor = {needed}, but the {jax.process_count()} '
            f'processes have {len(devices)} devices: a run of several processes uses all of them, '
            f'for instance with --config.mesh.data={len(devices)}'
        )
    if needed == 1 and jax.config.jax_default_device in devices:
        devices = [jax.config.jax_default_device]
    shape = (data, fsdp, tensor)
    return Mesh(np.array(devices[:needed]).reshape(shape), ('data', 'fsdp', 'tensor'))


def one_at_a_time(mesh: Mesh, function):
    """`function`, a compiled program; on simulated devices each call ends before it returns.

    Simulated devices share the CPU's threads. With two programs in flight, the collectives of each
    can wait without end for threads that the other program holds. On real devices, and on a single
    device, `function` itself is returned.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != 'cpu':
        return function
    return lambda *args: jax.block_until_ready(function(*args))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch, sharded over 'data' and 'fsdp'."""
    return NamedSharding(mesh, P(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of an array."""
    return NamedSharding(mesh, P())


def own_rows(mesh: Mesh, n_rows: int) -> tuple[int, int]:
    """The range [first, end) of rows that the devices of this process hold, of `n_rows`."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((n_rows,)).values()
    ranges = [rows.indices(n_rows) for (rows,) in indices]
    return min(first for first, _, _ in ranges), max(end for _, end, _ in ranges)


def put_batch(mesh: Mesh, batch, *, first: int = 0, n_rows: int | None = None):
    """A batch as global arrays of `n_rows` rows, from numpy rows `first`, `first` + 1, ..

    By default `batch` is all of it. In a run of several processes, each gives at least its
    `own_rows`.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)

    def put(x):
        shape = (n_rows or len(x), *x.shape[1:])

        def shard(index):
            start, end, _ = index[0].indices(shape[0])
            return x[start - first : end - first]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(put, batch)


def on_one_device(mesh: Mesh, tree):
    """The whole arrays on one device of this process: with several processes, all must call it."""
    if jax.process_count() > 1:
        whole = jax.block_until_ready(jax.jit(_same, out_shardings=replicated(mesh))(tree))
        tree = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
    return jax.device_put(tree, mesh.local_devices[0])


def _same(tree):
    return tree
