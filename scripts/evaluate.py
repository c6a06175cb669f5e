"""Evaluates a checkpoint on a whole split: the same figures that training printed.

    python scripts/evaluate.py --ckpt_dir=runs/quickstart
    python scripts/evaluate.py --ckpt_dir=runs/quickstart --which=latest --split=train
"""

import math
from pathlib import Path

from absl import flags

from gpt2_jax import cli
from gpt2_jax.errors import UserError

_CKPT_DIR = flags.DEFINE_string('ckpt_dir', None, "A run's folder.", required=True)
_WHICH = flags.DEFINE_string('which', 'best', "The checkpoint: 'best', 'latest' or a step.")
_SPLIT = flags.DEFINE_enum('split', 'val', ['val', 'train'], 'The part of the text.')
_PLATFORM = cli.platform_flag()


def main(arguments: list[str]) -> None:
    """One call of the library."""
    cli.no_more(arguments)
    import jax

    from gpt2_jax import checkpoint, parallel, recipe
    from gpt2_jax.train import MEMORY_KNOBS
    parallel.select_platform(_PLATFORM.value)
    restored = checkpoint.load(Path(_CKPT_DIR.value), _WHICH.value)
    config, trained_on = restored.config, restored.meta['corpus']
    if trained_on['fallback']:
        config.data.corpus = trained_on['name']
    if math.prod(config.mesh.values()) > len(jax.devices()):  # it was trained on more than there are here
        config.mesh.update(data=1, fsdp=1, tensor=1)
    parts = recipe.build(config)
    if parts.dataset.sha256 != trained_on['sha256']:
        now = parts.dataset
        raise UserError(f'the run was trained on {trained_on["name"]} {trained_on["sha256"][:12]}, but data.corpus is '
                        f'now {now.name} {now.sha256[:12]}: bring the old text back to compare figures')
    with parallel.memory_errors(MEMORY_KNOBS):
        result = parts.evaluator()(jax.device_put(restored.params, parts.layout.params), _SPLIT.value)
    print(f'step {restored.step}, {_SPLIT.value}: loss {result.loss!r} nats per token, perplexity '
          f'{result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte, over {result.tokens:,} tokens of '
          f'{result.bytes:,} bytes')


if __name__ == '__main__':
    cli.run(main)
