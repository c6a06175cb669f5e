"""One device equals eight: the same runs on meshes of simulated devices, in one process."""

import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.parallel import feed
from gpt2_jax.parallel.devices import peak_flops

# data x fsdp x tensor
ONE, DATA, FSDP, ALL, TENSOR = '1 1 1', '8 1 1', '2 4 1', '2 2 2', '1 1 4'
# The runs of one process. ALL has the axes of the meshes that only --long runs.
GROUPS = {'few': (ONE, ALL), 'long': (ONE, DATA, FSDP, TENSOR)}
MESHES = [
    pytest.param(mesh, group, id=mesh, marks=pytest.mark.long if group == 'long' else ())
    for group, meshes in GROUPS.items()
    for mesh in meshes
]
# Fused kernels, interpreted, on two devices: fewer rows, and positions in whole blocks.
FUSED_MESHES = ('2 1 1', '1 2 1')
FUSED_COLLECTIVES = {
    '2 1 1': {'all-reduce'},
    '1 2 1': {'all-gather', 'reduce-scatter', 'all-reduce'},
}
FUSED_SIZES = {'rows': 4, 'heads': 2, 'T': 64, 'steps': 2}
STEPS, ROWS, ACCUMULATE, HEADS, T = 4, 32, 2, 4, 6


def make_setup(
    mesh_sizes: str,
    corpus: str,
    fused=False,
    *,
    rows=ROWS,
    heads=HEADS,
    T=T,
    steps=STEPS,
    algorithm='adamw',
):
    """The setup of a small run on a mesh. Muon with an average of the parameters."""
    from gpt2_jax.config import default_config, resolve
    from gpt2_jax.kernels.choose import FUSED, XLA
    from gpt2_jax.training import setup as setup_lib

    config = default_config()
    config.model.update(
        n_layer=1,
        n_head=heads,
        n_embd=32,
        n_positions=T,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        resid_pdrop=0.1,
    )
    config.data.corpus = corpus
    config.train.update(steps=steps, batch_size=rows, grad_accum_steps=ACCUMULATE)
    config.optim.update(learning_rate=1e-2, warmup_steps=1, algorithm=algorithm)
    config.optim.average = 0.5 if algorithm == 'muon' else 0.0
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = map(int, mesh_sizes.split())
    with mock.patch.object(setup_lib, 'choose', return_value=(FUSED if fused else XLA, {})):
        return setup_lib.build(resolve(config))


def run_on(mesh_sizes: str, corpus: str, fused: bool = False, steps: int = STEPS, **sizes) -> dict:
    """A few updates and an evaluation on one mesh, and how the state is sharded."""
    from tiny import flat

    from gpt2_jax.diagnostics.describe import describe
    from gpt2_jax.kernels.choose import FUSED
    from gpt2_jax.parallel import mesh
    from gpt2_jax.speed.case import case_of
    from gpt2_jax.speed.timing import collectives
    from gpt2_jax.training import programs

    setup, lowered = make_setup(mesh_sizes, corpus, fused, steps=steps, **sizes), []

    def compile_and_keep(mesh, function):
        def call(*args):
            if not compiled:
                compiled.append(function.lower(*args).compile())
                lowered.append(compiled[0].as_text())
            return one_at_a_time(mesh, compiled[0])(*args)

        compiled = []
        return call

    one_at_a_time = mesh.one_at_a_time
    evaluation = importlib.import_module('gpt2_jax.inference.evaluate')
    with (
        mock.patch.object(programs, 'one_at_a_time', compile_and_keep),
        mock.patch.object(evaluation, 'one_at_a_time', compile_and_keep),
    ):
        train_step, evaluate = programs.compile_train_step(setup), make_evaluate(setup)
    state, records = programs.new_state(setup), []
    for step in range(steps):
        state, metrics = train_step(
            state,
            feed.train_batch(setup.mesh, setup.dataset.train, step=step, **setup.batch_options),
        )
        records.append({name: float(value) for name, value in metrics.items()})
    sizes = {name: leaf.size for name, leaf in flat(state).items()}
    stored = {
        name: max(piece.data.size for piece in leaf.addressable_shards)
        for name, leaf in flat(state).items()
    }
    return {
        'records': records,
        'evaluation': evaluate(state.evaluated)._asdict(),
        'programs': lowered,
        'devices': [device.id for device in setup.mesh.devices.flat],
        'sizes': sizes,
        'stored': stored,
        'described': list(describe(setup)),
        'planned': collectives(case_of(setup.config, setup.model.cfg.vocab_size), FUSED),
    }


