"""The structure of the package: imports point down, data/ loads no JAX, scripts are short."""

import ast
import functools
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {
    '.'.join(path.relative_to(ROOT / 'gpt2_jax').with_suffix('').parts): path
    for path in sorted((ROOT / 'gpt2_jax').rglob('*.py'))
    if path.stem != '__init__'
}
SCRIPTS = sorted((ROOT / 'scripts').glob('*.py'))

# From the ground up: a file may import the files of the lines above its own, and no others.
LAYERS = (
    'errors',
    'architecture permutation signals',
    'foreign progress',
    'files terminal',
    'config verified',
    # data: from raw text to the batch of a step
    'data.documents data.vocabulary data.id_files',
    'data.tokenizers',
    'data.corpora data.dataset',
    'data.shards data.bin_files data.batches',
    'data.load',
    # model: GPT-2 as a pure function of its parameters
    'model.dropout model.ops',
    'model.loss model.gpt2',
    'model.params',
    'model.huggingface',
    # parallel: which devices, and how arrays lie on them
    'parallel.devices parallel.mesh parallel.rules',
    'parallel.partition',
    'parallel.faults parallel.feed parallel.collectives parallel.hosts',
    # kernels: the same formulas as GPU kernels
    'kernels.choose',
    'kernels.launch',
    'kernels.attention kernels.norm kernels.gelu kernels.embedding kernels.adamw',
    'kernels.gelu_product kernels.decode kernels.sample',
    # workdir: what a run leaves in its folder, and reading it back
    'workdir.folder workdir.events workdir.checksums workdir.fit',
    'workdir.log',
    'workdir.storage workdir.history',
    'workdir.checkpoints',
    'workdir.restore',
    # lens: what happens inside one forward and backward pass
    'lens.sites lens.subject',
    'lens.activations',
    'lens.interventions lens.readings lens.hessian lens.jaxpr',
    'lens.flow',
    'lens.report',
    # training: one update, and the loop around it
    'training.optim',
    'training.muon',
    'training.step training.fused_step training.fused_optim',
    'training.setup',
    'training.programs training.meter',
    'training.start training.loop',
    # inference: text from a trained model, and its figures on any text
    'inference.sampling inference.detokenizers',
    'inference.decoding inference.texts inference.evaluate',
    'inference.streaming inference.score',
    'inference.lambada inference.harness',
    # speed: memory and time, on paper and measured
    'speed.case',
    'speed.memory',
    'speed.timing',
    'speed.plan speed.benchmark speed.time_to_loss speed.profile',
    'speed.scale',
    # diagnostics: what a run is, and what happened in it
    'diagnostics.describe diagnostics.ngrams diagnostics.origins',
    'diagnostics.ledger',
    'diagnostics.replay diagnostics.probes',
    'diagnostics.autopsy',
    # reports: what was found, for people
    'reports.html reports.flow reports.terminal',
    'reports.step reports.over_time reports.model',
    'reports.run reports.autopsy',
    'reports.compare',
    # the roof: one file a script, and what a run does now and then
    'hooks convert prepare library',
    'look',
    'train',
    'cli',
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
PACKAGES = (
    'data',
    'model',
    'parallel',
    'kernels',
    'workdir',
    'lens',
    'training',
    'inference',
    'speed',
    'diagnostics',
    'reports',
)
NO_JAX = (
    'architecture',
    'config',
    'files',
    'foreign',
    'permutation',
    'progress',
    'signals',
    'terminal',
    'verified',
    'cli',
    'prepare',
    'inference.detokenizers',
    'inference.texts',
    'workdir.folder',
    'workdir.checksums',
    'workdir.history',
    'diagnostics.origins',
    'diagnostics.ledger',
    'diagnostics.ngrams',
    'kernels.choose',
    'parallel.rules',
    'speed.case',
    'speed.memory',
    'speed.timing',
    'speed.plan',
    *(name for name in PACKAGE if name.startswith('data.')),
)


def imports(path: Path) -> set[str]:
    """Full names of all imports of a file, also inside functions: 'jax.numpy', 'gpt2_jax.x'."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The files of the package that a file imports: {'training.step', 'model.gpt2'}."""
    found = set()
    for name in imports(path):
        parts = name.split('.')
        if parts[0] == 'gpt2_jax' and len(parts) > 1:
            known = [n for n in ('.'.join(parts[1:3]), parts[1]) if n in PACKAGE]
            assert known, f'{path} imports {name}, which is no file'
            found.add(known[0])
    return found


def test_every_file_has_its_layer():
    assert set(PACKAGE) == set(LEVEL)


def test_packages_are_whole_layers():
    """Packages lie one above the other: no file of one is between two files of another."""
    order = [
        name.split('.')[0] if '.' in name else '' for layer in LAYERS for name in layer.split()
    ]
    seen = [
        package for package, before in zip(order, [None, *order], strict=False) if package != before
    ]
    assert [package for package in seen if package] == list(PACKAGES)


@pytest.mark.parametrize('name', PACKAGE)
def test_imports_point_down(name):
    wrong = [other for other in ours(PACKAGE[name]) if LEVEL[other] >= LEVEL[name]]
    assert not wrong, f'{name} imports {wrong}'


@pytest.mark.parametrize('name', PACKAGE)
def test_no_file_uses_what_is_private_to_another(name):
    assert not [
        full
        for full in imports(PACKAGE[name])
        if full.startswith('gpt2_jax.') and full.split('.')[-1].startswith('_')
    ]


def test_packages_are_small():
    for package in PACKAGES:
        files = [name for name in PACKAGE if name.startswith(f'{package}.')]
        assert len(files) <= 10, f'{package} has {len(files)} files'
        if package != 'lens':  # which is also a library: its __init__ is the list of its functions
            assert (ROOT / 'gpt2_jax' / package / '__init__.py').read_text() == ''


@pytest.mark.parametrize('name', NO_JAX)
def test_imports_no_jax(name):
    assert ours(PACKAGE[name]) <= {*NO_JAX, 'errors'}
    outside = {full.split('.')[0] for full in imports(PACKAGE[name])}
    assert not outside & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}


