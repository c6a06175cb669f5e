"""The house itself: imports point down, the data layer knows no JAX, scripts shadow nothing, the code stays small."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {path.stem: path for path in (ROOT / 'gpt2_jax').glob('*.py') if path.stem != '__init__'}
SCRIPTS = sorted((ROOT / 'scripts').glob('*.py'))

# From the ground up: a file may import those of the lines above its own, and no other.
LAYERS = (
    'errors',
    'config detokenizers documents published run_folder writers',
    'vocabulary',
    'tokenizers',
    'corpora shards',
    'batches token_files',
    'data texts',
    'model triton_call',
    'attention_kernel norm_kernel gelu_kernel loss_kernel adamw_kernel decode_kernels optim',
    'fused parallel huggingface',
    'step',
    'checkpoint evaluate generate',
    'recipe',
    'benchmark convert finetune score',
    'lambada train',
    'cli',
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
# Of no part in the way from one's own text to sampled verse: speed, and what is published by others, or scored on it.
BESIDE = ('adamw_kernel', 'attention_kernel', 'benchmark', 'convert', 'decode_kernels', 'detokenizers', 'documents',
          'finetune', 'fused', 'gelu_kernel', 'huggingface', 'lambada', 'loss_kernel', 'norm_kernel', 'published',
          'score', 'texts', 'token_files', 'triton_call', 'vocabulary')
NO_JAX = ('config', 'detokenizers', 'documents', 'published', 'vocabulary', 'tokenizers', 'corpora', 'shards',
          'batches', 'token_files', 'data', 'texts', 'cli')


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, also inside functions: 'jax.numpy', 'gpt2_jax.step'."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The files of the package that a file imports: {'step', 'model'}."""
    parts = [name.split('.') for name in imports(path) if name.startswith('gpt2_jax.')]
    assert all(part[1] in PACKAGE for part in parts), f'{path} imports from gpt2_jax/__init__.py'
    return {part[1] for part in parts}


def test_every_file_has_its_layer():
    assert set(PACKAGE) <= set(LEVEL)


@pytest.mark.parametrize('name', PACKAGE)
def test_imports_point_down(name):
    wrong = [other for other in ours(PACKAGE[name]) if LEVEL[other] >= LEVEL[name]]
    assert not wrong, f'{name} imports {wrong}'
    assert 'cli' not in ours(PACKAGE[name])


@pytest.mark.parametrize('name', NO_JAX)
def test_what_knows_no_jax(name):
    assert set(ours(PACKAGE[name])) <= set(NO_JAX) | {'errors'}
    outside = {full.split('.')[0] for full in imports(PACKAGE[name])}
    assert not outside & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}


def test_what_knows_no_jax_loads_none():
    """Neither do the libraries these files import: a flag is refused, and a text prepared, without waiting for JAX."""
    program = f'import sys, {", ".join(f"gpt2_jax.{name}" for name in NO_JAX)}; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60).returncode == 0


def test_the_model_knows_nothing_but_jax_and_flax():
    outside = {full.split('.')[0] for full in imports(PACKAGE['model'])} - set(sys.stdlib_module_names)
    assert outside == {'jax', 'flax'}
    assert not {'os', 'pathlib', 'sys'} & imports(PACKAGE['model'])


def code_lines(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    source, lines = path.read_text('utf-8'), set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_lines_are_counted_right(tmp_path):
    (tmp_path / 'x.py').write_text('"""Doc\n\nstring."""\n\n# comment\nx = """a\nb"""  # counts\n\n\ndef f():\n'
                                   '    """Doc."""\n    return (1,\n            # no\n            2)\n')
    assert code_lines(tmp_path / 'x.py') == 5


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_shadow_nothing(path):
    """scripts/ comes first on the path of every script: a file inspect.py there would be imported by JAX."""
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in {full.split('.')[0] for other in PACKAGE.values() for full in imports(other)}
    assert code_lines(path) < 60


def test_the_package_is_small():
    """From raw text to sampled verse in an afternoon's reading: about 2,000 lines, and what they need to be fast."""
    assert sum(code_lines(path) for name, path in PACKAGE.items() if name not in BESIDE) <= 2220
