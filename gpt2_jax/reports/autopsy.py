"""An update that went wrong, explained: in one paragraph, and as a page in the run's folder."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_jax.diagnostics import ledger
from gpt2_jax.diagnostics.autopsy import Autopsy, examine
from gpt2_jax.diagnostics.replay import Replay
from gpt2_jax.errors import UserError
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.reports.html import write_page
from gpt2_jax.terminal import counted

FOLDER = 'autopsies'  # inside a run's folder
# An update that changes the parameters by more than this share of their norm is a leap: in training
# that goes well the share is near a thousandth, and up to a fifth in the first steps.
LEAP = 0.5


@allow_transfers
def explain(
    run: Path,
    step: int,
    notify: Callable[[str], None] = lambda text: None,
    corpus: str | None = None,
) -> tuple[list[str], Path]:
    """Examines an update of a run and writes the page; returns the explanation and the path.

    The page is autopsies/step_N.html in the run's folder. `corpus` is as in ledger.open_run. Raises
    UserError if the text of the run has changed, or the page could not be written.
    """
    out = run / FOLDER / f'step_{step}.html'
    place = out.parent if out.parent.is_dir() else run
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f'cannot write {out}: no permission to write in {place}; allow it, or examine a copy '
            'of the run in another folder'
        )
    replay = Replay(run, notify, corpus)
    found = examine(replay, step)
    said = sentences(replay.run, found)
    out.parent.mkdir(exist_ok=True)
    title = f'Step {step} of {run.name}, examined'
    write_page('autopsy', title, to_json(replay.run, found) | {'said': said}, out)
    return said, out


def sentences(run: ledger.Run, found: Autopsy) -> list[str]:
    """What went wrong, in sentences: the first value that is not finite, and what led there."""
    said = []
    wrong = [f'{name} = {x}' for name, x in found.metrics.items() if not math.isfinite(x)]
    if found.culprit:
        said.append(_culprit(run, found))
    elif wrong:
        said.append(
            f'Every value of step {found.step} is finite, and still {", ".join(wrong)}: the sum of '
            'the squares overflows.'
        )
    else:
        said.append(f'Every value of step {found.step} is finite when it is computed again.')
    leap = _leap(found)
    if leap:
        said.append(leap)
    if found.passage and not leap:
        _, start, stop, loss, origin = found.passage
        row = found.passage.row
        others = [x.mean() for i, x in enumerate(found.losses_BT) if i != row]
        beside = f', the other rows {sum(others) / len(others):.2f}' if others else ''
        text = _text(run, found.tokens_BT1[row, start + 1 : stop + 1])
        said.append(
            f'Of all passages of {counted(stop - start, "tokens")}, this one in row {row} costs '
            f'most, {loss:.2f} nats per token, at {origin}: {text}. The whole row costs '
            f'{found.losses_BT[row].mean():.2f}{beside}.'
        )
    return said


def _culprit(run: ledger.Run, found: Autopsy) -> str:
    culprit = found.culprit
    place = [
        f'{word} {value}'
        for word, value in (
            ('head', culprit.head),
            ('row', culprit.row),
            ('position', culprit.position),
        )
        if value is not None
    ]
    said = (
        f'The first value of step {found.step} that is not finite is {culprit.value} in the '
        f'{culprit.phase} {culprit.name}'
        + (f', {", ".join(place)}' if place else '')
        + f' ({culprit.n_bad:,} of its {culprit.size:,} values are not finite).'
    )
    if culprit.origin:
        row = found.tokens_BT1[culprit.row]
        before = row[max(0, culprit.position - 20) : culprit.position + 1]
        said += f' Its text is at {culprit.origin}: it ends {_text(run, before)}.'
    return said


def _leap(found: Autopsy) -> str | None:
    """A sentence on the first update near this one that changed the parameters too much."""
    for metrics in [*found.before, {'step': found.step, **found.metrics}]:
        share = metrics['update_norm'] / max(metrics['param_norm'], 1e-30)
        # After a gradient that is not finite, any learning rate gives such an update.
        if not share <= LEAP and math.isfinite(metrics['grad_norm']):
            is_known = math.isfinite(share)
            by = f'by {share:.0%} of their norm' if is_known else 'beyond the range of fp32'
            return (
                f'Step {metrics["step"]} changed the parameters {by} '
                f'(update {metrics["update_norm"]:.3g}, parameters {metrics["param_norm"]:.3g}, '
                f'gradient {metrics["grad_norm"]:.3g}): a learning rate of '
                f'{metrics["learning_rate"]:.3g} is too high.'
            )
    return None


def _text(run: ledger.Run, ids) -> str:
    return repr(run.dataset.tokenizer.decode(ids))


def to_json(run: ledger.Run, found: Autopsy) -> dict[str, Any]:
    """All of it, as plain values for the page."""
    culprit, passage = found.culprit, found.passage
    in_question = (culprit or passage) and (culprit or passage).row
    order = sorted(
        range(len(found.origins)),
        key=lambda row: (row != in_question, -found.losses_BT[row].mean()),
    )
    return {
        'run': str(run.folder),
        'step': found.step,
        'checkpoint': found.checkpoint,
        'culprit': culprit and culprit._asdict() | {'value': str(culprit.value)},
        'passage': passage and passage._asdict() | {'origin': str(passage.origin)},
        'metrics': found.metrics,
        'before': found.before,
        'activations': {name: x._asdict() for name, x in found.activations.items()},
        'gradients': {name: x._asdict() for name, x in found.gradients.items()},
        'parameters': {
            name: [x._asdict() for x in summaries] for name, summaries in found.parameters.items()
        },
        'rows': [
            {
                'row': row,
                'place': str(found.origins[row]),
                'mean': float(found.losses_BT[row].mean()),
                'tokens': run.token_bytes.texts(found.tokens_BT1[row]),
                'losses': found.losses_BT[row].astype(float).round(5).tolist(),
            }
            for row in order
        ],
    }