def restore_tour(corpus: str) -> list[str]:
    """A state saved on each mesh and restored on the next.

    Returns the leaves that are not bit-equal, and those that were saved with replicas.
    """
    import jax
    import orbax.checkpoint as ocp
    from tiny import flat

    from gpt2_jax.training import programs
    from gpt2_jax.workdir.checkpoints import Checkpoints

    meta = {'config': '', 'tokenizer': '', 'progress': {}, 'log_sizes': {}}
    meta['corpus'] = {'name': '', 'sha256': '', 'fallback': False}
    first, with_replicas, save = None, [], ocp.CheckpointManager.save

    def look_and_save(manager, step, *, args, **options):
        with_replicas.extend(
            f'{name} on {leaf.sharding}'
            for item in ('params', 'train')
            for name, leaf in flat(args[item].item).items()
            if any(part.replica_id for part in leaf.addressable_shards)
        )
        return save(manager, step, args=args, **options)

    for step, mesh_sizes in enumerate((ALL, TENSOR, DATA, ONE)):
        setup = make_setup(mesh_sizes, corpus)
        with Checkpoints(Path(corpus).with_name('tour')) as checkpoints:
            if first is None:
                state = programs.new_state(setup)
                first = {name: np.asarray(leaf) for name, leaf in flat(state).items()}
            else:
                state = checkpoints.restore(step - 1, programs.abstract_state(setup))
            numbered = state.replace(step=jax.device_put(np.int32(step), setup.layout.step))
            with mock.patch.object(ocp.CheckpointManager, 'save', look_and_save):
                checkpoints.save(step, numbered, meta, None)
    del first['step']
    different = [n for n, leaf in first.items() if not np.array_equal(leaf, flat(state)[n])]
    return different + with_replicas


def fused_updates() -> list[str]:
    """What two updates of the fused optimizer on a mesh do differently from optax on one device.

    The mesh does not divide 3 heads, so matrices of one block are on 2 and on 4 devices.
    """
    import jax
    import jax.experimental.pallas.fuser  # once loaded, all is compiled again
    from tiny import flat, rough_params, tiny

    from gpt2_jax.parallel.mesh import make_mesh
    from gpt2_jax.parallel.partition import shardings
    from gpt2_jax.training import fused_optim
    from gpt2_jax.training.optim import AdamW, apply_update, make_optimizer, round_kernels

    settings = AdamW(lambda step: 1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, clip_norm=0.1)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    fused = fused_optim.make_optimizer(settings, round_to='bfloat16', mesh=mesh)
    params = rough_params(tiny(n_layer=1, n_head=3, n_embd=48, vocab_size=30))
    after = []
    for optimizer in (fused, make_optimizer(settings)):
        new = params, optimizer.init(params)
        update = jax.jit(functools.partial(apply_update, optimizer))
        for factor in (0.1, -0.03):
            grads = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
            if optimizer is fused:
                new = jax.device_put(new, shardings(mesh, new))
            *new, rounded, norms = update(grads, *reversed(new))
        rounded = rounded or round_kernels(new[0], 'bfloat16')
        after.append(jax.device_get(flat((new, rounded, norms))))
    ours, theirs = after
    assert ours.keys() == theirs.keys()
    tolerance = {'float32': 1e-5, 'bfloat16': 1e-2, 'int32': 0}
    return [
        name
        for name, leaf in theirs.items()
        if not np.allclose(ours[name], leaf, rtol=tolerance[leaf.dtype.name], atol=1e-6)
    ]


def run_all(folder: Path, group: str) -> dict[str, dict]:
    """The runs of this file's last lines, in a process of eight devices."""
    # 2 divides this vocabulary, 4 does not.
    letters = [chr(code) for code in range(97, 97 + 30)]
    text = ''.join(np.random.default_rng(0).choice(letters, 1500))
    (folder / 'text.txt').write_text(text)
    done = subprocess.run(
        [sys.executable, '-W', 'error', __file__, str(folder / 'text.txt'), group],
        text=True,
        timeout=900,
        capture_output=True,
        env=os.environ
        | {
            'JAX_NUM_CPU_DEVICES': '8',
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_backend_optimization_level=0',
        },
    )  # compiles sooner
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope='module')
def results(tmp_path_factory) -> Callable[[str], dict[str, dict]]:
    """The runs of a group, which are made when they are first asked for."""
    return functools.cache(lambda group: run_all(tmp_path_factory.mktemp('parallel'), group))


