"""Pages: a step, a run, several runs compared, an autopsy.

Each is one HTML file with its style, script and data inside. It loads nothing: its content security
policy forbids every request. The scripts are plain JavaScript, in pages/.
"""

import base64
import json
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


def write_step(found: dict[str, Any], out: Path) -> str:
    """Writes the page of an opened step, replay.to_json's result; returns a line that says so."""
    return write_page('step', f'Step {found["step"]} of {found["run"]}', found, out)


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array for the page's `unpack`: base64, little-endian. uint8, int32 or float32."""
    array = np.ascontiguousarray(array)
    little = array.astype(array.dtype.newbyteorder('<'))
    text = base64.b64encode(little.tobytes()).decode()
    return {'type': array.dtype.name, 'shape': list(array.shape), 'data': text}


def _escape(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
