"""A page: one HTML file with its style, its script and its data inside.

It loads nothing: its content security policy forbids every request. The scripts are plain
JavaScript, in pages/: base.js for all pages, and one for each kind.
"""

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import files

PAGES = Path(__file__).with_name('pages')
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(kind: str, title: str, data: dict[str, Any], out: Path) -> str:
    """Writes a page, in one piece; returns a line that names it and its size.

    `kind` is the script in pages/ that draws `data`. Raises OSError.
    """
    style, base, script = (
        (PAGES / name).read_text('utf-8') for name in ('base.css', 'base.js', f'{kind}.js')
    )
    # In a script element only '<' could end the element; JSON may write it as an escape.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace('<', '\\u003c')
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main></main>
<noscript>This page draws its data with JavaScript, which is switched off.</noscript>
<script type="application/json" id="data">{text}</script>
<script>
{base}{script}</script>
</body>
</html>
"""
    files.write_text(out, page)
    return f'wrote {out} ({out.stat().st_size / 1e6:.1f} MB)'


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array for the page's `unpack`: compressed, base64. uint8, int32 or float32."""
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


def _escape(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
