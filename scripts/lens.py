"""Looks inside a model at work: a page, a view on the terminal, or every operation of a step.

    # one HTML file about the model and a text: attention, layers, gradients, attribution, ablation
    python scripts/lens.py report --ckpt_dir=runs/quickstart --prompt='ROMEO:' --out=report.html

    # the essentials on the terminal
    python scripts/lens.py show --ckpt_dir=runs/quickstart --prompt='ROMEO:'

    # every operation of the training step: shapes by name, bytes, parameters, FLOPs
    python scripts/lens.py shapes --config=configs/quickstart.py
    python scripts/lens.py shapes --config=configs/gpt2_124m.py --vocab_size=50257 --format=json

The text is the prompt and what the model writes after it: 64 tokens in all, or as many as the
context of the model holds, if that is fewer. --new_tokens=0 shows the prompt alone.
"""

import sys

from absl import flags

from gpt2_jax import cli
from gpt2_jax.errors import UsageError
from gpt2_jax.progress import Progress

COMMANDS = ('report', 'show', 'shapes')
SHAPES = 'shapes' in sys.argv[1:2]  # the only command with a configuration

flags.FLAGS.set_gnu_getopt(True)  # flags may follow the command
_CONFIG = cli.config_flag() if SHAPES else None
_CKPT_DIR = flags.DEFINE_string('ckpt_dir', None, "A run's folder, or a converted one.")
_STEP = flags.DEFINE_string('step', 'best', "The checkpoint: 'best', 'latest' or a step.")
_PROMPT = flags.DEFINE_string('prompt', None, 'The text; a newline by default. See --prompt_file.')
_PROMPT_FILE = flags.DEFINE_string(
    'prompt_file', None, 'A file with that text; - for standard input, read if piped.'
)
_NEW_TOKENS = flags.DEFINE_integer(
    'new_tokens', None, 'Tokens for the model to write after it.', lower_bound=0
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Seed of the tokens that the model writes.', lower_bound=0, upper_bound=2**32 - 1
)
_OUT = flags.DEFINE_string('out', 'report.html', 'report: the file to write.')
_SKIP = flags.DEFINE_list(
    'skip', [], 'report: parts to leave out: jacobian, ablation, backward, curvature, shapes.'
)
_AT = flags.DEFINE_integer('at', -1, 'show: the position whose guess is followed.')
_HEAD = flags.DEFINE_string(
    'head',
    None,
    'show: the head to draw, such as h_0.attn.2; by default the one that looks most at the token '
    'before.',
)
_FORMAT = flags.DEFINE_enum('format', 'md', ['md', 'json', 'html'], 'shapes: how it is printed.')
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size', 0, 'shapes: the vocabulary; 0: as the corpus has it.', lower_bound=0
)
_PLATFORM = cli.platform_flag()

# The flags that mean nothing to a command.
UNUSED = {
    'report': (_AT, _HEAD, _FORMAT, _VOCAB_SIZE),
    'show': (_OUT, _SKIP, _FORMAT, _VOCAB_SIZE),
    'shapes': (
        _CKPT_DIR,
        _STEP,
        _PROMPT,
        _PROMPT_FILE,
        _NEW_TOKENS,
        _SEED,
        _OUT,
        _SKIP,
        _AT,
        _HEAD,
    ),
}


def main(arguments: list[str]) -> None:
    """One call of the library, its progress on stderr."""
    command, *more = arguments or ['']
    if command not in COMMANDS:
        raise UsageError(
            f'expected one of {", ".join(COMMANDS)} first, got {command!r}; see --help'
        )
    cli.no_more(more)
    cli.refuse(UNUSED[command], f'to {command}')
    if command != 'shapes' and _CKPT_DIR.value is None:
        raise UsageError("--ckpt_dir is missing: name a run's folder, e.g. runs/quickstart")
    with Progress('loading'):
        from gpt2_jax import config, library, look
        from gpt2_jax.lens import sites
        from gpt2_jax.parallel import devices, faults

    devices.select_platform(_PLATFORM.value)
    if command == 'shapes':
        print(
            look.shapes(config.resolve(_CONFIG.value), _VOCAB_SIZE.value, _FORMAT.value, cli.notify)
        )
        return
    prompt = cli.read_prompt(_PROMPT.value, _PROMPT_FILE.value)
    loaded = library.load(_CKPT_DIR.value, _STEP.value)
    options = {'new_tokens': _NEW_TOKENS.value, 'seed': _SEED.value}
    cli.notify(repr(loaded))
    with faults.memory_errors('sample'):
        if command == 'report':
            look.report(loaded, prompt, _OUT.value, skip=_SKIP.value, notify=cli.notify, **options)
        else:
            head = None if _HEAD.value is None else sites.parse_head(_HEAD.value)
            look.show(loaded, prompt, at=_AT.value, head=head, **options)


if __name__ == '__main__':
    cli.run(main)
