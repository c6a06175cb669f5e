"""Opens a run's steps: the text of a step, the steps of a text, and what a step did.

    python scripts/steps.py find --workdir=runs/quickstart --text='To be, or not'
    python scripts/steps.py find --workdir=runs/quickstart --line=1012 --by_step=500
    python scripts/steps.py show --workdir=runs/quickstart --step=1234 --out=step.html
    python scripts/steps.py autopsy --workdir=runs/quickstart --step=1234

`find` lists each place of a text, a line or a token, with its file, line and byte, and every step
and row that trained on it. Nothing was logged for this: it is computed from the seed.

`show` computes one update again, from the nearest kept checkpoint before it: its rows as text, the
loss of every token before and after the update, what the update did to each parameter array, and
whether its metrics equal the recorded ones.

`autopsy` computes an update that went wrong again, with every activation and gradient in view: the
first value that is not finite, its layer, head, position and source text, or the row that made the
loss leap. The page is autopsies/step_N.html in the run's folder.
"""

import json
from pathlib import Path

from absl import flags

from gpt2_jax import cli, files
from gpt2_jax.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
_CORPUS = flags.DEFINE_string(
    'corpus', None, "Where the run's own corpus is now, if it was moved since training."
)
_TEXT = flags.DEFINE_string('text', None, 'find: the text to look for.')
_TOKEN_OFFSET = flags.DEFINE_integer(
    'token_offset', None, 'find: the position of a training token, from 0.'
)
_LINE = flags.DEFINE_integer('line', None, 'find: a line of the text file, from 1.')
_FILE = flags.DEFINE_string('file', None, 'find: the file of --line, if there are several.')
_BY_STEP = flags.DEFINE_integer(
    'by_step', None, 'find: count up to this step; by default all steps of the configuration.'
)
_STEP = flags.DEFINE_integer(
    'step', None, 'show and autopsy: the update, from 1, as in metrics.jsonl.'
)
_OUT = flags.DEFINE_string('out', None, 'show: an HTML file to write in place of printing.')
_LIMIT = flags.DEFINE_integer(
    'limit', 10, 'Places, steps or rows to print in text; JSON has all of them.', lower_bound=1
)
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'json'], 'How to print.')
_PLATFORM = cli.platform_flag()

FIND = (_TEXT, _TOKEN_OFFSET, _LINE, _FILE, _BY_STEP)


def find() -> None:
    """The ledger; needs no JAX."""
    cli.refuse([_STEP, _OUT, _PLATFORM], 'with find')
    from gpt2_jax.diagnostics import ledger

    options = {flag.name: flag.value for flag in FIND}
    found = ledger.find(files.user_path(_WORKDIR.value), corpus=_CORPUS.value, **options)
    if _FORMAT.value == 'json':
        print(json.dumps(ledger.to_json(found), indent=1, ensure_ascii=False))
    else:
        print('\n'.join(ledger.to_lines(found, _LIMIT.value)))


def the_step(command: str) -> tuple[Path, int]:
    """The run's folder and --step. Selects the device."""
    cli.refuse(FIND, f'with {command}')
    if _STEP.value is None:
        raise UsageError(f'{command} needs --step: the update, from 1')
    folder = files.user_path(_WORKDIR.value)
    from gpt2_jax.parallel import devices

    devices.select_platform(_PLATFORM.value)
    return folder, _STEP.value


def show() -> None:
    """The replay of one update."""
    out = None if _OUT.value is None else files.output_path(_OUT.value)
    folder, number = the_step('show')
    from rich.console import Console

    from gpt2_jax.diagnostics.replay import Replay
    from gpt2_jax.reports import step, terminal

    replay = Replay(folder, cli.notify, _CORPUS.value)
    found = step.to_json(replay.run, replay.open(number))
    if out:
        print(step.write(found, out))
    elif _FORMAT.value == 'json':
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print('\n'.join(step.to_lines(found, _LIMIT.value, color=terminal.in_colour(Console()))))


def examine() -> None:
    """The autopsy of one update."""
    folder, number = the_step('autopsy')
    cli.refuse([_OUT, _FORMAT, _LIMIT], 'with autopsy')
    from gpt2_jax.reports import autopsy

    said, page = autopsy.explain(folder, number, cli.notify, _CORPUS.value)
    print('\n'.join([*said, f'{page} shows all of it']))


def main(arguments: list[str]) -> None:
    """One call of the library."""
    commands = {'find': find, 'show': show, 'autopsy': examine}
    if not arguments or arguments[0] not in commands:
        got = ' '.join(arguments) or 'none'
        raise UsageError(f'expected one command, find, show or autopsy; got {got}')
    cli.no_more(arguments[1:])
    if _WORKDIR.value is None:
        raise UsageError(f"{arguments[0]} needs --workdir: the run's folder")
    from gpt2_jax.workdir import history

    config = history.read_config(files.user_path(_WORKDIR.value))
    with cli.corpus_hint(config.data.corpus):
        commands[arguments[0]]()


if __name__ == '__main__':
    cli.run(main)
