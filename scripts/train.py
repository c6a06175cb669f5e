"""Trains GPT-2, from raw text to checkpoints and samples.

    python scripts/train.py --config=configs/quickstart.py
    python scripts/train.py --config=configs/shakespeare.py --config.train.steps=1000 --workdir=runs/short

The same command again goes on where the run stopped. What a run writes: config.json, tokenizer.json, metrics.jsonl,
samples.txt, tensorboard/, checkpoints/ and, at the end, summary.json.
"""

import time

STARTED = time.monotonic()

from pathlib import Path  # noqa: E402 (the clock comes first)

from absl import flags  # noqa: E402

from gpt2_jax import cli

_CONFIG = cli.config_flag()
_PLATFORM = cli.platform_flag()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, "The run's folder; runs/<name of the configuration> by default."
)
_EXTEND = flags.DEFINE_bool(
    'extend', False, 'Go on with a larger train.steps than the run was started with.'
)
_FRESH = flags.DEFINE_bool('fresh', False, 'Move an old run in the folder aside, and start anew.')


def main(arguments: list[str]) -> int:
    """One call of the library."""
    cli.no_more(arguments)
    from gpt2_jax.parallel import devices
    from gpt2_jax.train import train

    devices.select_platform(_PLATFORM.value)
    return train(
        _CONFIG.value,
        Path(_WORKDIR.value or f'runs/{cli.config_name()}'),
        extend=_EXTEND.value,
        fresh=_FRESH.value,
        started=STARTED,
    )


if __name__ == '__main__':
    cli.run(main)
