"""The page that compares runs: curves, settings, one text under each, distributions, samples."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import config as config_lib
from gpt2_jax.diagnostics import ledger, ngrams
from gpt2_jax.diagnostics.replay import setup_here
from gpt2_jax.errors import UsageError
from gpt2_jax.lens.subject import load
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.reports.html import plain, write_page
from gpt2_jax.reports.over_time import Notify, dynamics_for_page, dynamics_of, looks_of, text_tokens
from gpt2_jax.reports.run import curves
from gpt2_jax.workdir import history


@allow_transfers
def write_comparison(
    folders: list[Path],
    out: Path,
    *,
    text: str | None = None,
    corpus: str | None = None,
    notify: Notify = print,
) -> str:
    """Writes the page that compares runs; returns a line that names it.

    `text` takes the probe text's place. `corpus` is as in ledger.open_run, for all runs. Raises
    UserError.
    """
    if len(folders) < 2:
        raise UsageError(f'compare needs two runs or more, and got {len(folders)}')
    names = _distinct_names(folders)
    configs = [history.read_config(folder) for folder in folders]  # before the first takes its time
    found = [
        _summary_of(folder, name, text, corpus, notify)
        for folder, name in zip(folders, names, strict=True)
    ]
    settings = [config_lib.flatten(config) for config in configs]
    differ = {
        key: [str(values[key]) for values in settings]
        for key in settings[0]
        if len({str(values[key]) for values in settings}) > 1
    }
    data = {'runs': found, 'settings': differ}
    return write_page('compare', f'{" and ".join(names)} compared', data, out)


def _summary_of(
    folder: Path, name: str, text: str | None, corpus: str | None, notify: Notify
) -> dict[str, Any]:
    """One run on the page that compares: curves, and its best checkpoint on the text."""
    run = ledger.open_run(folder, corpus)
    setup = setup_here(run.config, run)
    loaded = load(folder)
    notify(f'{name}: step {loaded.step:,}')
    tokens_T = text_tokens(run, setup, text)
    looks = looks_of(run, [loaded], tokens_T)
    dynamics = dynamics_for_page(dynamics_of(run, setup, [loaded], lambda text: None))
    return {
        'name': name,
        'run': str(folder),
        'step': loaded.step,
        'done': history.steps_done(folder),
        'steps': run.config.train.steps,
        'summary': history.read_summary(folder),
        'curves': curves(folder),
        'baselines': ngrams.baselines(run.dataset),
        'corpus': run.dataset.name,
        'sha256': run.dataset.sha256,
        'tokenizer': run.dataset.tokenizer.name,
        'parameters': count_params(setup.shapes.params),
        'layers': loaded.model.cfg.n_layer,
        'bytes_per_token': plain(np.array(run.dataset.tokenizer.byte_lengths[tokens_T[1:]].mean())),
        'tokens': run.token_bytes.texts(tokens_T),
        'loss': plain(looks['loss'][0], 5),
        'likeliest': run.token_bytes.texts(looks['top'][0, -1, :, 0]),
        'probability': plain(looks['probability'][0, -1, :, 0], 4),
        'sample': looks['samples'][0],
        'dynamics': dynamics,
    }


def _distinct_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    paths = [folder.absolute() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f'compare needs different runs, and {path} is given twice')
    for n in itertools.count(1):
        names = ['/'.join(path.parts[-n:]) for path in paths]
        if len(set(names)) == len(names):
            return names
