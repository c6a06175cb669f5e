"""The plan of a run against JAX's shapes, shardings and residuals, and against measured runs."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import runs
from jax.sharding import AbstractMesh
from tiny import flat, shapes, tiny

from gpt2_jax.architecture import PRESETS, GPT2Config, parameter_shapes
from gpt2_jax.config import default_config, resolve
from gpt2_jax.errors import UsageError
from gpt2_jax.kernels.choose import FUSED
from gpt2_jax.parallel import partition, rules
from gpt2_jax.parallel.devices import PEAK_BF16_FLOPS
from gpt2_jax.speed import memory, plan
from gpt2_jax.speed.case import SCALE_CASES, Case, case_of, used_elements
from gpt2_jax.speed.timing import GPUS, collectives, sending_rate
from gpt2_jax.training import fused_optim, fused_step
from gpt2_jax.training.muon import make_muon
from gpt2_jax.training.optim import AdamW, make_optimizer
from gpt2_jax.training.step import init_state

SCALE = Path(__file__).parents[1] / 'docs' / 'scale.md'
SMALL = {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'n_positions': 256}
CHARACTERS = SMALL | {'vocab_size': 65, 'bias': False}
H200 = GPUS['h200']


def case(sizes, rows, mesh='1 1 1', dropout=0.0, **changes) -> Case:
    rates = dict.fromkeys(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), dropout)
    cfg = GPT2Config(**PRESETS.get(sizes, {}) if isinstance(sizes, str) else sizes)
    cfg = dataclasses.replace(cfg, dtype='bfloat16', **rates, **changes)
    mesh = dict(zip(('data', 'fsdp', 'tensor'), map(int, mesh.split()), strict=True))
    return Case(cfg, mesh, rows, cfg.n_positions)


# Measured: case, GiB a device, ms an update, and how far off the plan may be in either.
MEASURED = {
    'gpt2, 12 x 1,024': (case('gpt2', 12), 6.5, 23.5, 0.05, 0.1),
    'gpt2, 32 x 1,024 (H100)': (case('gpt2', 32), 14.5, 59.7, 0.05, 0.1),
    'gpt2-medium, 8 x 1,024': (case('gpt2-medium', 8), 11.8, 43.5, 0.05, 0.1),
    'gpt2-medium, 16 x 1,024 (H100)': (case('gpt2-medium', 16), 18.9, 82.6, 0.05, 0.1),
    'gpt2-xl, 16 x 1,024 (H100)': (case('gpt2-xl', 16), 60.1, 327, 0.05, 0.1),
    'gpt2, 2 x 32 x 1,024, data (H100)': (case('gpt2', 32, '2 1 1'), 14.5, 64.1, 0.05, 0.1),
    'gpt2, 2 x 32 x 1,024, fsdp (H100)': (case('gpt2', 32, '1 2 1'), 13.5, 63.1, 0.05, 0.1),
    'gpt2-medium, 2 x 16 x 1,024, data (H100)': (
        *(case('gpt2-medium', 16, '2 1 1'), 18.8, 91.9, 0.05, 0.1),
    ),
    'gpt2-xl, 2 x 16 x 1,024, fsdp (H100)': (
        *(case('gpt2-xl', 16, '1 2 1'), 52.9, 357, 0.05, 0.1),
    ),
    'characters, 64 x 256': (case(CHARACTERS, 64, dropout=0.2), 1.4, 4.01, 0.05, 0.1),
    'GPT-2 tokens, 64 x 256': (case(SMALL, 64, dropout=0.2), 3.6, 8.79, 0.1, 0.1),
}


@pytest.mark.parametrize('name', MEASURED)
def test_measured_runs(name):
    """Memory and time, and the line of docs/scale.md with both and how far the plan is off."""
    given, gib, ms, memory_bound, time_bound = MEASURED[name]
    planned = plan.plan(given, H200)
    gib_planned, time = planned.peak / memory.GIB, sum(planned.seconds.values()) * 1e3
    cells = [
        name,
        '',
        f'{gib_planned:.1f} GiB',
        '',
        f'{ms} ms',
        f'{time:.1f} ms',
        f'{time / ms - 1:+.1%}',
    ]
    if gib:
        assert gib_planned == pytest.approx(gib, rel=memory_bound)
        cells[1], cells[3] = f'{gib} GiB', f'{gib_planned / gib - 1:+.1%}'
    assert time == pytest.approx(ms, rel=time_bound)
    assert f'| {" | ".join(cells)} |' in SCALE.read_text('utf-8')


@pytest.mark.parametrize('algorithm', ['adamw', 'muon', 'fused'])
@pytest.mark.parametrize('mesh', ['1 1 1', '8 1 1', '1 8 1', '2 2 2', '1 1 4'])
def test_parameters_and_moments_are_those_of_the_state(mesh, algorithm):
    """30 tokens: 2 divides them, 4 does not. 6 positions. Muon also averages."""
    model = tiny(
        vocab_size=30, n_head=4, n_embd=32, n_positions=6, bias=mesh != '2 2 2', dtype='bfloat16'
    )
    sizes = tuple(map(int, mesh.split()))
    axes = dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
    params = shapes(model)
    assert parameter_shapes(model.cfg) == {name: leaf.shape for name, leaf in flat(params).items()}
    settings = AdamW(lambda step: 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0)
    optimizer, averages = make_optimizer(settings), algorithm == 'muon'
    if averages:
        optimizer = make_muon(settings, muon_schedule=lambda step: 1e-2, muon_beta=0.95)
    if algorithm == 'fused':
        optimizer = fused_optim.make_optimizer(settings, round_to=model.cfg.compute_dtype)
    state = jax.eval_shape(lambda: init_state(params_of(params), optimizer, averages))
    layout = partition.shardings(AbstractMesh(sizes, tuple(axes)), state)
    held = sum(
        math.prod(lies.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, lies in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True)
    )
    counters = sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if not leaf.shape)
    kind = 'muon' if algorithm == 'muon' else 'adamw'
    case = Case(model.cfg, axes, 8, 6, algorithm=kind, averages=averages)
    planned, _ = memory.memory(case, FUSED)
    names = ['parameters', 'moments', 'average of the parameters']
    if algorithm == 'fused' and axes['fsdp'] > 1:
        names.append('matrices of the shard, rounded')
    elif algorithm == 'fused':
        names.append('parameters as used')
    assert held - counters == sum(planned.get(name, 0) for name in names)


def params_of(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize('remat', ['none', 'block', 'dots'])
@pytest.mark.parametrize('residual_dtype', ['compute', 'float32'])
def test_activations_are_what_jax_keeps(remat, residual_dtype):
    """Residuals of the fused step with dropout, for each policy."""
    sizes = dict(n_layer=3, n_head=2, n_embd=64, n_positions=128, resid_pdrop=0.1, attn_pdrop=0.1)
    model = tiny(**sizes, remat=remat, dtype='bfloat16', residual_dtype=residual_dtype)
    cfg, B, T = model.cfg, 4, 128
    x_BTD = jax.ShapeDtypeStruct((B, T, cfg.n_embd), cfg.stream_dtype)
    params = fused_step.cast_kernels(cfg, params_of(shapes(model)))

    def pull_back(params, x_BTD):
        key = jax.random.key(0)
        return jax.vjp(lambda *args: fused_step.features(cfg, *args, key, FUSED), params, x_BTD)

    _, kept = jax.eval_shape(pull_back, params, x_BTD)
    of_tokens = [
        leaf for leaf in jax.tree.leaves(kept) if leaf.size >= B * T and leaf.shape[0] in (B, B * T)
    ]
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in of_tokens)
    if remat == 'none':  # the output of attention, as (B, T, H, K) and as (N, H, K)
        total -= cfg.n_layer * B * T * cfg.n_embd * 2
    last = B * T * (x_BTD.dtype.itemsize * cfg.n_embd + 8)  # ln_f keeps its input, not its output
    if remat != 'none':  # the first block has no branch before it
        last -= B * T * cfg.n_embd * 2
    assert total == cfg.n_layer * B * T * memory.kept(cfg, FUSED, T) + last


def test_collectives_and_their_rates():
    """Over the ring that sends least; within a host, and between hosts by the cards of a ring."""
    given = case('gpt2-xl', 16, '8 8 1')
    found = {(t.kind, t.axes): t for t in collectives(given, FUSED)}
    gather = found['all-gather', ('fsdp',)]
    scatter, reduce = found['reduce-scatter', ('fsdp',)], found['all-reduce', ('data',)]
    matrices = sum(used_elements(given.cfg, given.mesh))
    assert gather.sent == pytest.approx(gather.size * 7 / 8, rel=1e-6)
    assert scatter.size == pytest.approx(4 * matrices, rel=1e-3)
    assert reduce.size == scatter.size / 8
    assert reduce.sent == pytest.approx(reduce.size * 14 / 8, rel=1e-6)
    assert sending_rate(gather, given.mesh, H200) == H200.shard_bytes
    assert sending_rate(reduce, given.mesh, H200) == H200.network_bytes
    whole = {'data': 64, 'fsdp': 1, 'tensor': 1}
    assert sending_rate(reduce, whole, H200) == H200.reduce_bytes
    half = collectives(given._replace(reduce_dtype='bfloat16'), FUSED)
    assert next(t.size for t in half if t.kind == 'reduce-scatter') == scatter.size / 2
    assert collectives(case('gpt2', 12), FUSED) == []


def test_the_largest_batch_fits_and_the_next_does_not():
    given = case('gpt2-medium', 16, '2 1 1')
    rows = plan.largest_rows(given, H200, 0.5)
    assert rows % 2 == 0
    for more, fits in ((0, True), (2, False)):
        peak = plan.plan(given._replace(rows=rows + more), H200).peak
        assert (peak <= 0.5 * H200.memory) == fits
    assert plan.largest_rows(given, H200, 0.01) == 0
    by_policy = [
        plan.plan(case('gpt2', 32, remat=remat), H200).peak for remat in ('none', 'dots', 'block')
    ]
    assert by_policy == sorted(by_policy, reverse=True)


def test_the_tables_of_the_page_are_those_of_the_script():
    config = default_config()
    config.model.update(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, dtype='bfloat16')
    base = case_of(resolve(config), 50257)
    page = SCALE.read_text('utf-8')
    assert '\n'.join(plan.table(base, (1, 2, 8, 64), H200)) in page
    for gpu in GPUS.values():
        assert gpu.peak_flops == PEAK_BF16_FLOPS[gpu.kind]


def test_what_a_plan_says():
    config = default_config()
    config.mesh.data, config.mesh.fsdp, config.train.batch_size = 2, 5, 80
    config.train.grad_accum_steps = 2
    lines = '\n'.join(plan.describe(plan.plan(case_of(resolve(config), 65), H200), H200))
    assert '2 x 4 windows of 1,024 tokens a device, 81,920 tokens an update' in lines
    assert "attention: fused needs model.dtype = 'bfloat16'" in lines
    assert 'gradients of other micro-batches' in lines
    assert re.search(r'by model.remat: none [\d.]+ GiB, dots [\d.]+ GiB, block [\d.]+ GiB', lines)
    assert 'h_*/mlp/c_fc/kernel: 768 is not a multiple of mesh.fsdp = 5' in lines
    assert 'no measured rates' in lines


def test_a_plan_that_does_not_fit_says_so():
    h100 = GPUS['h100']
    for rows, fits in ((14, True), (64, False)):
        planned = plan.plan(case('gpt2-xl', rows), h100)
        lines = '\n'.join(plan.describe(planned, h100))
        assert ('it does not fit: JAX has 59.3 GiB of a device' in lines) != fits
    row = next(line for line in plan.table(case('gpt2', 1), [1], h100) if '| gpt2-xl |' in line)
    assert '| 60.3 GiB: too much |' in row
    with pytest.raises(UsageError, match=r'gpt2-large on 12 GPUs: .* whole hosts of 8; give a mul'):
        list(plan.table(case('gpt2', 1), [12], H200))


def test_the_script_names_what_is_wrong():
    config = f'--config={SCALE.parents[1] / "configs" / "gpt2_124m.py"}'
    code, _, err = runs.script('plan', config, '--table=1,two')
    assert code == 2
    assert '--table takes numbers of GPUs' in err
    code, out, _ = runs.script('plan', config, '--table=1', '--gpu=h100')
    assert code == 0
    assert len(out.splitlines()) == 2 + len(SCALE_CASES)


def test_what_a_dimension_costs_that_does_not_divide():
    """Two blocks of 2^20 x 7: each device holds 7 columns instead of 3.5, in fp32, three times."""
    mesh = {'data': 1, 'fsdp': 1, 'tensor': 2}
    leaves = [
        ('h_0/mlp/c_fc/kernel', (2**20, 7)),
        ('h_1/mlp/c_fc/kernel', (2**20, 7)),
        ('ln_f', (3,)),
    ]
    (line,) = rules.undivided(leaves, mesh)
    assert line.startswith('h_*/mlp/c_fc/kernel: 7 is not a multiple of mesh.tensor = 2')
    assert line.endswith(' 84.0 MiB more than its share, moments included')
    assert not list(rules.undivided(leaves, mesh | {'tensor': 7}))
    assert rules.local_size(*leaves[0], mesh) == 7 * 2**20
