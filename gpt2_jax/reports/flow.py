"""A shape flow in words: sections of the model and their totals, as Markdown, JSON or HTML.

print(to_markdown(lens.shape_flow(GPT2Config(vocab_size=65, n_layer=6), seq_len=64)))
"""

import html
import itertools
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from gpt2_jax.lens.flow import MEANINGS, Flow
from gpt2_jax.lens.jaxpr import PHASES, Operation

# What the primitives of JAX are called elsewhere.
WORDS = {
    'add_any': 'add',
    'broadcast_in_dim': 'broadcast',
    'convert_element_type': 'cast',
    'dot_general': 'matmul',
    'integer_pow': 'power',
    'reduce_max': 'max',
    'reduce_sum': 'sum',
    'select_n': 'where',
}
SUMMARY_COLUMNS = (
    'phase',
    'place',
    'parameters',
    'of parameters',
    'bytes written',
    'FLOPs',
    'of FLOPs',
)
COLUMNS = (
    'module',
    'operation',
    'result',
    'shape',
    'dtype',
    'bytes',
    'parameters',
    'FLOPs',
    'of FLOPs',
)
# Before the operations of a section of several layers.
ONE_LAYER = 'Each row is an operation of one layer, with the numbers of that layer alone.'


class Section(NamedTuple):
    """Operations of one place in the model; `layers` consecutive blocks have the same ones."""

    phase: str
    title: str
    layers: int
    operations: list[Operation]

    def total(self, field: str) -> int:
        """The sum of 'flops', 'n_bytes' or 'n_params' over all layers."""
        return self.layers * sum(getattr(operation, field) for operation in self.operations)

    @property
    def heading(self) -> str:
        """'h_0 to h_3 (4 x 85 operations; sums of all 4)': what the totals are sums of."""
        n = len(self.operations)
        if self.layers > 1:
            return f'{self.title} ({self.layers} x {n} operations; sums of all {self.layers})'
        kinds = 'kinds of ' if self.phase == 'update' else ''
        return f'{self.title} ({n} {kinds}operation{"s" * (n > 1)})'


def sections(flow: Flow) -> list[Section]:
    """The operations by place, in order; blocks with the same operations become one section.

    The update is one section, with an operation for each kind in the place of the thousands it has.
    """

    def place(operation: Operation) -> tuple[str, str]:
        return operation.phase, re.sub(r'^(h_\d+|[^.]+).*', r'\1', operation.module)

    update = [operation for operation in flow.operations if operation.phase == 'update']
    passes = [operation for operation in flow.operations if operation.phase != 'update']
    found: list[Section] = []
    first = ''
    for (phase, title), group in itertools.groupby(passes, place):
        operations = list(group)
        before = found[-1] if found else None
        is_block = title.startswith('h_') and before and before.phase == phase
        if is_block and _without_layer(operations) == _without_layer(before.operations):
            found[-1] = before._replace(title=f'{first} to {title}', layers=before.layers + 1)
        else:
            first = title
            found.append(Section(phase, title, 1, operations))
    return found + ([Section('update', 'optimizer', 1, _by_kind(update))] if update else [])


def _without_layer(operations: list[Operation]) -> list[Operation]:
    def strip(text: str) -> str:
        return re.sub(r'^h_\d+', '', text)

    return [
        operation._replace(module=strip(operation.module), parameter=strip(operation.parameter))
        for operation in operations
    ]


def _by_kind(operations: list[Operation]) -> list[Operation]:
    """One operation for all of the same name, with their sums; the most frequent first."""
    kinds: dict[str, list[Operation]] = {}
    for operation in operations:
        kinds.setdefault(operation.name, []).append(operation)
    return [
        group[0]._replace(
            module='step',
            name=f'{name} x {len(group)}',
            dims=('..',),
            shape=(),
            n_bytes=sum(operation.n_bytes for operation in group),
            flops=sum(operation.flops for operation in group),
        )
        for name, group in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]


def to_json(flow: Flow) -> str:
    """Every operation, all layers, and the totals."""
    return json.dumps(
        {
            'sizes': flow.sizes,
            'parameters': flow.n_params,
            'flops': flow.flops,
            'xla_flops': flow.xla_flops,
            'operations': [operation._asdict() for operation in flow.operations],
        },
        indent=1,
    )


