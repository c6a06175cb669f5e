"""A page: one HTML file with its style, its scripts and its data inside.

It loads nothing: its content security policy forbids every request. The scripts are plain
JavaScript, in page/: elements.js for all pages, charts.js, and the scripts of each kind.
"""

import base64
import gzip
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import files

PAGE = Path(__file__).with_name('page')
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# The scripts of each kind of page, after elements.js. Each uses names of those before it only.
SCRIPTS = {
    'step': ('charts.js', 'step.js'),
    'run': ('charts.js', 'run.js', 'run_over_time.js'),
    'compare': ('charts.js', 'compare.js'),
    'autopsy': ('charts.js', 'autopsy.js'),
    'model': (
        'model_data.js',
        'model_draw.js',
        'model_attention.js',
        'model_views.js',
        'model.js',
    ),
}


def write_page(kind: str, title: str, data: dict[str, Any], out: Path) -> str:
    """Writes a page, in one piece; returns a line that names it and its size. Raises OSError."""
    files.write_text(out, render(kind, title, data))
    return f'wrote {out} ({out.stat().st_size / 1e6:.1f} MB)'


def render(kind: str, title: str, data: dict[str, Any]) -> str:
    """A page of one of SCRIPTS, whose function `KINDPage` draws `data`.

    Numbers that are not finite become null. A kind may have a body, KIND.html, and a style,
    KIND.css, of its own.
    """
    own = PAGE / f'{kind}.css'
    style = _read('palette.css') + (own.read_text('utf-8') if own.exists() else _read('base.css'))
    body = PAGE / f'{kind}.html'
    script = ''.join(
        _read(name).removeprefix("'use strict';\n") for name in ('elements.js', *SCRIPTS[kind])
    )
    # In a script element only '<' could end the element; JSON may write it as an escape.
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False).replace('<', '\\u003c')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title, quote=False)}</title>
<style>
{style}</style>
</head>
<body>
{body.read_text('utf-8') if body.exists() else '<main></main>'}
<noscript>This page draws its data with JavaScript, which is switched off.</noscript>
<script type="application/json" id="data">{text}</script>
<script>
'use strict';
{script}
start({kind}Page);
</script>
</body>
</html>
"""


def _read(name: str) -> str:
    return (PAGE / name).read_text('utf-8')


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array for the page's `unpack`: compressed, base64. uint8, int32, float32 or bfloat16."""
    array = np.ascontiguousarray(array)
    little = array.astype(array.dtype.newbyteorder('<')).tobytes()
    text = base64.b64encode(gzip.compress(little, mtime=0)).decode()
    return {'type': array.dtype.name, 'shape': list(array.shape), 'data': text}


def plain(values: np.ndarray, digits: int = 6) -> list:
    """An array as nested lists for JSON, rounded to `digits` significant digits; None for nan."""
    if values.ndim:
        return [plain(row, digits) for row in values]
    value = float(values)
    return float(f'{value:.{digits}g}') if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """Plain values for JSON, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
