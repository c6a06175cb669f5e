"""Measures speed: training, scoring, decoding, start-up, scale or the time to a loss; also as JSON.

python scripts/benchmark.py --config=configs/shakespeare.py
python scripts/benchmark.py --config=configs/gpt2_124m.py --vocab_size=50257 --what=decode
python scripts/benchmark.py --config=configs/gpt2_124m.py --vocab_size=50257 --what=score
python scripts/benchmark.py --config=configs/quickstart.py --what=startup --windows=3
python scripts/benchmark.py --config=configs/gpt2_124m.py --vocab_size=50257 --what=scale
python scripts/benchmark.py --config=configs/shakespeare_fast.py --what=time-to-loss --seeds=10

--what=scale trains GPT-2 124M and 1.5B on 1, 2, 4, .. of the devices, beside what is planned.
--what=time-to-loss is the benchmark of docs/tinyshakespeare-benchmark.md: a process for each seed.
"""

import json
import sys
from pathlib import Path

from absl import flags

from gpt2_jax import cli
from gpt2_jax.progress import Progress

_CONFIG = cli.config_flag()
_PLATFORM = cli.platform_flag()
_WHAT = flags.DEFINE_enum(
    'what',
    'train',
    ['train', 'score', 'decode', 'startup', 'scale', 'time-to-loss'],
    'What to measure.',
)
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size', 0, 'Train on random tokens below this number; 0: on the corpus.', lower_bound=0
)
_WINDOWS = flags.DEFINE_integer(
    'windows', 10, 'Number of measurements; the median is printed.', lower_bound=1
)
_SECONDS = flags.DEFINE_float(
    'seconds', 1.0, 'Length of one measurement of training steps.', lower_bound=0
)
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Texts decoded at a time.', lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 512, 'Tokens decoded per text.', lower_bound=1)
_PROMPT_TOKENS = flags.DEFINE_integer(
    'prompt_tokens', 1, 'Length of the prompt of a decoded text.', lower_bound=1
)
_TOP_K = flags.DEFINE_integer('top_k', 200, 'As in sample.py.', lower_bound=0)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs, with train.seed = 0, 1, ..', lower_bound=1)
_LOSS = flags.DEFINE_float('loss', 1.47, 'The validation loss to reach, in nats per token.')
_WARM = flags.DEFINE_bool(
    'warm', False, 'Train each seed once before, so that its programs are compiled.'
)
_AGAINST_LOSS = flags.DEFINE_float(
    'against_loss', None, 'A best loss: print the p-value of a mean that low.'
)
_AGAINST_SECONDS = flags.DEFINE_float(
    'against_seconds', None, 'A time to the loss: print the p-value of a mean that low.'
)
_OUT = flags.DEFINE_string('out', None, 'A file for all figures, as JSON.')


# Flags without a meaning for a measurement.
DECODING, SEEDED = (
    (_NUM_SAMPLES, _NEW_TOKENS, _TOP_K, _PROMPT_TOKENS),
    (_SEEDS, _LOSS, _WARM, _AGAINST_LOSS, _AGAINST_SECONDS, _OUT),
)
UNUSED = {
    'train': (*DECODING, *SEEDED),
    'score': (*DECODING, *SEEDED),
    'decode': (_SECONDS, *SEEDED),
    'scale': (*DECODING, *SEEDED),
    'startup': (_VOCAB_SIZE, _SECONDS, *DECODING, *SEEDED),
    'time-to-loss': (_VOCAB_SIZE, _WINDOWS, _SECONDS, *DECODING),
}


def main(arguments: list[str]) -> None:
    """Calls the library once and prints the figures."""
    cli.no_more(arguments)
    cli.check_finite((_SECONDS, _LOSS, _AGAINST_LOSS, _AGAINST_SECONDS))
    cli.refuse(UNUSED[_WHAT.value], f'with --what={_WHAT.value}')
    with Progress('loading'):
        from gpt2_jax import config
        from gpt2_jax.diagnostics.describe import describe
        from gpt2_jax.inference.sampling import Sampling
        from gpt2_jax.parallel import devices
        from gpt2_jax.speed import benchmark, scale, time_to_loss
        from gpt2_jax.training.setup import build

    script = str(Path(__file__).with_name('train.py'))
    train = [sys.executable, script, f'--platform={_PLATFORM.value}', *cli.config_arguments()]
    if _WHAT.value == 'startup':
        show(benchmark.bench_startup(train, _WINDOWS.value))
        return
    if _WHAT.value == 'time-to-loss':
        options = (flag.value for flag in SEEDED[1:])  # in the order of its arguments
        seeds = range(_SEEDS.value)
        show(time_to_loss.report_time_to_loss(train, _CONFIG.value, seeds, *options))
        return
    devices.select_platform(_PLATFORM.value)
    data = benchmark.random_data(_VOCAB_SIZE.value) if _VOCAB_SIZE.value else None
    resolved = config.resolve(_CONFIG.value)
    if _WHAT.value == 'scale':
        records = []
        for record in scale.bench_scale(resolved, data, _WINDOWS.value, _SECONDS.value):
            print(json.dumps(record), flush=True)
            records.append(record)
        print('\n'.join(scale.scale_table(records)))
        return
    setup = build(resolved, data)
    print('\n'.join(describe(setup)), flush=True)
    if _WHAT.value == 'train':
        figures = benchmark.bench_train(setup, _WINDOWS.value, _SECONDS.value)
    elif _WHAT.value == 'score':
        figures = benchmark.bench_score(setup, _WINDOWS.value, _SECONDS.value)
    else:
        figures = benchmark.bench_decode(
            setup,
            _WINDOWS.value,
            _NUM_SAMPLES.value,
            _NEW_TOKENS.value,
            Sampling(1.0, _TOP_K.value),
            _PROMPT_TOKENS.value,
        )
    show(figures | {'device': devices.describe_device(setup.device)})


def show(figures: dict) -> None:
    """Prints the figures as a table and as one line of JSON."""
    for name, value in figures.items():
        print(f'{name:32}{value}')
    print(json.dumps({'config': cli.config_name(), 'what': _WHAT.value, **figures}))


if __name__ == '__main__':
    cli.run(main)
