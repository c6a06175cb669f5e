r"""Says what a configuration needs on a mesh of GPUs, before any is there: memory, transfers, time.

    python scripts/plan.py --config=configs/gpt2_124m.py --config.mesh.data=8 \
        --config.train.grad_accum_steps=5
    python scripts/plan.py --config=configs/gpt2_124m.py --table=1,2,8,64

Nothing runs and no device is needed. docs/scale.md compares the figures with measured ones.
"""

import re

from absl import flags

from gpt2_jax import cli, config
from gpt2_jax.errors import UsageError
from gpt2_jax.speed import plan
from gpt2_jax.speed.case import VOCABULARIES, case_of
from gpt2_jax.speed.timing import GPUS

_CONFIG = cli.config_flag()
_GPU = flags.DEFINE_enum(
    'gpu', 'h200', list(GPUS), 'The kind of GPU: its memory. Times are those of an H200.'
)
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size', 0, 'The vocabulary; 0: that of data.tokenizer, on TinyShakespeare.', lower_bound=0
)
_MEMORY_FRACTION = flags.DEFINE_float(
    'memory_fraction',
    plan.MEMORY_FRACTION,
    'The share of the memory that JAX takes, XLA_PYTHON_CLIENT_MEM_FRACTION.',
    lower_bound=0,
    upper_bound=1,
)
_TABLE = flags.DEFINE_list(
    'table', [], 'Print a table of the four published sizes on so many GPUs, as in --table=1,2,8.'
)


def main(arguments: list[str]) -> None:
    """Calls the library once and prints its lines."""
    cli.no_more(arguments)
    cli.check_finite([_MEMORY_FRACTION])
    resolved = config.resolve(_CONFIG.value)
    vocab_size = _VOCAB_SIZE.value or VOCABULARIES[resolved.data.tokenizer]
    case = case_of(resolved, vocab_size)
    gpu, fraction = GPUS[_GPU.value], _MEMORY_FRACTION.value
    if _TABLE.value:
        if not all(re.fullmatch('[1-9][0-9]{0,5}', count) for count in _TABLE.value):
            raise UsageError('--table takes numbers of GPUs, below a million, as in --table=1,2,8')
        lines = plan.table(case, map(int, _TABLE.value), gpu, fraction)
    else:
        lines = plan.describe(plan.plan(case, gpu), gpu, fraction)
    print('\n'.join(lines))


if __name__ == '__main__':
    cli.run(main)