def test_loads_no_jax():
    """A wrong flag is reported, and a text prepared, without waiting for JAX to load."""
    modules = ', '.join(f'gpt2_jax.{name}' for name in NO_JAX)
    program = f'import sys, {modules}; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60).returncode == 0


def test_the_model_knows_nothing_but_jax_and_flax():
    for name in ('model.gpt2', 'model.ops', 'model.dropout', 'model.params'):
        outside = {full.split('.')[0] for full in imports(PACKAGE[name])} - set(
            sys.stdlib_module_names
        )
        assert outside <= {'jax', 'flax', 'gpt2_jax'}
        assert all(
            other == 'architecture' or other.startswith('model.') for other in ours(PACKAGE[name])
        )
        assert not {'os', 'pathlib', 'sys'} & imports(PACKAGE[name])


def test_the_model_fits_one_reading():
    """GPT-2 and nothing else: no gradient by hand, no padding, no barrier, no cuDNN."""
    source = PACKAGE['model.gpt2'].read_text('utf-8')
    assert code_lines(PACKAGE['model.gpt2']) <= 200
    for word in ('custom_vjp', 'custom_jvp', 'defvjp', 'jnp.pad', 'barrier', 'cudnn'):
        assert word not in source


def code_lines(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    source, lines = path.read_text('utf-8'), set()
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_lines_are_counted_right(tmp_path):
    (tmp_path / 'x.py').write_text(
        '"""Doc\n\nstring."""\n\n# comment\nx = """a\nb"""  # counts\n\n\ndef f():\n'
        '    """Doc."""\n    return (1,\n            # no\n            2)\n'
    )
    assert code_lines(tmp_path / 'x.py') == 5


@functools.cache
def imported_packages() -> set[str]:
    return {full.split('.')[0] for path in PACKAGE.values() for full in imports(path)}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_shadow_nothing(path):
    """scripts/ comes first on the path of a script: JAX would import a file inspect.py there."""
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in imported_packages()
    flag_lines = {
        line
        for node in ast.parse(path.read_text('utf-8')).body
        if isinstance(node, ast.Assign)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    assert code_lines(path) - len(flag_lines) < 60
