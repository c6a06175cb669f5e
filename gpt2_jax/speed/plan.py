"""What a run needs before it runs: memory, transfers and time of an update on a mesh of GPUs.

Arithmetic alone, without JAX or a device. It counts the arrays that training/fused_step.py keeps,
the collectives of parallel/collectives.py, and the work of an update over rates measured on a GPU
(docs/scale.md says how far off the figures are). For a part that XLA compiles, memory is a rough
sum, and there is no measured rate.

Sizes are in bytes, times in seconds. Letters as in model/gpt2.py; N is the number of tokens of one
device's micro-batch.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from gpt2_jax.architecture import PRESETS, GPT2Config, flops_per_token, padded_vocab
from gpt2_jax.kernels.choose import ROWS_MULTIPLE, Kernels, Place, choose
from gpt2_jax.parallel import rules

BYTES = {'bfloat16': 2, 'float32': 4}
GIB = 2**30


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
    # transposes around them, fitted to two H200: all-reduces; and gathers and scatters of fsdp.
    # NCCL alone all-reduces at 329e9 on two H100.
    reduce_bytes: float = 110e9
    shard_bytes: float = 80e9
    # The same for a device that sends to other hosts: assumed, half a 400 Gbit/s card for each GPU.
    network_bytes: float = 25e9


# An H100 of 80 GB took 1 % longer at 12 x 1024 and 3 % longer at 32 x 1024 (GPT-2 124M).
GPUS = {
    'h100': GPU('NVIDIA H100 80GB HBM3', 79.1 * GIB, 989.4e12),
    'h200': GPU('NVIDIA H200', 139.8 * GIB, 989.4e12),
}
HOST = 8  # GPUs of a host
MEMORY_FRACTION = 0.75  # the share that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more

# Tokens in a vocabulary, by data.tokenizer; the characters are those of TinyShakespeare.
VOCABULARIES = {'char': 65, 'byte': 256, 'gpt2': 50257}

# The cases of docs/scale.md: size -> windows of a GPU, and the mesh axis of the first host.
SCALE_CASES = {
    'gpt2': (32, 'data'),
    'gpt2-medium': (16, 'data'),
    'gpt2-large': (16, 'fsdp'),
    'gpt2-xl': (16, 'fsdp'),
}


class Case(NamedTuple):
    """A model on a mesh. `rows` is one device's share of a micro-batch."""

    cfg: GPT2Config
    mesh: Mapping[str, int]
    rows: int
    seq_len: int
    micro_batches: int = 1
    reduce_dtype: str = 'float32'
    optimizer: str = 'auto'  # the setting optim.implementation
    algorithm: str = 'adamw'
    averages: bool = False  # whether the state has an average of the parameters

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.seq_len

    @property
    def tokens_an_update(self) -> int:
        """Tokens of an update, over all devices and micro-batches."""
        shares = self.mesh['data'] * self.mesh['fsdp']
        return self.tokens * self.micro_batches * shares


class Collective(NamedTuple):
    """What all devices exchange in an update; `size` is the whole array, `sent` one device's part.

    `axes` are the mesh axes over which it runs.
    """

    name: str
    kind: str  # as XLA names it
    axes: tuple[str, ...]
    size: int
    sent: int


class Plan(NamedTuple):
    """The figures of a case. `memory` is by array and adds up to `peak`; `moment` says when.

    `seconds` is by part, and empty if a part has no measured rate.
    """

    case: Case
    kernels: Kernels
    reasons: dict[str, str]
    memory: dict[str, int]
    moment: str
    collectives: list[Collective]
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes of a device at the moment that needs most."""
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices."""
        seconds = sum(self.seconds.values())
        return self.case.tokens_an_update / seconds if seconds else None


def case_of(config: ConfigDict, vocab_size: int) -> Case:
    """The case that a resolved configuration describes."""
    train, mesh = config.train, dict(config.mesh)
    rows = train.batch_size // train.grad_accum_steps // (mesh['data'] * mesh['fsdp'])
    cfg = GPT2Config(**config.model, vocab_size=vocab_size)
    optim = config.optim
    options = train.grad_accum_steps, train.reduce_dtype, optim.implementation, optim.algorithm
    return Case(cfg, mesh, rows, train.seq_len, *options, averages=optim.average > 0)


