"""Devices: which one runs, what it can do, and how arrays lie on a mesh of several.

The model knows nothing of this. One table of path patterns says how every leaf is split; optimizer moments end in
their parameter's path, so the same table serves them.
"""

import contextlib
import ctypes
import os
import platform
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.files import folders

# Dense bf16 matrix product rates in FLOP/s, from the vendors' data sheets, by how JAX names the device. The
# peak of any other name is unknown, and not guessed from a part of it: an L40 is no L4, an H200 NVL no H200.
PEAK_BF16_FLOPS = {
    'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12,
    'NVIDIA A100 80GB PCIe': 312e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100 80GB HBM3': 989.4e12,
    'NVIDIA H200': 989.4e12, 'NVIDIA L4': 121e12, 'NVIDIA L40S': 362e12,
    'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12,
}

# Path pattern -> mesh axis of each dimension. Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, section 3)
# splits heads, feed-forward columns and the vocabulary; fsdp splits another dimension of the same leaf
# (Rajbhandari et al. 2020, ZeRO, stage 3).
PARTITION_RULES = (
    (r'attn/c_attn/kernel$', P('fsdp', None, 'tensor', None)),
    (r'attn/c_attn/bias$', P(None, 'tensor', None)),
    (r'attn/c_proj/kernel$', P('tensor', None, 'fsdp')),
    (r'mlp/c_fc/kernel$', P('fsdp', 'tensor')),
    (r'mlp/c_fc/bias$', P('tensor')),
    (r'mlp/c_proj/kernel$', P('tensor', 'fsdp')),
    (r'wte/embedding$', P('tensor', 'fsdp')),
    (r'wpe/embedding$', P(None, 'fsdp')),
    (r'', P()),  # biases of the residual stream, LayerNorms, counters: everywhere
)


def select_platform(name: str) -> None:
    """Chooses 'auto', 'cpu', 'gpu' or 'tpu' for this process; call before JAX is used.

    Compiled programs go to the user's cache, one folder a machine: the next start of a run, and a resumed one, needs
    none of the seconds to minutes of compilation, and runs the very same program.

    Raises UsageError where no such device is seen.
    """
    if not jax.config.jax_compilation_cache_dir:  # the environment's JAX_COMPILATION_CACHE_DIR comes first
        jax.config.update('jax_compilation_cache_dir', str(folders('xla')[-1] / platform.node()))
    if name == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
    elif name != 'auto':
        try:
            jax.devices(name)
        except RuntimeError:
            raise UsageError(f'--platform={name}: JAX sees no {name} here, only {jax.default_backend()}. For an NVIDIA '
                             "GPU check nvidia-smi and install the extra for its driver, pip install -e '.[cuda12]' or "
                             "'.[cuda13]'; or run with --platform=cpu") from None
    if jax.default_backend() == 'cpu' and not any(name.startswith('MALLOC_') for name in os.environ):
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets this process keep host memory that it has freed, instead of handing it back to the system.

    XLA takes a CPU program's working memory anew at each call, and glibc gives blocks over 32 MiB back at once: for
    47 MiB (4 layers, 128 wide, 12 x 64) each training step met 12,000 page faults, and took 34 ms instead of 21.

    It helps up to 64 MiB, where a thread's heap ends; from there on all is as before. One heap for all threads
    (M_ARENA_MAX) has no such end, but the threads wait for each other: 20.3 against 17.6 ms. Other C libraries are left
    as they are.
    """
    with contextlib.suppress(AttributeError):  # no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped, and unmapped, by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the main heap never shrinks
        mallopt(-2, 2**26)  # M_TOP_PAD: nor do those of other threads


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known."""
    return PEAK_BF16_FLOPS.get(device.device_kind)


def describe_device(device: jax.Device) -> str:
    """Platform, name and memory, for people: 'gpu, NVIDIA H100 80GB HBM3, 79.1 GiB'."""
    if device.platform == 'cpu':
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        name = f'{os.cpu_count()} cores'
    else:
        memory = (device.memory_stats() or {}).get('bytes_limit')
        name = device.device_kind
    return f'{device.platform}, {name}, {f"{memory / 2**30:.1f} GiB" if memory else "memory unknown"}'


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """The first data x fsdp x tensor devices as a mesh; raises UsageError where there are fewer."""
    need, devices = data * fsdp * tensor, jax.devices()
    if need > len(devices):
        raise UsageError(f'mesh.data x mesh.fsdp x mesh.tensor = {need} devices, but JAX sees {len(devices)} '
                         f'{devices[0].platform}; on a CPU, JAX_NUM_CPU_DEVICES={need} in the environment '
                         'simulates them')
    return Mesh(np.array(devices[:need]).reshape(data, fsdp, tensor), ('data', 'fsdp', 'tensor'))


def _spec(path, leaf, mesh: Mesh, drop: str | None) -> P:
    """The rule of one leaf; an axis that does not divide its dimension, or that is dropped, is left whole."""
    name = '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)
    rule = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, name))
    return P(*(axis if axis and axis != drop and leaf.shape[i] % mesh.shape[axis] == 0 else None
               for i, axis in enumerate(rule)))


def shardings(mesh: Mesh, tree, drop: str | None = None):
    """How each leaf of a tree of arrays (or shapes) lies on the mesh, without splitting over the axis `drop`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh, drop)), tree)


def make_gather(mesh: Mesh):
    """The function that brings parameters to where they are used: whole over 'fsdp', still split over 'tensor'.

    Without it XLA splits the activations by feature instead, and moves them at every matrix product.
    """
    if mesh.shape['fsdp'] == 1:
        return lambda params: params
    return lambda params: jax.lax.with_sharding_constraint(params, shardings(mesh, params, drop='fsdp'))


def in_turn(mesh: Mesh, function):
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


@contextlib.contextmanager
def memory_errors(knobs: str):
    """Turns running out of device memory into a UserError that names what to turn: `knobs`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # A GPU says the first, a CPU the second.
        if not isinstance(error, MemoryError) and not re.search('RESOURCE_EXHAUSTED|Out of memory', str(error)):
            raise
        amount = re.search(r'allocat\w+ (?:of )?([\d.]+) ?([KMGT]iB)?', str(error))  # in bytes where no unit is named
        size = amount and (f'{amount[1]} {amount[2]}' if amount[2] else f'{float(amount[1]) / 2**30:,.1f} GiB')
        raise UserError(f'out of memory{f" for an array of {size}" if size else ""} on '
                        f'{describe_device(jax.devices()[0])}: {knobs}') from None

