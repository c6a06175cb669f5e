"""Writes text with a trained model. The run's folder is all it needs.

python scripts/sample.py --ckpt_dir=runs/quickstart --prompt='ROMEO:'
echo 'To be' | python scripts/sample.py --ckpt_dir=runs/quickstart --num_samples=3 --top_k=20
"""

from absl import flags

from gpt2_jax import cli, files
from gpt2_jax.architecture import PRECISIONS
from gpt2_jax.progress import Progress

_CKPT_DIR = flags.DEFINE_string(
    'ckpt_dir', None, "The run's folder: the --workdir of train.py.", required=True
)
_STEP = flags.DEFINE_string('step', 'best', "The checkpoint: 'best', 'latest' or a number.")
_PROMPT = flags.DEFINE_string(
    'prompt',
    None,
    'The text to continue. By default <|endoftext|> or a newline. See --prompt_file.',
)
_PROMPT_FILE = flags.DEFINE_string(
    'prompt_file',
    None,
    'A file with the prompt; -: standard input, which is also read if it is a pipe.',
)
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Number of texts.', lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 500, 'Length of each text in tokens.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.8, '0: always the most likely token; 1: as the model predicts.'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from the k most likely tokens; 0: from all tokens.')
_TOP_P = flags.DEFINE_float(
    'top_p', 1.0, 'Draw from the fewest tokens with this total probability; 1: from all tokens.'
)
_STOP = flags.DEFINE_multi_string(
    'stop', [], 'End before the first occurrence of this text; may be given several times.'
)
_SPECIAL_TOKENS = flags.DEFINE_bool(
    'special_tokens', False, 'Read <|endoftext|> in the prompt as the token, not as text.'
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'The same seed gives the same texts.', lower_bound=0, upper_bound=2**32 - 1
)
_STRICT = flags.DEFINE_bool(
    'strict_context',
    False,
    'Refuse a text longer than the context; else its last half starts a new one.',
)
_KERNELS = flags.DEFINE_enum(
    'kernels',
    'auto',
    ['auto', 'xla', 'fused'],
    'How a token is computed; xla: as in model/gpt2.py; fused: the same by GPU kernels; auto: '
    'fused on a GPU in bfloat16, else xla.',
)
_DTYPE = flags.DEFINE_enum(
    'dtype',
    '',
    ['', *PRECISIONS],
    'Precision of the matrix products; by default as trained. bfloat16 is fastest on a GPU.',
)
_PLATFORM = cli.platform_flag()


def main(arguments: list[str]) -> None:
    """Calls the library once and prints the text as it is sampled."""
    cli.no_more(arguments)
    prompt = cli.read_prompt(_PROMPT.value, _PROMPT_FILE.value)
    import jax  # late, so that --help and errors in flags answer at once

    with Progress('loading'):
        from gpt2_jax.inference.decoding import with_kernels
        from gpt2_jax.inference.sampling import Sampling
        from gpt2_jax.inference.streaming import print_samples
        from gpt2_jax.parallel import devices, faults
        from gpt2_jax.workdir import restore

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    devices.select_platform(_PLATFORM.value)
    restored = restore.load(files.user_path(_CKPT_DIR.value), _STEP.value)
    model = with_kernels(restored.model, _KERNELS.value, _DTYPE.value)
    cli.notify(
        f'step {restored.step} of {_CKPT_DIR.value}; {devices.describe_device(jax.devices()[0])}; '
        f'{model.cfg.dtype}, {model.cfg.kernels} kernels'
    )
    with faults.memory_errors('sample'):
        print_samples(
            model,
            jax.device_put(restored.params),
            restored.tokenizer,
            prompt,
            num_samples=_NUM_SAMPLES.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            sampling=sampling,
            stop=_STOP.value,
            special_tokens=_SPECIAL_TOKENS.value,
            seed=_SEED.value,
            strict_context=_STRICT.value,
            notify=cli.notify,
        )


if __name__ == '__main__':
    cli.run(main)
