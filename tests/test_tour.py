"""The tour: its cells run in order, and the outputs that are stored with it are whole."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_text

ROOT = Path(__file__).parents[1]
TOUR = ROOT / 'docs' / 'tour.ipynb'
# What stands in the place of the cell with the parameters. One layer, a text in the style of the
# corpus, a few updates: the same cells, in seconds.
PARAMETERS = """
folder = Path('tour')
changes = {
    'data.corpus': 'verse.txt',
    'model.n_layer': 1,
    'model.n_head': 2,
    'model.n_embd': 16,
    'model.n_positions': 32,
    'train.steps': 2,
    'eval.every': 2,
    'eval.tokens': 64,
    'eval.sample_tokens': 0,
}
"""
SHOW = """
def show(x):
    print(x._repr_svg_() if hasattr(x, '_repr_svg_') else x)
"""


@pytest.fixture(scope='module')
def cells():
    return json.loads(TOUR.read_text('utf-8'))['cells']


def code(cells) -> list[dict]:
    return [cell for cell in cells if cell['cell_type'] == 'code']


def program(cells) -> str:
    """The code of all cells as one script, which prints what a notebook shows below a cell."""
    parts = [SHOW]
    for cell in code(cells):
        source = ''.join(cell['source'])
        if 'parameters' in cell['metadata'].get('tags', []):
            source = PARAMETERS
        tree = ast.parse(source)
        if isinstance(tree.body[-1], ast.Expr) and not source.endswith(';'):
            tree.body[-1].value = ast.Call(ast.Name('show'), [tree.body[-1].value], [])
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
    return '\n'.join(parts)


def test_every_cell_runs(cells, tmp_path):
    """As one script in a process of its own: no notebook server has to be installed for it."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    verse = write_text(tmp_path / 'verse.txt').read_text('utf-8')
    (tmp_path / 'verse.txt').write_text(verse + 'ROMEO:\nIs the day so young?\nmy look good\n')
    (tmp_path / 'tour.py').write_text(program(cells), 'utf-8')
    done = subprocess.run(
        [sys.executable, 'tour.py'],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pictures = [output for cell in code(cells) for output in cell['outputs'] if 'data' in output]
    assert done.stdout.count('<svg') == len(pictures)


def test_the_outputs_are_stored_and_small(cells):
    assert TOUR.stat().st_size < 1e6
    assert [cell['execution_count'] for cell in code(cells)] == [*range(1, len(code(cells)) + 1)]
    outputs = [output for cell in code(cells) for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} == {'stream', 'execute_result'}
    assert {output.get('name') for output in outputs} <= {'stdout', None}  # no warning, no error
    pictures = [output['data']['image/svg+xml'] for output in outputs if 'data' in output]
    assert len(pictures) >= 10
    for picture in pictures:
        assert 'aria-label="' in ''.join(picture)
