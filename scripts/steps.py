"""Opens a run's steps: the steps that trained on a text.

    python scripts/steps.py find --workdir=runs/quickstart --text='To be, or not'
    python scripts/steps.py find --workdir=runs/quickstart --line=1012 --by_step=500

`find` lists each place of a text, a line or a token, with its file, line and byte, and every step
and row that trained on it. Nothing was logged for this: it is computed from the seed.
"""

import json
from pathlib import Path

from absl import flags

from gpt2_jax import cli
from gpt2_jax.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.", required=True)
_TEXT = flags.DEFINE_string('text', None, 'find: the text to look for.')
_TOKEN_OFFSET = flags.DEFINE_integer(
    'token_offset', None, 'find: the position of a training token, from 0.'
)
_LINE = flags.DEFINE_integer('line', None, 'find: a line of the text file, from 1.')
_FILE = flags.DEFINE_string('file', None, 'find: the file of --line, if there are several.')
_BY_STEP = flags.DEFINE_integer(
    'by_step', None, 'find: count up to this step; by default all steps of the configuration.'
)
_LIMIT = flags.DEFINE_integer(
    'limit', 10, 'Places and steps to print in text; JSON has all of them.', lower_bound=1
)
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'How to print.')

FIND = (_TEXT, _TOKEN_OFFSET, _LINE, _FILE, _BY_STEP)


def find() -> None:
    """The ledger; needs no JAX."""
    from gpt2_jax.diagnostics import ledger

    options = {flag.name: flag.value for flag in FIND}
    found = ledger.find(Path(_WORKDIR.value), **options)
    if _FORMAT.value == 'json':
        print(json.dumps(ledger.to_json(found), indent=1, ensure_ascii=False))
    else:
        print('\n'.join(ledger.to_lines(found, _LIMIT.value)))


def main(arguments: list[str]) -> None:
    """One call of the library."""
    if arguments != ['find']:
        raise UsageError(f'expected the command find; got {" ".join(arguments) or "none"}')
    find()


if __name__ == '__main__':
    cli.run(main)
