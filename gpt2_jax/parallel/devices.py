"""TODO."""

import contextlib
import ctypes
import os
import platform

import jax

from gpt2_jax.errors import UsageError
from gpt2_jax.files import local_folders

# Dense bf16 matrix product rates in FLOP/s, from the vendors' data sheets, by how JAX names the device. The
# peak of any other name is unknown, and not guessed from a part of it: an L40 is no L4, an H200 NVL no H200.
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

    Compiled programs go to the user's cache, one folder a machine: the next start of a run, and a resumed one, needs
    none of the seconds to minutes of compilation, and runs the very same program.

    Raises UsageError where no such device is seen.
    """
    if (
        not jax.config.jax_compilation_cache_dir
    ):  # the environment's JAX_COMPILATION_CACHE_DIR comes first
        jax.config.update('jax_compilation_cache_dir', str(local_folders('xla')[-1] / platform.node()))
    if name == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
    elif name != 'auto':
        try:
            jax.devices(name)
        except RuntimeError:
            raise UsageError(
                f'--platform={name}: JAX sees no {name} here, only {jax.default_backend()}. For an NVIDIA '
                "GPU check nvidia-smi and install the extra for its driver, pip install -e '.[cuda12]' or "
                "'.[cuda13]'; or run with --platform=cpu"
            ) from None
    if jax.default_backend() == 'cpu' and not any(
        name.startswith('MALLOC_') for name in os.environ
    ):
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


def model_flops_utilisation(
    tokens_per_second: float | None, flops_per_token: float, mesh: jax.sharding.Mesh
) -> float | None:
    """MFU: the share of the mesh's dense bf16 peak that model FLOPs take (Chowdhery et al. 2022, B).

    None if the speed is None or the peak of the device is not known.
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
    return (
        f'{device.platform}, {name}, {f"{memory / 2**30:.1f} GiB" if memory else "memory unknown"}'
    )
