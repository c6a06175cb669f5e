"""The speed of an update on 1, 2, 4, .. devices, measured beside what is planned."""

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from ml_collections import ConfigDict

from gpt2_jax.config import resolve
from gpt2_jax.data import load
from gpt2_jax.data.dataset import Dataset
from gpt2_jax.errors import UserError
from gpt2_jax.parallel import devices
from gpt2_jax.parallel.faults import memory_errors
from gpt2_jax.speed import benchmark
from gpt2_jax.speed.case import Case, case_of, scale_case
from gpt2_jax.speed.memory import GIB
from gpt2_jax.speed.plan import plan
from gpt2_jax.speed.profile import collective_shares
from gpt2_jax.speed.timing import GPUS
from gpt2_jax.training import programs
from gpt2_jax.training.setup import build

PROFILED = 5  # updates in the profile of a mesh
SCALE_SIZES = ('gpt2', 'gpt2-xl')  # of case.SCALE_CASES, those that bench_scale measures


def bench_scale(
    config: ConfigDict, dataset: Dataset | None, windows: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measures updates of SCALE_SIZES on 1, 2, 4, .. devices, as case.scale_case lays them out.

    Yields a record for each, with the same figures as planned, in the order of planned memory: JAX
    reports the peak of a process, which is that of the last record only if no earlier one needed
    more. All updates are compiled first, side by side. A case without room is reported as None. The
    shares of collectives are those of `profile.CollectiveShares`.
    """
    dataset = dataset or load.load_dataset(**config.data)
    base = case_of(config, dataset.tokenizer.vocab_size)
    kind = jax.devices()[0].device_kind
    gpu = next((gpu for gpu in GPUS.values() if gpu.kind == kind), GPUS['h200'])
    counts = [2**i for i in range(jax.device_count().bit_length())]
    plans = [(size, plan(scale_case(base, size, n), gpu)) for size in SCALE_SIZES for n in counts]
    plans.sort(key=lambda named: (named[1].peak, named[1].case.devices))
    with ThreadPoolExecutor(len(plans), 'compile') as pool:  # its end waits for all programs
        setups = [build(scale_config(config, planned.case), dataset) for _, planned in plans]
        steps = [programs.compile_train_step(setup, pool) for setup in setups]
    for (size, planned), setup, train_step in zip(plans, setups, steps, strict=True):
        rate, peak, shares = None, None, None
        with contextlib.suppress(UserError), memory_errors('train'):
            state, batch = programs.new_state(setup), benchmark.first_batch(setup)
            spread, state = benchmark.time_updates(train_step, state, batch, windows, seconds)
            rate = setup.tokens_per_step / spread['median']
            peak = (setup.device.memory_stats() or {}).get('peak_bytes_in_use')
            shares = collective_shares(train_step, state, batch, PROFILED)
        state = batch = None  # room for the next
        yield {
            'size': size,
            'devices': planned.case.devices,
            'mesh': dict(planned.case.mesh),
            'windows_a_device': planned.case.rows,
            'tokens_per_second': rate,
            'collectives': shares and shares.running,
            'collectives_alone': shares and shares.alone,
            'mfu': devices.model_flops_utilisation(rate, setup.flops_per_token, setup.mesh),
            'peak_memory_bytes': peak,
            'planned_tokens_per_second': planned.tokens_per_second,
            'planned_memory_bytes': planned.peak,
        }


def scale_config(config: ConfigDict, case: Case) -> ConfigDict:
    """`config` with the sizes, the mesh and the batch of a case."""
    config, sizes = config.copy_and_resolve_references(), dataclasses.asdict(case.cfg)
    config.model.update({name: sizes[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_inner')})
    config.mesh.update(case.mesh)
    shares = case.mesh['data'] * case.mesh['fsdp']
    config.train.update(batch_size=case.rows * shares, grad_accum_steps=1)
    return resolve(config)


def scale_table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the records of `bench_scale` as a Markdown table, with weak scaling."""
    yield (
        '| model | GPUs | windows a GPU | tokens/s | planned | weak scaling | MFU | '
        'in collectives | in them alone | memory a GPU | planned |'
    )
    yield '| --- ' * 11 + '|'
    rates = {(r['size'], r['devices']): r['tokens_per_second'] for r in records}
    for record in sorted(records, key=lambda r: (SCALE_SIZES.index(r['size']), r['devices'])):
        rate, one = record['tokens_per_second'], rates[record['size'], 1]
        planned, peak = record['planned_tokens_per_second'], record['peak_memory_bytes']
        mfu, shares = record['mfu'], (record['collectives'], record['collectives_alone'])
        cells = [
            *(record['size'], record['devices'], record['windows_a_device']),
            f'{rate:,.0f}' if rate else 'out of memory',
            f'{planned:,.0f}' if planned else '',
            f'{rate / one:.2f}' if rate and one else '',
            f'{mfu:.3f}' if mfu else '',
            *('' if share is None else f'{share:.1%}' for share in shares),
            f'{peak / GIB:.1f} GiB' if peak else '',
            f'{record["planned_memory_bytes"] / GIB:.1f} GiB',
        ]
        yield f'| {" | ".join(map(str, cells))} |'
