"""Reads what a run left in its folder, finished or not. Changes nothing, and needs no JAX."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax.errors import UserError
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

PROBES = 'probes.npz'  # inside a run's folder; diagnostics/probes.py says what it holds


def read_config(run: Path) -> ConfigDict:
    """The configuration of a run. Raises UserError if the folder holds none."""
    path = run / 'config.json'
    try:
        return config_lib.from_json(path.read_text('utf-8'))
    except (OSError, UnicodeDecodeError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else 'it is damaged'
        raise UserError(
            f'cannot read {path}: {reason}; expected the folder of a run of scripts/train.py'
        ) from None


def config_at(run: Path, step: int) -> ConfigDict:
    """The configuration that update `step` ran with: an extended run has had several."""
    config, steps = read_config(run), committed_steps(run / FOLDER)
    progress = _read_meta(run, steps[-1])['progress'] if steps else {}
    for extended_at, planned in progress.get('extensions', []):
        if step <= extended_at:
            with config.unlocked():
                config.train.steps = planned
            break
    return config


def read_records(run: Path, split: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl of one split, 'train' or 'val', in order.

    A last line that a running training has not finished writing is left out.
    """
    path = run / 'metrics.jsonl'
    if not path.exists():
        return []
    lines = path.read_text('utf-8', errors='replace').split('\n')[:-1]
    try:
        records = [json.loads(line) for line in lines]
        return [record for record in records if record['split'] == split]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path} is damaged: expected a JSON record in each line') from None


def read_samples(run: Path) -> dict[int, str]:
    """{step: text} of samples.txt."""
    path = run / 'samples.txt'
    if not path.exists():
        return {}
    samples, step = {}, None
    for line in path.read_text('utf-8', errors='replace').split('\n'):
        words = line.split()
        if len(words) == 4 and words[::3] == ['===', '==='] and words[1] == 'step':
            step = int(words[2])
            samples[step] = []
        elif step is not None:
            samples[step].append(line)
    return {step: '\n'.join(lines).removesuffix('\n\n') for step, lines in samples.items()}


def read_probes(run: Path) -> dict[str, np.ndarray] | None:
    """The arrays of probes.npz; None if there is none."""
    path = run / PROBES
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f'{path} is damaged: {error}; move it away, and the run records probes from here on'
        ) from None


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None if the run is not finished."""
    path = run / 'summary.json'
    return json.loads(path.read_text('utf-8')) if path.exists() else None


def read_corpus(run: Path) -> dict[str, Any] | None:
    """The identity of the text that the run trained on; None before its first checkpoint."""
    steps = committed_steps(run / FOLDER)
    if not steps:
        return None
    return _read_meta(run, steps[-1])['corpus']


def steps_done(run: Path) -> int:
    """The last update that the folder shows: by a checkpoint or by a record."""
    last = [record['step'] for record in read_records(run, 'train')[-1:]]
    return max([0, *committed_steps(run / FOLDER), *last])


def _read_meta(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint keeps beside the state: the JSON item, as Orbax writes it."""
    path = run / FOLDER / str(step) / 'meta' / 'metadata'
    try:
        return json.loads(path.read_text('utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {error}') from None