def parameter_shapes(cfg: GPT2Config) -> dict[str, tuple[int, ...]]:
    """{'h_0/mlp/c_fc/kernel': (D, F), ..}: the tree of model/gpt2.py."""
    D, F, H, K = cfg.n_embd, cfg.d_ff, cfg.n_head, cfg.head_dim
    block = {
        'attn/c_attn': ((D, 3, H, K), (3, H, K)),
        'attn/c_proj': ((H, K, D), (D,)),
        'mlp/c_fc': ((D, F), (F,)),
        'mlp/c_proj': ((F, D), (D,)),
    }
    shapes = {'wte/embedding': (cfg.vocab_size, D), 'wpe/embedding': (cfg.n_positions, D)}
    norms = ['ln_f', *(f'h_{i}/{name}' for i in range(cfg.n_layer) for name in ('ln_1', 'ln_2'))]
    shapes |= {f'{name}/scale': (D,) for name in norms}
    biases = {f'{name}/bias': (D,) for name in norms}
    for i in range(cfg.n_layer):
        for name, (kernel, bias) in block.items():
            shapes[f'h_{i}/{name}/kernel'] = kernel
            biases[f'h_{i}/{name}/bias'] = bias
    return shapes | biases if cfg.bias else shapes


def stored_elements(cfg: GPT2Config, mesh: Mapping[str, int]) -> int:
    """Parameters that one device stores; each moment has as many."""
    shapes = parameter_shapes(cfg).items()
    return sum(rules.local_size(name, shape, mesh) for name, shape in shapes)


def moment_elements(case: Case) -> int:
    """Elements of the moments that one device stores: two for a parameter, one under Muon."""
    both = 2 * stored_elements(case.cfg, case.mesh)
    if case.algorithm == 'adamw':
        return both
    return both - sum(
        rules.local_size(name, shape, case.mesh)
        for name, shape in parameter_shapes(case.cfg).items()
        if name.startswith('h_') and name.endswith('kernel')
    )


