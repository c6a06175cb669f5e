"""The device of this process: chosen, described, and its peak speed."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.files import local_folders

# Dense bf16 rates of matrix products in FLOP/s, from the vendors' data sheets, by JAX's name of the
# device. A name is matched whole: an L40 differs from an L4, and an H200 NVL from an H200.
PEAK_BF16_FLOPS = {
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100-PCIE-40GB': 312e12,
    'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 80GB HBM3': 989.4e12,
    'NVIDIA H200': 989.4e12,
    'NVIDIA L4': 121e12,
    'NVIDIA L40S': 362e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
}

# Rates of the device memory in bytes/s, from the same sheets.
PEAK_MEMORY_RATES = {
    'NVIDIA A100-SXM4-40GB': 1.555e12,
    'NVIDIA A100-SXM4-80GB': 2.039e12,
    'NVIDIA A100-PCIE-40GB': 1.555e12,
    'NVIDIA A100 80GB PCIe': 1.935e12,
    'NVIDIA H100 PCIe': 2.0e12,
    'NVIDIA H100 80GB HBM3': 3.35e12,
    'NVIDIA H200': 4.8e12,
    'NVIDIA L4': 0.3e12,
    'NVIDIA L40S': 0.864e12,
}

# Programs that take this long to compile are kept for the next start. JAX would keep those that
# take a second, and an evaluation or a sample takes less.
CACHED_SECONDS = 0.1

# The first jax in which the tests of the kernel for Hopper GPUs run. 0.11.0 has no interpreter for
# them, and in the interpreter of 0.11.1 the kernel waits forever at a barrier.
HOPPER_JAX = (0, 11, 2)

# Switches of JAX for debugging that raise an error in the code of Flax and Optax.
UNSUPPORTED_SWITCHES = {
    'jax_numpy_rank_promotion': 'raise',
    'jax_numpy_dtype_promotion': 'strict',
}

# Decorates functions that look at a model from the host: they move arrays on purpose, also under
# JAX_TRANSFER_GUARD=disallow.
allow_transfers = jax.transfer_guard('allow')


def select_platform(name: str) -> None:
    """Chooses 'auto', 'cpu', 'gpu' or 'tpu' for this process; call before JAX is used.

    Compiled programs are cached in the user's cache, in one folder per machine. The next start, and
    a resumed run, loads them instead of compiling for seconds to minutes, and so runs the very same
    program. JAX_COMPILATION_CACHE_DIR in the environment names another folder.

    Raises UsageError if JAX sees no such device, and for a switch of JAX that the libraries below
    this package do not support.
    """
    for switch, value in UNSUPPORTED_SWITCHES.items():
        if getattr(jax.config, switch) == value:
            raise UsageError(
                f'{switch.upper()}={value} is set, but Flax and Optax rely on such promotion '
                'themselves: unset it'
            )
    if not jax.config.jax_compilation_cache_dir:
        cache = local_folders('xla')[-1] / platform.node()
        jax.config.update('jax_compilation_cache_dir', str(cache))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', CACHED_SECONDS)
    if name == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
    elif name != 'auto':
        try:
            jax.devices(name)
        except RuntimeError:
            raise UsageError(
                f'--platform={name}: JAX sees no {name} here, only {_backend()}. For an NVIDIA GPU '
                "check nvidia-smi and install the extra for its driver, pip install -e '.[cuda12]' "
                "or '.[cuda13]'; or run with --platform=cpu"
            ) from None
    keep_freed_memory()


@contextlib.contextmanager
def selecting_platform(name: str) -> Iterator[None]:
    """Runs select_platform beside what happens inside, on a thread; raises its errors at the end.

    A GPU takes a second or more to start, in which the thread does not hold Python's lock. The
    thread then lives on for the first use of the device, which takes another second: JAX reserves
    most of its memory.
    """
    pool = ThreadPoolExecutor(1, 'device')
    try:
        selected = pool.submit(select_platform, name)
        yield
        selected.result()
        pool.submit(_touch_device)
    finally:
        pool.shutdown(wait=False, cancel_futures=False)


def _touch_device() -> None:
    """The first use of the device. If it fails, so does the use of it that follows, with a text."""
    jax.block_until_ready(jax.device_put(np.zeros(1, np.int32)))


def _backend() -> str:
    """The platform that JAX uses. Raises UsageError if JAX cannot start."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition('. (set JAX_PLATFORMS')[0] or 'it sees no such device'
        if not jax.config.jax_platforms:
            raise UsageError(
                f'JAX cannot start: {reason}; look for variables of the environment that begin '
                'with JAX_'
            ) from None
        raise UsageError(
            f'JAX cannot use JAX_PLATFORMS={jax.config.jax_platforms}: {reason}; unset it, or run '
            'with --platform=cpu'
        ) from None


