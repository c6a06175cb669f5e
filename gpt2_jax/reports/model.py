"""The page about a model at work on a text: what lens/report.py found, as one HTML file."""

import jax.numpy as jnp
import numpy as np

from gpt2_jax.lens.report import Report
from gpt2_jax.reports import html
from gpt2_jax.reports.flow import to_html

MAX_BYTES = 10 * 2**20


def render(report: Report) -> str:
    """The page, one HTML file. Patterns are rounded to 16 levels if it would exceed 10 MiB."""
    page = _render(report)
    if len(page.encode()) > MAX_BYTES and 'pattern' in report.arrays:
        coarse = np.round(report.arrays['pattern'] / 17).astype(np.uint8)
        page = _render(
            report._replace(
                arrays=report.arrays | {'pattern': coarse}, facts=report.facts | {'levels': 15}
            )
        )
    return page


def _render(report: Report) -> str:
    arrays = {name: html.packed(_narrow(array, name)) for name, array in report.arrays.items()}
    shapes = to_html(report.flow) if report.flow else ''
    data = report.facts | {'arrays': arrays, 'shapes': shapes}
    return html.render('model', report.facts['title'], data)


def _narrow(array: np.ndarray, name: str) -> np.ndarray:
    """The array in a type that a page unpacks; where many digits would show nothing, bfloat16."""
    if array.dtype.kind in 'ui' and array.dtype != np.uint8:
        return array.astype(np.int32)
    if name == 'gradient.resid' or name.endswith('.prob'):
        return array.astype(jnp.bfloat16)
    return array if array.dtype == np.uint8 else array.astype(np.float32)
