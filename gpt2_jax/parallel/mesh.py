"""The mesh of devices, data x fsdp x tensor, and how a batch lies on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.errors import UsageError


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """The first data x fsdp x tensor devices as a mesh. Raises UsageError if there are fewer."""
    needed, devices = data * fsdp * tensor, jax.devices()
    if needed > len(devices):
        raise UsageError(
            f'mesh.data x mesh.fsdp x mesh.tensor = {needed} devices, but JAX sees {len(devices)} '
            f'{devices[0].platform}; on a CPU, JAX_NUM_CPU_DEVICES={needed} in the environment '
            'simulates them'
        )
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


def put_batch(mesh: Mesh, batch):
    """A batch of numpy rows as global arrays."""
    return jax.device_put(batch, batch_sharding(mesh))
