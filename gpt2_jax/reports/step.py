"""An opened step for people: as JSON, on a terminal, as a page."""

from pathlib import Path
from typing import Any

from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.replay import OpenedStep
from gpt2_jax.reports.html import write_page
from gpt2_jax.terminal import in_one_line

# Of a terminal's 256 colours, black to red: the background of a token by its loss in whole nats.
LOSS_COLORS = (0, 0, 53, 89, 125, 161, 197)


def to_json(run: ledger.Run, opened: OpenedStep) -> dict[str, Any]:
    """All of it, as plain values for JSON and for the page. Losses are rounded to 1e-5 nats."""

    def losses(values_T) -> list[float]:
        return [round(float(value), 5) for value in values_T]

    rows = [
        {
            'row': row,
            'token': int(opened.starts_B[row]),
            **opened.origins[row]._asdict(),
            'place': str(opened.origins[row]),
            'before_mean': float(opened.before_BT[row].mean()),
            'after_mean': float(opened.after_BT[row].mean()),
            'tokens': run.token_bytes.texts(opened.tokens_BT1[row]),
            'before': losses(opened.before_BT[row]),
            'after': losses(opened.after_BT[row]),
        }
        for row in opened.worst_rows()
    ]
    return {
        'run': str(run.folder),
        'step': opened.step,
        'checkpoint': opened.checkpoint,
        'verdict': opened.verdict,
        'difference': opened.largest_difference,
        'recorded': opened.recorded,
        'replayed': opened.replayed,
        'tensors': [tensor._asdict() for tensor in opened.tensors],
        'rows': rows,
    }


def write(found: dict[str, Any], out: Path) -> str:
    """Writes the result of `to_json` as a page; returns a line that names it. Raises OSError."""
    return write_page('step', f'Step {found["step"]} of {found["run"]}', found, out)


def to_lines(found: dict[str, Any], limit: int, color: bool) -> list[str]:
    """The result of `to_json` for a terminal: metrics, tensors, and the `limit` worst rows.

    With `color`, the background of a token shows its loss.
    """
    lines = [
        f'step {found["step"]:,} of {found["run"]}, from checkpoint {found["checkpoint"]:,}',
        found['verdict'],
        '',
        f'{"":<16}{"replayed":>24}' + (f'{"recorded":>24}' if found['recorded'] else ''),
    ]
    for name, value in found['replayed'].items():
        recorded = f'{found["recorded"][name]:>24.17g}' if found['recorded'] else ''
        lines.append(f'{name:<16}{value:>24.17g}{recorded}')
    lines += [
        '',
        f'{"tensor":<26}{"weight":>12}{"gradient":>12}{"update":>12}{"update/weight":>15}',
    ]
    for tensor in found['tensors']:
        sizes = ''.join(f'{tensor[name]:>12.4g}' for name in ('weight', 'gradient', 'update'))
        ratio = '' if tensor['ratio'] is None else f'{tensor["ratio"]:.2e}'
        lines.append(f'{tensor["name"]:<26}{sizes}{ratio:>15}')
    lines += [
        '',
        f'the rows that hurt most, of {len(found["rows"])}: loss before and after the update',
    ]
    for row in found['rows'][:limit]:
        lines += [
            f'row {row["row"]}, {row["place"]}: '
            f'{row["before_mean"]:.4f} -> {row["after_mean"]:.4f}',
            '  ' + _colored(row['tokens'], row['before'], color),
        ]
    return lines


def _colored(texts: list[str], losses: list[float], color: bool) -> str:
    """A row of tokens on one line; the first one has no loss."""
    shown = list(map(in_one_line, texts))
    if not color:
        return ''.join(shown)
    backgrounds = [LOSS_COLORS[min(int(loss) + 1, len(LOSS_COLORS) - 1)] for loss in losses]
    parts = [
        f'\x1b[48;5;{background}m\x1b[38;5;255m{text}\x1b[0m'
        for background, text in zip(backgrounds, shown[1:], strict=True)
    ]
    return shown[0] + ''.join(parts)
