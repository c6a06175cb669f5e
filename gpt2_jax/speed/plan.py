"""What a run needs before it runs: memory, transfers and time of an update on a mesh of GPUs.

Arithmetic alone, without JAX or a device: see memory.py and timing.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpt2_jax.architecture import flops_per_token, parameter_shapes
from gpt2_jax.kernels.choose import ROWS_MULTIPLE, Kernels, Place, choose
from gpt2_jax.parallel import rules
from gpt2_jax.speed.case import SCALE_CASES, Case, scale_case
from gpt2_jax.speed.memory import GIB, memory
from gpt2_jax.speed.timing import GPU, Collective, collectives, seconds
from gpt2_jax.terminal import binary_size

MEMORY_FRACTION = 0.75  # the share that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more


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


def plan(case: Case, gpu: GPU) -> Plan:
    """The figures of a case. Raises UsageError for settings that cannot run on a GPU.

    GELU is as in a run that is too short for its kernel for Hopper GPUs: so the rates were fitted.
    """
    place = Place('gpu', case.mesh['tensor'], case.rows, case.seq_len, algorithm=case.algorithm)
    kernels, reasons = choose(case.cfg, case.optimizer, place)
    transfers = collectives(case, kernels)
    held, moment = memory(case, kernels)
    times = seconds(case, kernels, gpu, transfers)
    return Plan(case, kernels, reasons, held, moment, transfers, times)


def largest_rows(case: Case, gpu: GPU, fraction: float) -> int:
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
    yield f'memory     {binary_size(planned.peak)} a device, {planned.moment}'
    for name, size in planned.memory.items():
        yield f'           {binary_size(size):>10}  {name}'
    policies = {
        remat: plan(case._replace(cfg=dataclasses.replace(case.cfg, remat=remat)), gpu).peak
        for remat in ('none', 'dots', 'block')
    }
    yield '           by model.remat: ' + ', '.join(
        f'{name} {binary_size(size)}' for name, size in policies.items()
    )
    rows, limit = largest_rows(case, gpu, fraction), fraction * gpu.memory / GIB
    if rows < case.rows:
        yield f'           it does not fit: JAX has {limit:.1f} GiB of a device'
    yield f'largest    {rows:,} windows a device and micro-batch in {limit:.1f} GiB'
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
            yield f'           {value * 1e3:8.2f} ms  {name}'
    yield "           at the rates of an H200, without GELU's kernel for Hopper GPUs"


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
        memory, fitting = binary_size(planned.peak), largest_rows(case, gpu, fraction)
        if fitting < case.rows:
            memory += ': too much'
        yield _row(size, devices, mesh, case.rows, memory, *speed, f'{sent / 1e9:.2f} GB', fitting)


def _row(*cells) -> str:
    return f'| {" | ".join(map(str, cells))} |'
