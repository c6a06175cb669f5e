"""Imports and exports published weights: safetensors as on the Hugging Face hub, without torch.

    python scripts/convert.py --from_hf=downloads/gpt2 --ckpt_dir=runs/gpt2
    python scripts/convert.py --from_hf=gpt2 --ckpt_dir=runs/gpt2
    python scripts/convert.py --ckpt_dir=runs/quickstart --to_hf=published/quickstart

--from_hf reads a folder with config.json, model.safetensors and merges.txt, or downloads a model by
its name on the hub, and writes the folder of a run at step 0 for sample.py, evaluate.py and
fine-tuning. Weights of nanoGPT, saved as safetensors, are read too. --to_hf writes a folder that
transformers loads. Nothing is overwritten.
"""

from absl import flags

from gpt2_jax import cli, files
from gpt2_jax.errors import UsageError
from gpt2_jax.progress import Progress

_FROM_HF = flags.DEFINE_string(
    'from_hf', None, 'The published folder, or a name on the hub, to read.'
)
_TO_HF = flags.DEFINE_string('to_hf', None, 'The published folder to write.')
_CKPT_DIR = flags.DEFINE_string(
    'ckpt_dir', None, "The run's folder: written by --from_hf, read by --to_hf.", required=True
)
_STEP = flags.DEFINE_string('step', 'best', "The checkpoint to read: 'best', 'latest' or a number.")
_TOKENIZER = flags.DEFINE_string(
    'tokenizer',
    None,
    'The tokenizer of weights without one: our tokenizer.json, or merges.txt.',
)


def main(arguments: list[str]) -> None:
    """Calls the library once."""
    cli.no_more(arguments)
    if (_FROM_HF.value is None) == (_TO_HF.value is None):
        raise UsageError(
            'give either --from_hf=DIR to read published weights, or --to_hf=DIR to write them'
        )
    with Progress('loading'):
        from gpt2_jax import convert
        from gpt2_jax.parallel import devices

    devices.select_platform('cpu')  # arrays are only copied
    if _FROM_HF.value is not None:
        convert.from_hf(_FROM_HF.value, files.user_path(_CKPT_DIR.value), _TOKENIZER.value)
    else:
        convert.to_hf(files.user_path(_CKPT_DIR.value), _STEP.value, files.user_path(_TO_HF.value))


if __name__ == '__main__':
    cli.run(main)