@pytest.mark.parametrize(('mesh', 'group'), MESHES)
def test_training_equals_one_device(results, mesh, group):
    """Loss, norms and learning rate of every step, with dropout and two micro-batches."""
    runs = results(group)
    losses = [record['loss'] for record in runs[ONE]['records']]
    assert len(set(losses)) == STEPS
    n_devices = math.prod(map(int, mesh.split()))
    assert runs[mesh]['devices'] == ([7] if mesh == ONE else list(range(n_devices)))
    for ours, theirs in zip(runs[mesh]['records'], runs[ONE]['records'], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.long
def test_muon_and_an_average_equal_one_device(results):
    """Matrices that are sharded are orthogonalised whole; what is kept of them is sharded."""
    run, one = (results('muon')[mesh] for mesh in (ALL, ONE))
    for ours, theirs in zip(run['records'], one['records'], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert run['evaluation'] == pytest.approx(one['evaluation'], rel=1e-5)
    kernels = [name for name in run['sizes'] if name.endswith('kernel')]
    assert len(kernels) == 3 * 4  # parameters, their mean gradient and their average
    assert {run['sizes'][name] / run['stored'][name] for name in kernels} == {4}


def test_a_checkpoint_of_any_mesh_restores_on_any_other(results):
    assert results('few')['tour'] == []


@pytest.mark.long
@pytest.mark.parametrize('mesh', FUSED_MESHES)
def test_fused_kernels_on_a_mesh_equal_one_device(results, mesh):
    """Each device on its own rows, with the dropout masks of the whole batch."""
    fused, one = results('fused')[mesh], results('fused')[ONE]
    assert len(fused['devices']) == 2
    for ours, theirs in zip(fused['records'], one['records'], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    kernels = [name for name in fused['sizes'] if name.endswith('kernel')]
    pieces = {fused['sizes'][name] / fused['stored'][name] for name in kernels}
    assert pieces == {int(mesh.split()[1])}
    collectives = re.findall(r' (all-[a-z]+|reduce-scatter)\(', fused['programs'][0])
    assert set(collectives) == FUSED_COLLECTIVES[mesh]
    assert fused['evaluation'] == pytest.approx(one['evaluation'], rel=1e-5)
    collectives = re.findall(r' (all-[a-z]+|reduce-scatter)\(', fused['programs'][1])
    assert set(collectives) == FUSED_COLLECTIVES[mesh] & {'all-gather'}


@pytest.mark.parametrize('several', [False, True])
def test_sums_of_gradients_wait_for_the_backward_pass_in_one_process(monkeypatch, several):
    import jax
    import jax.numpy as jnp

    from gpt2_jax.parallel import collectives
    from gpt2_jax.parallel.mesh import make_mesh

    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    monkeypatch.setattr(type(mesh), 'is_multi_process', several)

    def loss_and_grads(params, rows, key, n_targets):
        return jax.value_and_grad(lambda params: (rows @ params['w']).sum())(params)

    run = collectives.on_own_rows(mesh, loss_and_grads, lambda params: params, 'float32')
    traced = jax.make_jaxpr(run, static_argnums=3)(
        {'w': jnp.ones(3)}, jnp.ones((2, 3)), jax.random.key(0), 1
    )
    operations = re.findall(r'optimization_barrier|psum', str(traced))
    assert operations == ['optimization_barrier'] * (not several) + ['psum', 'psum']


def test_shards_are_gathered_and_sums_scattered_along_a_first_axis(monkeypatch):
    """Along any other axis, XLA transposes the shards on a GPU."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh, AxisType

    from gpt2_jax.parallel import collectives

    mesh = AbstractMesh((1, 2, 1), ('data', 'fsdp', 'tensor'), (AxisType.Auto,) * 3)
    monkeypatch.setattr(AbstractMesh, 'is_multi_process', False, raising=False)
    params = {
        'wte': {'embedding': jnp.ones((3, 4))},
        'mlp': {'c_proj': {'kernel': jnp.ones((6, 4))}},
    }
    run = collectives.on_own_rows(
        mesh, lambda params, *_: (jnp.float32(0), params), lambda params: params, 'float32'
    )
    traced = str(
        jax.make_jaxpr(run, static_argnums=3)(params, jnp.ones((2, 3)), jax.random.key(0), 1)
    )
    axes = re.findall(r'(?:all_gather|scatter)_dimension=(\d)', traced)
    assert axes == ['0'] * 4


@pytest.mark.parametrize('mesh', [DATA, FSDP, TENSOR])
def test_norms_of_the_fused_optimizer_are_sums_over_the_devices(mesh):
    """The sums of squares of the gradients, and those of updates and parameters together."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh, AxisType

    from gpt2_jax.training import fused_optim
    from gpt2_jax.training.optim import AdamW

    axes = ('data', 'fsdp', 'tensor')
    optimizer = fused_optim.make_optimizer(
        AdamW(lambda step: 1e-3, 0.9, 0.99, 1e-8, weight_decay=0.1, clip_norm=1.0),
        mesh=AbstractMesh(tuple(map(int, mesh.split())), axes, (AxisType.Auto,) * 3),
    )
    params = {'mlp': {'c_fc': {'kernel': jnp.ones((32, 32)), 'bias': jnp.ones(32)}}}
    traced = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    sums = re.findall(r'= psum\w*\[', str(traced))
    assert len(sums) == 2


def test_fused_updates_on_a_mesh_equal_those_of_optax(results):
    assert results('few')['updates'] == []


@pytest.mark.long
@pytest.mark.parametrize('mesh', FUSED_MESHES)
def test_a_plan_has_the_bytes_of_the_collectives(results, mesh):
    """Those of the compiled update, apart from a few scalars: the loss and the norms."""
    sizes = dict.fromkeys(FUSED_COLLECTIVES[mesh], 0)
    run = results('fused')[mesh]
    program = run['programs'][0]
    for shapes, kind in re.findall(r' = (.+?) (all-[a-z]+|reduce-scatter)\(', program):
        pieces = 2 if kind == 'reduce-scatter' else 1
        for shape in re.findall(r'f32\[([\d,]*)\]', shapes):
            sizes[kind] += 4 * pieces * math.prod(int(n) for n in shape.split(',') if n)
    planned = dict.fromkeys(sizes, 0)
    for _, kind, _, size, _ in run['planned']:
        planned[kind] += size
    scalars = sizes.pop('all-reduce') - planned.pop('all-reduce')
    assert sizes == planned
    assert 0 < scalars <= 32


@pytest.mark.parametrize(('mesh', 'group'), MESHES)
def test_a_run_names_what_its_mesh_does_not_divide(results, mesh, group):
    lines = [line for line in results(group)[mesh]['described'] if line.startswith('undivided')]
    assert len(lines) == (mesh == TENSOR)
    assert all('wte/embedding: 30' in line for line in lines)


@pytest.mark.parametrize(('mesh', 'group'), MESHES)
def test_evaluation_equals_one_device(results, mesh, group):
    runs = results(group)
    assert runs[mesh]['evaluation'] == pytest.approx(runs[ONE]['evaluation'], rel=1e-5)
    assert runs[mesh]['evaluation']['tokens'] == 149


@pytest.mark.parametrize(('mesh', 'group'), MESHES)
def test_matrices_and_their_moments_are_sharded(results, mesh, group):
    """ZeRO: no device holds a whole matrix or its moments, before and after updates."""
    run, (_, fsdp, tensor) = results(group)[mesh], map(int, mesh.split())
    sizes, stored = run['sizes'], run['stored']
    kernels = [name for name in sizes if name.endswith('kernel')]
    assert len(kernels) == 3 * 4  # parameters and two moments
    assert {sizes[name] / stored[name] for name in kernels} == {fsdp * tensor}
    embeddings = {name: sizes[name] / stored[name] for name in sizes if name.endswith('embedding')}
    assert len(embeddings) == 3 * 2
    for name, parts in embeddings.items():
        assert parts == fsdp * (tensor if 'wte' in name and 30 % tensor == 0 else 1)


@pytest.mark.parametrize(('mesh', 'group'), MESHES)
def test_each_device_computes_its_own_rows(results, mesh, group):
    """No device computes another's share or moves activations to another one.

    Sharded parameters are gathered for use: else XLA splits and moves the activations.
    """
    run, (data, fsdp, tensor) = results(group)[mesh], map(int, mesh.split())
    rows, heads = ROWS // ACCUMULATE // data // fsdp, HEADS // tensor
    assert len(run['programs']) == 2  # update and evaluation
    for program in run['programs']:
        products = re.findall(r'= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(', program)
        scores = {shape for shape in products if shape.endswith(f'{T},{T}')}
        assert scores == {','.join(str(n) for n in (rows, heads, T, T) if n > 1)}
        assert 'all-to-all' not in program


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('NVIDIA H100 80GB HBM3', 989.4e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H200', 989.4e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L40', None),
        ('NVIDIA H200 NVL', None),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
        ('cpu', None),
    ],
)
def test_the_peak_of_an_unlisted_device_is_unknown(kind, peak):
    """It is never guessed: devices with similar names may differ by a factor of two."""
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


if __name__ == '__main__':
    import jax

    from gpt2_jax.training import programs

    programs.DRAW_OPTIONS['cpu'] = {}  # compiles sooner, as above
    _, text_path, group = sys.argv
    if group == 'muon':
        results = {mesh: run_on(mesh, text_path, algorithm='muon') for mesh in (ONE, ALL)}
    elif group == 'fused':
        results = {ONE: run_on(ONE, text_path, **FUSED_SIZES)}
        for mesh in FUSED_MESHES:
            results[mesh] = run_on(mesh, text_path, fused=True, **FUSED_SIZES)
    else:
        with jax.default_device(jax.devices()[-1]):  # the device of a mesh of one
            results = {mesh: run_on(mesh, text_path) for mesh in GROUPS[group]}
        if group == 'few':
            results['tour'] = restore_tour(text_path)
            results['updates'] = fused_updates()
    print(json.dumps(results))
