"""Published weights in and out: safetensors as on the Hugging Face hub. Needs neither torch nor transformers.

    python scripts/convert.py --from_hf=downloads/gpt2 --ckpt_dir=runs/gpt2
    python scripts/convert.py --from_hf=gpt2 --ckpt_dir=runs/gpt2
    python scripts/convert.py --ckpt_dir=runs/quickstart --to_hf=published/quickstart

In: a folder with config.json, model.safetensors and merges.txt, or a model's name on the hub. What is written is the
folder of a run at step 0, for sample.py, evaluate.py and fine-tuning. Out: a folder that transformers loads. Weights of
nanoGPT, saved as safetensors, come in too. Nothing is overwritten.
"""

from pathlib import Path

from absl import flags

from gpt2_jax import cli
from gpt2_jax.errors import UsageError

_FROM_HF = flags.DEFINE_string(
    'from_hf', None, 'The published folder, or a name on the hub, to read.'
)
_TO_HF = flags.DEFINE_string('to_hf', None, 'The published folder to write.')
_CKPT_DIR = flags.DEFINE_string(
    'ckpt_dir', None, "The run's folder, to write or to read.", required=True
)
_STEP = flags.DEFINE_string('step', 'best', "The checkpoint to read: 'best', 'latest' or a step.")
_TOKENIZER = flags.DEFINE_string(
    'tokenizer',
    None,
    'The tokenizer of weights that come without: our tokenizer.json, or merges.txt.',
)


def main(arguments: list[str]) -> None:
    """One call of the library."""
    cli.no_more(arguments)
    if (_FROM_HF.value is None) == (_TO_HF.value is None):
        raise UsageError(
            'give --from_hf=DIR to read published weights, or --to_hf=DIR to write them: one of the two'
        )
    from gpt2_jax import convert
    from gpt2_jax.parallel import devices

    devices.select_platform('cpu')  # nothing is computed
    if _FROM_HF.value is not None:
        convert.from_hf(_FROM_HF.value, Path(_CKPT_DIR.value), _TOKENIZER.value)
    else:
        convert.to_hf(Path(_CKPT_DIR.value), _STEP.value, Path(_TO_HF.value))


if __name__ == '__main__':
    cli.run(main)
