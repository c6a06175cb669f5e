"""Trains GPT-2, from raw text to checkpoints and samples.

    python scripts/train.py --config=configs/quickstart.py
    python scripts/train.py --config=configs/quickstart.py --config.train.steps=9 --workdir=runs/x

Several processes train one model if a launcher that JAX knows starts them (srun, mpirun), or with
--coordinator, --num_processes and --process_id: see docs/scale.md.

The same command resumes the run after it was stopped. A run writes config.json, tokenizer.json,
metrics.jsonl, samples.txt, tensorboard/, checkpoints/ and, at its end, summary.json into its
folder.
"""

import signal
import time

STARTED = time.monotonic()  # before all other imports, which are part of the start
# While the imports run, Ctrl-C ends the process at once: inside them, Python would print a
# traceback, and modules in C++ would report another error or lose the signal.
ON_CTRL_C = signal.getsignal(signal.SIGINT)
if ON_CTRL_C is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags  # noqa: E402

from gpt2_jax import cli, files  # noqa: E402
from gpt2_jax.progress import Progress  # noqa: E402

_CONFIG = cli.config_flag()
_PLATFORM = cli.platform_flag()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, "The run's folder; runs/<name of the configuration> by default."
)
_EXTEND = flags.DEFINE_bool(
    'extend', False, 'Continue a run with a larger train.steps than it was started with.'
)
_FRESH = flags.DEFINE_bool('fresh', False, "Rename an old run's folder and start from step 0.")
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    None,
    'With several processes, HOST:PORT on which process 0 listens; auto: JAX finds it.',
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes train.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')


def main(arguments: list[str]) -> int:
    """Calls the library once; returns the exit code."""
    cli.no_more(arguments)
    default = f'runs/{cli.config_name()}'
    workdir = files.user_path(default if _WORKDIR.value is None else _WORKDIR.value)
    with Progress('loading'):
        from gpt2_jax.parallel import devices, hosts

    with hosts.joined(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        with devices.selecting_platform(_PLATFORM.value), Progress('loading'):
            from gpt2_jax.train import train  # while the device starts
        signal.signal(signal.SIGINT, ON_CTRL_C)
        return train(
            _CONFIG.value,
            workdir,
            extend=_EXTEND.value,
            fresh=_FRESH.value,
            started=STARTED,
        )


if __name__ == '__main__':
    cli.run(main)
