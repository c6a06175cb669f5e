"""Devices: which one runs, what it can do, and how arrays lie on a mesh of several.

The model knows nothing of this. One table of path patterns says how every leaf is split; optimizer moments end in
their parameter's path, so the same table serves them.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.errors import UsageError


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """The first data x fsdp x tensor devices as a mesh; raises UsageError where there are fewer."""
    need, devices = data * fsdp * tensor, jax.devices()
    if need > len(devices):
        raise UsageError(
            f'mesh.data x mesh.fsdp x mesh.tensor = {need} devices, but JAX sees {len(devices)} '
            f'{devices[0].platform}; on a CPU, JAX_NUM_CPU_DEVICES={need} in the environment '
            'simulates them'
        )
    return Mesh(np.array(devices[:need]).reshape(data, fsdp, tensor), ('data', 'fsdp', 'tensor'))


def one_at_a_time(mesh: Mesh, function):
    """`function`, a compiled one, so that on a mesh of simulated devices each call ends before it returns.

    Simulated devices share the CPU's threads: with two programs in flight, the collectives of one can wait for ever
    for threads that the other holds. Real devices, and a single one, need none of this and are left alone.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != 'cpu':
        return function
    return lambda *args: jax.block_until_ready(function(*args))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch dealt out over 'data' and 'fsdp'."""
    return NamedSharding(mesh, P(('data', 'fsdp')))


def put_batch(mesh: Mesh, batch):
    """A batch of numpy rows as global arrays."""
    return jax.device_put(batch, batch_sharding(mesh))
