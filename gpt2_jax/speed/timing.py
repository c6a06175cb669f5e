"""The transfers of an update between GPUs, and the time of an update by part; no JAX.

It counts the collectives of parallel/collectives.py, and divides the work of an update by rates
that were measured on a GPU (docs/scale.md says how far off the times are). For a part that XLA
compiles there is no measured rate. Sizes are in bytes, times in seconds.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from gpt2_jax.architecture import padded_vocab, parameter_shapes
from gpt2_jax.kernels.choose import Kernels
from gpt2_jax.parallel import rules
from gpt2_jax.speed.case import HOST, Case, stored_elements, used_elements
from gpt2_jax.speed.memory import BYTES, GIB


class GPU(NamedTuple):
    """A GPU and its rates.

    `memory` is what JAX can allocate if it may take all of it. The rates are those at which whole
    steps run, not peaks: they were fitted to the steps in docs/scale.md.
    """

    kind: str  # JAX's name
    memory: float
    peak_flops: float  # dense bf16, as in parallel/devices.py
    matmul_flops: float = 597e12
    attention_flops: float = 357e12  # kernels/attention.py, without the masked half of the pattern
    cudnn_flops: float = 341e12
    memory_bytes: float = 3.46e12  # a second: LayerNorm, GELU, softmax and AdamW
    overhead: float = 1.1e-3  # of a micro-batch: everything else
    # Bytes a second that a device sends in the collectives of an update, with the casts and
    # transposes around them, fitted to two GPUs: all-reduces; and gathers and scatters of fsdp.
    # NCCL alone all-reduces at 329e9 on two H100.
    reduce_bytes: float = 130e9
    shard_bytes: float = 120e9
    # The same for a device that sends to other hosts: assumed, half a 400 Gbit/s card for each GPU.
    network_bytes: float = 25e9


# An H100 of 80 GB took 3 to 6 % longer (GPT-2 124M).
GPUS = {
    'h100': GPU('NVIDIA H100 80GB HBM3', 79.1 * GIB, 989.4e12),
    'h200': GPU('NVIDIA H200', 139.8 * GIB, 989.4e12),
}


class Collective(NamedTuple):
    """What all devices exchange in an update; `size` is the whole array, `sent` one device's part.

    `axes` are the mesh axes over which it runs.
    """

    name: str
    kind: str  # as XLA names it
    axes: tuple[str, ...]
    size: int
    sent: int


def collectives(case: Case, kernels: Kernels) -> list[Collective]:
    """The transfers of an update between devices, those of equal kind and axes added up.

    Parameters are gathered over fsdp once an update, kernels in the compute dtype; gradients are
    added up once, after the last micro-batch.
    """
    cfg, mesh, found = case.cfg, case.mesh, {}

    def add(name: str, kind: str, over: tuple[str, ...], size: int):
        n = math.prod(mesh[axis] for axis in over)
        if n > 1:
            passes = 2 if kind == 'all-reduce' else 1
            sizes = found.setdefault((name, kind, over), [0, 0])
            sizes[0] += size
            sizes[1] += passes * size * (n - 1) // n

    for name, shape in parameter_shapes(cfg).items():
        is_kernel = name.endswith('kernel')
        dtype = cfg.compute_dtype if is_kernel else 'float32'
        reduced = case.reduce_dtype if kernels.fused_training else 'float32'
        whole = rules.local_size(name, shape, {**mesh, 'fsdp': 1})
        if 'fsdp' in rules.axes(name, shape, mesh) and mesh['fsdp'] > 1:
            add('parameters', 'all-gather', ('fsdp',), whole * BYTES[dtype])
            add('gradients', 'reduce-scatter', ('fsdp',), whole * BYTES[reduced])
            own = whole // mesh['fsdp']
            add('gradients', 'all-reduce', ('data',), own * BYTES[reduced])
        else:
            add('gradients', 'all-reduce', ('data', 'fsdp'), whole * BYTES[reduced])
    # Megatron's: the two branches of a block, forwards and backwards.
    activations = case.micro_batches * case.tokens * cfg.n_embd * BYTES[cfg.compute_dtype]
    add('activations', 'all-reduce', ('tensor',), 4 * cfg.n_layer * activations)
    return [Collective(*key, *sizes) for key, sizes in found.items()]


def sending_rate(transfer: Collective, mesh: Mapping[str, int], gpu: GPU) -> float:
    """Bytes a second that a device sends in a collective.

    Neighbours on the mesh's last axes are on one host. A ring over several hosts enters and leaves
    each of them by the cards of all its devices in the ring.
    """
    axes, stride = transfer.axes, 1
    n = math.prod(mesh[axis] for axis in axes)
    rate = gpu.reduce_bytes if transfer.kind == 'all-reduce' else gpu.shard_bytes
    for axis in reversed(mesh):
        if axis in axes:
            break
        stride *= mesh[axis]
    together = max(1, HOST // stride)
    if n <= together:
        return rate
    return min(rate, gpu.network_bytes * together)


def seconds(
    case: Case, kernels: Kernels, gpu: GPU, transfers: list[Collective]
) -> dict[str, float]:
    """The time of an update by part; empty if XLA compiles a part of the model, or Muon."""
    by_xla = 'xla' in (kernels.attention, kernels.norm, kernels.gelu, kernels.loss)
    if by_xla or case.algorithm != 'adamw':
        return {}
    cfg, n, remat = case.cfg, case.micro_batches, case.cfg.remat
    c, s = BYTES[cfg.compute_dtype], BYTES[cfg.stream_dtype]
    D, F, L, vocab = cfg.n_embd, cfg.d_ff, cfg.n_layer, padded_vocab(cfg.vocab_size)
    N, stored = n * case.tokens, sum(stored_elements(cfg, case.mesh))
    # Multiplications and additions for a token: forward, and twice as many backward.
    block, head = 2 * (4 * D * D + 2 * D * F), 2 * D * vocab
    products = 3 * (L * block + head)
    attention = 9  # products: 2 forward, 7 backward; half of each is masked
    norm, gelu = 2 * (5 * s + 3 * c) * D, 5 * c * F  # read and written
    if cfg.resid_pdrop or s != c:
        norm += 2 * c * D
    if remat != 'none':  # forward again, up to the last product
        norm += 2 * 2 * (s + c) * D
        gelu += 2 * c * F
    if remat == 'block':
        products += L * 2 * (4 * D * D + D * F)
    if remat == 'block' or (remat == 'dots' and kernels.attention == 'cudnn'):
        attention += 2
    elementwise = N * (L * (norm + gelu) + 3 * c * vocab)
    accumulated = 12 * sum(used_elements(cfg, case.mesh)) * n if n > 1 else 0
    rate = gpu.attention_flops if kernels.attention == 'fused' else gpu.cudnn_flops
    return {
        'matrix products': N * products / gpu.matmul_flops,
        'attention': N * L * D * case.seq_len * attention / rate,
        'LayerNorm, GELU and softmax': elementwise / gpu.memory_bytes,
        'AdamW': (32 * stored + accumulated) / gpu.memory_bytes,
        'everything else': n * gpu.overhead,
        'collectives': sum(t.sent / sending_rate(t, case.mesh, gpu) for t in transfers),
    }
