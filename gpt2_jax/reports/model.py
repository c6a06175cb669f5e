"""The page about a model at work on a text: what lens/report.py found, as one HTML file.

The page holds its data, its style and its scripts (page/model*), and asks nothing from a network.
Arrays travel as one gzip-compressed block in base64, which the browser unpacks.
"""

import base64
import gzip
import json
from pathlib import Path

import numpy as np

from gpt2_jax.lens.report import Report
from gpt2_jax.reports import flow as flow_lib

PAGE = Path(__file__).parent / 'page'
STYLE = 'model.css'
# In this order: each file uses names of those before it only.
SCRIPTS = ('model_data.js', 'model_draw.js', 'model_views.js', 'model.js')
MAX_BYTES = 10 * 2**20


def as_bytes(array: np.ndarray, name: str) -> tuple[str, bytes]:
    """A little-endian copy and its type: 'u1', 'u4', 'f4', or 'f2', the upper half of 'f4'."""
    if array.dtype == np.uint8:
        return 'u1', array.tobytes()
    if array.dtype.kind in 'ui':
        return 'u4', array.astype('<u4').tobytes()
    if name == 'gradient.resid' or name.endswith('.prob'):
        bits = array.astype('<f4').view('<u4')
        return 'f2', ((bits + 0x8000) >> 16).astype('<u2').tobytes()
    return 'f4', array.astype('<f4').tobytes()


def packed(arrays: dict[str, np.ndarray]) -> tuple[list[dict], str]:
    """Where each array lies in the unpacked block, and the block: gzip, base64."""
    index, block = [], bytearray()
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        kind, data = as_bytes(array, name)
        block += bytes(-len(block) % 4)
        index.append({'name': name, 'kind': kind, 'shape': array.shape, 'start': len(block)})
        block += data
    return index, base64.b64encode(gzip.compress(bytes(block), 6, mtime=0)).decode()


def render(report: Report) -> str:
    """The page, one HTML file. Patterns are rounded to 16 levels if it would exceed 10 MiB."""
    page = _render(report)
    if len(page) > MAX_BYTES and 'pattern' in report.arrays:
        coarse = np.round(report.arrays['pattern'] / 17).astype(np.uint8)
        page = _render(
            report._replace(
                arrays=report.arrays | {'pattern': coarse}, facts=report.facts | {'levels': 15}
            )
        )
    return page


def _render(report: Report) -> str:
    index, block = packed(report.arrays)
    facts = report.facts | {'arrays': index}
    replacements = {
        'TITLE': _escaped(report.facts['title']),
        'STYLE': (PAGE / STYLE).read_text('utf-8'),
        'SCRIPT': '\n'.join((PAGE / name).read_text('utf-8') for name in SCRIPTS),
        'FACTS': json.dumps(facts).replace('<', '\\u003c'),
        'ARRAYS': block,
        'SHAPES': flow_lib.to_html(report.flow) if report.flow else '',
    }
    page = (PAGE / 'model.html').read_text('utf-8')
    before, *rest = page.split('{{')
    parts = [before]
    for piece in rest:
        name, _, after = piece.partition('}}')
        parts += [replacements[name], after]
    return ''.join(parts)


def _escaped(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;')