def keep_freed_memory() -> None:
    """On a CPU, lets this process keep memory that it frees, instead of returning it to the system.

    XLA allocates a CPU program's working memory at each call, and glibc returns blocks over 32 MiB
    to the system at once. With 47 MiB (4 layers, 128 wide, 12 x 64) this caused 12,000 page faults
    a training step; without them a step takes 34 -> 21 ms (2 CPU cores).

    It helps up to 64 MiB, the size of a thread's heap. A single heap for all threads (M_ARENA_MAX)
    has no such limit, but the threads wait for each other: 17.6 -> 20.3 ms. Other C libraries are
    left as they are, and so is glibc if MALLOC_* in the environment tunes it.
    """
    if _backend() != 'cpu' or any(name.startswith('MALLOC_') for name in os.environ):
        return
    with contextlib.suppress(AttributeError):  # the C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: map no block separately
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the main heap
        mallopt(-2, 2**26)  # M_TOP_PAD: never shrink the heaps of other threads


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None if it is not known."""
    return PEAK_BF16_FLOPS.get(device.device_kind)


def model_flops_utilisation(
    tokens_per_second: float | None, flops_per_token: float, mesh: jax.sharding.Mesh
) -> float | None:
    """MFU: model FLOPs as a share of the mesh's dense bf16 peak (Chowdhery et al. 2022, B).

    None if the speed is None or the device's peak is not known.
    """
    peak = peak_flops(mesh.devices.flat[0])
    if not peak or not tokens_per_second:
        return None
    return tokens_per_second * flops_per_token / (peak * mesh.size)


def has_hopper_kernels(device: jax.Device) -> bool:
    """Whether kernels for Hopper GPUs can run on this device: such as an H100, with a newer jax."""
    capability = getattr(device, 'compute_capability', None)
    return capability == '9.0' and jax.__version_info__ >= HOPPER_JAX


def free_memory(device: jax.Device) -> int | None:
    """Bytes that this process can still allocate on the device; None if it is not known."""
    if device.platform != 'cpu':
        stats = device.memory_stats() or {}
        return stats['bytes_limit'] - stats['bytes_in_use'] if 'bytes_limit' in stats else None
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux
        meminfo = Path('/proc/meminfo').read_text()
        free.append(int(meminfo.partition('MemAvailable:')[2].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit; ValueError: 'max'
        group = Path('/sys/fs/cgroup')
        limit, used = ((group / f'memory.{name}').read_text() for name in ('max', 'current'))
        free.append(int(limit) - int(used))
    return min(free, default=None)


def describe_device(device: jax.Device) -> str:
    """Platform, name and memory, for people: 'gpu, NVIDIA H100 80GB HBM3, 79.1 GiB'."""
    if device.platform == 'cpu':
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        name = f'{os.cpu_count()} cores'
    else:
        memory = (device.memory_stats() or {}).get('bytes_limit')
        name = device.device_kind
    size = f'{memory / 2**30:.1f} GiB' if memory else 'memory unknown'
    return f'{device.platform}, {name}, {size}'