def used_elements(cfg: GPT2Config, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the kernels, and of all other leaves, that a device multiplies by: gathered."""
    mesh, counts = {**mesh, 'fsdp': 1}, [0, 0]
    for name, shape in parameter_shapes(cfg).items():
        counts[not name.endswith('kernel')] += rules.local_size(name, shape, mesh)
    return counts[0], counts[1]


def kept_by_block(cfg: GPT2Config, kernels: Kernels, T: int, tensor: int = 1) -> dict[str, int]:
    """What a block keeps for its backward pass without remat, in bytes a token.

    The branches, the products that the residual stream adds up, are not kept. `tensor` devices
    share heads and columns.
    """
    c, s = BYTES[cfg.compute_dtype], BYTES[cfg.stream_dtype]
    D, F, H = cfg.n_embd, cfg.d_ff // tensor, cfg.n_head // tensor
    kept = {
        'resid_pre': s * D,
        'ln_1': c * D,
        'q, k, v': 3 * c * D // tensor,
        'z': c * D // tensor,
        'log-sum-exp': 4 * H,
        'resid_mid': s * D,
        'ln_2': c * D,
        'means and 1 / std': 16,
        'mlp_pre': c * F,
        'mlp_post': c * F,
    }
    if kernels.attention == 'xla':  # the pattern in fp32, and what multiplies v
        kept['log-sum-exp'] = (4 + c) * H * T
    if kernels.norm == 'xla':
        kept['normalised, fp32'] = 8 * D
    if kernels.gelu == 'xla' and c == 4:
        kept['within GELU'] = 8 * F
    return kept


def kept(cfg: GPT2Config, kernels: Kernels, T: int, tensor: int = 1) -> int:
    """Bytes a token that a block keeps until its backward pass, by model.remat."""
    arrays = kept_by_block(cfg, kernels, T, tensor)
    if cfg.remat == 'none':
        return sum(arrays.values())
    branch = BYTES[cfg.compute_dtype] * cfg.n_embd
    inputs = arrays['resid_pre'] + (branch if kernels.fused_training else 0)
    if cfg.remat == 'block':
        return inputs
    products = arrays['q, k, v'] + branch + arrays['mlp_pre']
    if kernels.attention == 'fused':
        products += arrays['z'] + arrays['log-sum-exp']
    return inputs + products


def memory(case: Case, kernels: Kernels) -> tuple[dict[str, int], str]:
    """What a device holds when it holds most, by array; and when that is.

    Three moments come into question: the head, where the logits are; the backward pass of the last
    block; and the end of it, where all gradients are.
    """
    cfg, N, mesh = case.cfg, case.tokens, case.mesh
    c, s, D, F = BYTES[cfg.compute_dtype], BYTES[cfg.stream_dtype], cfg.n_embd, cfg.d_ff
    stored, (kernels_used, others_used) = stored_elements(cfg, mesh), used_elements(cfg, mesh)
    used, tensor = kernels_used + others_used, mesh['tensor']
    vocab = padded_vocab(cfg.vocab_size) // (1 if cfg.vocab_size % tensor else tensor)
    casts = kernels_used * c if c == 2 or mesh['fsdp'] > 1 else 0
    always = {
        'parameters': 4 * stored,
        'moments': 4 * moment_elements(case),
        'average of the parameters': 4 * stored if case.averages else 0,
        'parameters as used': casts + (4 * others_used if mesh['fsdp'] > 1 else 0),
        'gradients of other micro-batches': 4 * used if case.micro_batches > 1 else 0,
    }
    activations = N * (cfg.n_layer * kept(cfg, kernels, case.seq_len, tensor) + (s + c) * D + 8)
    logits = N * vocab * (c if kernels.loss == 'fused' else 8)
    table = vocab * D
    head = {
        'activations': activations,
        'logits': logits,
        # The embedding in the compute dtype; its gradient, as summed and as scaled.
        'the head and its gradient': table * (c + 8),
        'gradient of the activations': N * D * (4 + c),
    }
    backward = {
        'activations': activations,
        'the head and its gradient': table * 4,
        'gradient of the activations': N * (2 * c * F // tensor + (s + c) * D),
    }
    if cfg.remat != 'none':
        again = sum(kept_by_block(cfg, kernels, case.seq_len, tensor).values())
        backward['a block computed again'] = N * again
    gradients = kernels_used * (c if kernels.fused_training else 4) + 4 * others_used
    if case.devices > 1:
        gradients += used * BYTES[case.reduce_dtype]
    moments = {
        'at the head': head,
        'in the last block': backward,
        'at the end of the backward pass': {'gradients': gradients},
    }
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return {name: size for name, size in (always | moments[when]).items() if size}, when


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
    N, stored = n * case.tokens, stored_elements(cfg, case.mesh)
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


def plan(case: Case, gpu: GPU) -> Plan:
    """The figures of a case. Raises UsageError for settings that cannot run on a GPU."""
    place = Place('gpu', case.mesh['tensor'], case.rows, case.seq_len, algorithm=case.algorithm)
    kernels, reasons = choose(case.cfg, case.optimizer, place)
    transfers = collectives(case, kernels)
    held, moment = memory(case, kernels)
    times = seconds(case, kernels, gpu, transfers)
    return Plan(case, kernels, reasons, held, moment, transfers, times)


def largest_rows(case: Case, gpu: GPU, fraction: float = MEMORY_FRACTION) -> int:
    """The most rows of a micro-batch that fit on a device; 0 if none do.

    Fused kernels take rows in steps of ROWS_MULTIPLE tokens.
    """
    is_fused = plan(case, gpu).kernels.fused_training
    step = ROWS_MULTIPLE // math.gcd(ROWS_MULTIPLE, case.seq_len) if is_fused else 1

    def fits(steps: int) -> bool:
        return plan(case._replace(rows=steps * step), gpu).peak <= fraction * gpu.memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def mfu(planned: Plan, gpu: GPU) -> float | None:
    """Model FLOPs utilisation, as parallel/devices.py counts it."""
    if not (rate := planned.tokens_per_second):
        return None
    case = planned.case
    flops = flops_per_token(case.cfg, case.seq_len)
    return rate * flops / (gpu.peak_flops * case.devices)


def describe(planned: Plan, gpu: GPU, fraction: float = MEMORY_FRACTION) -> Iterator[str]:
    """Yields the lines of a plan, for people."""
    case, kernels = planned.case, planned.kernels
    mesh = ' x '.join(f'{axis} {size}' for axis, size in case.mesh.items())
    yield (
        f'plan       {case.devices} x {gpu.kind}, mesh {mesh}; {case.micro_batches} x {case.rows} '
        f'windows of {case.seq_len:,} tokens a device, {case.tokens_an_update:,} tokens an update'
    )
    parts = ('attention', 'norm', 'gelu', 'loss', 'optimizer')
    names = ', '.join(f'{part} {getattr(kernels, part)}' for part in parts)
    yield f'kernels    {names}; remat {case.cfg.remat}'
    for part in parts:
        if part in planned.reasons:
            yield f'           {part}: {planned.reasons[part]}'
    yield f'memory     {_size(planned.peak)} a device, {planned.moment}'
    for name, size in planned.memory.items():
        yield f'           {_size(size):>10}  {name}'
    policies = {
        remat: plan(case._replace(cfg=dataclasses.replace(case.cfg, remat=remat)), gpu).peak
        for remat in ('none', 'dots', 'block')
    }
    yield '           by model.remat: ' + ', '.join(
        f'{name} {_size(size)}' for name, size in policies.items()
    )
    rows, limit = largest_rows(case, gpu, fraction), fraction * gpu.memory / GIB
    yield f'largest    {rows} windows a device and micro-batch in {limit:.1f} GiB'
    shapes = parameter_shapes(case.cfg).items()
    for line in rules.undivided(shapes, case.mesh):
        yield f'undivided  {line}'
    for t in planned.collectives:
        axes = ' and '.join(axis for axis in t.axes if case.mesh[axis] > 1)
        yield (
            f'{t.kind:15}{t.name} over {axes}: {t.size / 1e6:,.0f} MB, of which a device sends '
            f'{t.sent / 1e6:,.0f} MB'
        )
    if not planned.seconds:
        yield 'time       no measured rates for parts that XLA compiles'
        return
    total, share = sum(planned.seconds.values()), mfu(planned, gpu)
    yield (
        f'time       {total * 1e3:.1f} ms an update: {planned.tokens_per_second:,.0f} tokens/s, '
        f'MFU {share:.3f}'
    )
    for name, value in planned.seconds.items():
        if value:
            yield f'           {value * 1e3:8.2f}  {name}'


def _size(n_bytes: int) -> str:
    return f'{n_bytes / GIB:.1f} GiB' if n_bytes >= GIB else f'{n_bytes / 2**20:.1f} MiB'


def scale_case(base: Case, size: str, devices: int) -> Case:
    """A published size on a number of devices, as docs/scale.md plans and measures it.

    Everything else is as in `base`, without micro-batches. The smaller two sizes run on a mesh of
    data, the larger two of fsdp within a host and data over hosts.
    """
    rows, axis = SCALE_CASES[size]
    fsdp = 1 if axis == 'data' else min(devices, HOST)
    cfg = dataclasses.replace(base.cfg, **PRESETS[size], n_inner=None)
    mesh = {'data': devices // fsdp, 'fsdp': fsdp, 'tensor': 1}
    return base._replace(cfg=cfg, mesh=mesh, rows=rows, micro_batches=1)


def table(
    base: Case, counts: Iterable[int], gpu: GPU, fraction: float = MEMORY_FRACTION
) -> Iterator[str]:
    """Yields a table of `scale_case` on so many GPUs, in Markdown."""
    yield _row(
        *('model', 'GPUs', 'mesh', 'windows a GPU', 'memory a GPU', 'an update', 'tokens/s', 'MFU'),
        *('GPU sends', 'windows that fit'),
    )
    yield _row(*['---'] * 10)
    for size, devices in itertools.product(SCALE_CASES, counts):
        planned = plan(scale_case(base, size, devices), gpu)
        case, sent = planned.case, sum(t.sent for t in planned.collectives)
        mesh = ' x '.join(f'{axis} {n}' for axis, n in case.mesh.items() if n > 1) or 'one'
        speed = ('', '', '')
        if rate := planned.tokens_per_second:
            milliseconds = case.tokens_an_update / rate * 1e3
            speed = f'{milliseconds:.1f} ms', f'{rate:,.0f}', f'{mfu(planned, gpu):.3f}'
        memory, fitting = _size(planned.peak), largest_rows(case, gpu, fraction)
        yield _row(size, devices, mesh, case.rows, memory, *speed, f'{sent / 1e9:.2f} GB', fitting)


def _row(*cells) -> str:
    return f'| {" | ".join(map(str, cells))} |'
