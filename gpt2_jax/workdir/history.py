"""Reads what a run left in its folder, finished or not. Changes nothing, and needs no JAX."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax import foreign
from gpt2_jax.errors import UserError
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

PROBES = 'probes.npz'  # inside a run's folder; diagnostics/probes.py says what it holds
PUBLISHED = 'the weights of '  # the name of the corpus of weights from scripts/convert.py begins so
NOT_A_RUN = 'expected the folder of a run of scripts/train.py'
REWRITTEN = 'delete it, and the command that trained the run writes it again'
MAX_LOG_BYTES = 1 << 30
MAX_PROBES_BYTES = 1 << 32
EXTENSIONS = [{'step': foreign.integer(0), 'planned': foreign.integer(1)}]
META = {
    'config': str,
    'corpus': {'name': str, 'sha256': str},
    'progress': {'extensions': foreign.Maybe(EXTENSIONS)},  # older versions wrote none
}
# Other versions may have recorded fewer figures of an update.
FIGURES = ('grad_norm', 'learning_rate', 'update_norm', 'param_norm')
RECORD = {'step': foreign.integer(0), 'split': str, 'loss': foreign.NUMBER} | dict.fromkeys(
    FIGURES, foreign.Maybe(foreign.NUMBER)
)


def read_config(run: Path) -> ConfigDict:
    """The configuration of a run. Raises UserError if the folder holds none, or no run's."""
    corpus = read_corpus(run)
    if corpus and corpus['name'].startswith(PUBLISHED):
        raise UserError(
            f'{run} holds {corpus["name"]}, which come without their training: {NOT_A_RUN}'
        )
    path = run / 'config.json'
    if not path.exists():
        deleted = 'was it deleted? The command that trained the run writes it again'
        remedy = deleted if (run / FOLDER).is_dir() else NOT_A_RUN
        raise foreign.error(run, 'holds no config.json', remedy)
    return config_lib.from_json(foreign.read_text(path, remedy=REWRITTEN), path, REWRITTEN)


def config_at(run: Path, step: int) -> ConfigDict:
    """The configuration that update `step` ran with: an extended run has had several."""
    config, steps = read_config(run), committed_steps(run / FOLDER)
    progress = _read_meta(run, steps[-1])['progress'] if steps else {}
    for extension in progress.get('extensions') or []:
        if step <= extension['step']:
            with config.unlocked():
                config.train.steps = extension['planned']
            break
    return config


def read_records(run: Path, split: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl of one split, 'train' or 'val', in order.

    A last line that a running training has not finished writing is left out. Raises UserError.
    """
    path = run / 'metrics.jsonl'
    if not path.exists():
        return []
    lines = foreign.read_text(path, MAX_LOG_BYTES).split('\n')[:-1]
    records = [
        foreign.parse_json(line, f'{path}, line {number}', RECORD)
        for number, line in enumerate(lines, 1)
    ]
    return [record for record in records if record['split'] == split]


def read_probes(run: Path) -> dict[str, np.ndarray] | None:
    """The arrays of probes.npz; None if there is none. Raises UserError if it is damaged."""
    path = run / PROBES
    if not path.exists():
        return None
    remedy = 'move it away, and the run records its probes from here on'
    with foreign.open_file(path) as file, foreign.parsing(path, 'the probes of a run', remedy):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if sum(info.file_size for info in arrays.zip.infolist()) > MAX_PROBES_BYTES:
                    raise foreign.error(path, 'is too large', remedy)
                return dict(arrays)
        except (TypeError, ValueError):  # numpy's message advises to trust the file
            raise ValueError('it is damaged, or another file') from None


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None if the run is not finished."""
    path = run / 'summary.json'
    if not path.exists():
        return None
    text = foreign.read_text(path, remedy=REWRITTEN)
    return foreign.parse_json(text, path, {}, REWRITTEN)


def read_corpus(run: Path) -> dict[str, Any] | None:
    """The identity of the text that the run trained on; None before its first checkpoint."""
    steps = committed_steps(run / FOLDER)
    return _read_meta(run, steps[-1])['corpus'] if steps else None


def steps_done(run: Path) -> int:
    """The last update that the folder shows: by a checkpoint or by a record."""
    last = [record['step'] for record in read_records(run, 'train')[-1:]]
    return max([0, *committed_steps(run / FOLDER), *last])


def _read_meta(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint keeps beside the state: the JSON item, as Orbax writes it."""
    return foreign.read_json(run / FOLDER / str(step) / 'meta' / 'metadata', META, NOT_A_RUN)
