"""docs/induction.md: a two-layer model grows an induction head, and needs it."""

import contextlib
import io
import re
import runpy
from pathlib import Path

from runs import quiet_train

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'induction.md'


def test_the_head_grows_and_the_model_needs_it(tmp_path, monkeypatch):
    """By the program of the page; with one head a layer and a steady learning rate, so sooner."""
    config = runpy.run_path(str(ROOT / 'configs' / 'induction.py'))['get_config']()
    config.model.n_head, config.model.initializer_range = 1, 0.15
    config.optim.end_learning_rate = 3e-3
    config.train.steps = 1000
    config.eval.every, config.eval.tokens, config.eval.sample_tokens = 1000, 1024, 0
    monkeypatch.chdir(tmp_path)
    assert quiet_train(config, Path('runs/induction'))[0] == 0
    program = re.search(r'```python\n(.*?)```', PAGE.read_text('utf-8'), re.DOTALL)[1]
    Path('program.py').write_text(program)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = runpy.run_path('program.py')
    assert found['name'] == 'h_1.attn.0'
    assert found['scores'].induction.max() > 0.3
    assert found['scores'].previous[0].max() > 0.2
    assert found['without'] >= 2 * found['plain'], out.getvalue()
