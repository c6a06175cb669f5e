"""The device of this process: chosen, described, and its peak speed."""

import contextlib
import ctypes
import os
import platform

import jax

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


def select_platform(name: str) -> None:
    """Chooses 'auto', 'cpu', 'gpu' or 'tpu' for this process; call before JAX is used.

    Compiled programs are cached in the user's cache, in one folder per machine. The next start, and
    a resumed run, loads them instead of compiling for seconds to minutes, and so runs the very same
    program. JAX_COMPILATION_CACHE_DIR in the environment names another folder.

    Raises UsageError if JAX sees no such device.
    """
    if not jax.config.jax_compilation_cache_dir:
        cache = local_folders('xla')[-1] / platform.node()
        jax.config.update('jax_compilation_cache_dir', str(cache))
    if name == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
    elif name != 'auto':
        try:
            jax.devices(name)
        except RuntimeError:
            raise UsageError(
                f'--platform={name}: JAX sees no {name} here, only {jax.default_backend()}. For an '
                'NVIDIA GPU check nvidia-smi and install the extra for its driver, pip install -e '
                "'.[cuda12]' or '.[cuda13]'; or run with --platform=cpu"
            ) from None
    tuned = any(variable.startswith('MALLOC_') for variable in os.environ)
    if jax.default_backend() == 'cpu' and not tuned:
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets this process keep the host memory that it frees, instead of returning it to the system.

    XLA allocates a CPU program's working memory at each call, and glibc returns blocks over 32 MiB
    to the system at once. With 47 MiB (4 layers, 128 wide, 12 x 64) this caused 12,000 page faults
    a training step; without them a step takes 34 -> 21 ms (2 CPU cores).

    It helps up to 64 MiB, the size of a thread's heap. A single heap for all threads (M_ARENA_MAX)
    has no such limit, but the threads wait for each other: 17.6 -> 20.3 ms. Other C libraries are
    left as they are.
    """
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