def heading(flow: Flow) -> str:
    """The totals in a sentence each."""
    phases = [
        f'{phase} {_share(flops, flow.flops)}'
        for phase in PHASES
        if (flops := sum(o.flops for o in flow.operations if o.phase == phase))
    ]
    text = (
        f'{flow.n_params:,} parameters; {_short(flow.flops, "FLOPs")} a step '
        f'({", ".join(phases)}), {len(flow.operations):,} operations.'
    )
    once = sum(operation.flops / operation.times for operation in flow.operations)
    if flow.xla_flops:
        text += f" XLA's own count is {_short(flow.xla_flops, 'FLOPs')}"
        text += ', a loop counted once' if once < flow.flops else ''
        text += f'; this one differs from it by {once / flow.xla_flops - 1:+.2%}.'
    return text


def _letters(flow: Flow) -> str:
    """'B = 8 rows of a (micro-)batch, ..'."""
    used = {part for operation in flow.operations for dim in operation.dims for part in dim.split()}
    return ', '.join(
        f'{letter} = {size:,} {MEANINGS[letter]}'
        for letter, size in flow.sizes.items()
        if letter in used
    )


def _short(n: float, unit: str = '') -> str:
    """'1.25 M', '804 k': three digits and a prefix."""
    for size, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if n >= size:
            return f'{n / size:.3g} {prefix}{unit}'
    return f'{n:.3g} {unit}'.strip()


def _share(n: int, total: int) -> str:
    return f'{n / total:.1%}' if n else ''


def _summary_row(section: Section, flow: Flow) -> tuple[str, ...]:
    parameters, flops = section.total('n_params'), section.total('flops')
    return (
        section.phase,
        section.heading,
        f'{parameters:,}' if parameters else '',
        _share(parameters, flow.n_params),
        _short(section.total('n_bytes'), 'B'),
        _short(flops),
        _share(flops, flow.flops),
    )


def _row(operation: Operation, flow: Flow) -> tuple[str, ...]:
    word, _, letters = operation.name.partition(' ')
    return (
        re.sub(r'^h_\d+\.?', '', operation.module),
        f'{WORDS.get(word, word)} {letters}'.strip(),
        f'({", ".join(operation.dims)})' if operation.dims else 'scalar',
        ' x '.join(map(str, operation.shape)),
        operation.dtype,
        _short(operation.n_bytes, 'B') if operation.n_bytes else '',
        operation.parameter and f'{operation.parameter}: {operation.n_params:,}',
        _short(operation.flops) if operation.flops else '',
        _share(operation.flops, flow.flops),
    )


def to_markdown(flow: Flow) -> str:
    """Totals, a table of the places, and a table of the operations of each."""

    def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
        lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(tuple(columns))]
        return [*lines, *('| ' + ' | '.join(row) + ' |' for row in rows), '']

    places = sections(flow)
    lines = ['# Shape flow', '', heading(flow), '', _letters(flow) + '.', '']
    lines += table(SUMMARY_COLUMNS, [_summary_row(section, flow) for section in places])
    for section in places:
        lines += [f'## {section.phase}: {section.heading}', '']
        lines += [ONE_LAYER, ''] if section.layers > 1 else []
        lines += table(COLUMNS, [_row(operation, flow) for operation in section.operations])
    return '\n'.join(lines)


def to_html(flow: Flow) -> str:
    """The same as a piece of HTML, the operations of each place folded away."""

    def cells(row: Iterable[str], tag: str) -> str:
        return ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)

    def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        body = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in rows)
        head = f'<thead><tr>{cells(columns, "th")}</tr></thead>'
        return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'

    places = sections(flow)
    parts = [f'<p>{heading(flow)}</p><p>{_letters(flow)}.</p>']
    parts.append(table(SUMMARY_COLUMNS, [_summary_row(section, flow) for section in places]))
    for section in places:
        rows = [_row(operation, flow) for operation in section.operations]
        flops = section.total('flops')
        parts.append(
            f'<details><summary>{section.phase}: {section.heading} <small>'
            f'{_short(flops, "FLOPs")}, {_share(flops, flow.flops) or "0%"}</small></summary>'
            f'{f"<p>{ONE_LAYER}</p>" if section.layers > 1 else ""}{table(COLUMNS, rows)}</details>'
        )
    return '\n'.join(parts)


def to_page(flow: Flow) -> str:
    """`to_html` as a file of its own."""
    style = (
        'body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}'
        'table{border-collapse:collapse;font-size:.9em}td,th{padding:3px 9px;text-align:left;'
        'border-bottom:1px solid #8884}.wide{overflow-x:auto}:root{color-scheme:light dark}'
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Shape flow</title>'
        f'<style>{style}</style><h1>Shape flow</h1>{to_html(flow)}</html>'
    )
