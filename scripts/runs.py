"""Pages about whole runs: one run through its training, or several side by side.

    python scripts/runs.py report --workdir=runs/quickstart --out=run.html
    python scripts/runs.py compare runs/a runs/b --out=compare.html

Each page is one HTML file that needs no network. A run can be looked at while it trains. With
--config.checkpoint.keep=log and --config.train.probe=N, training keeps what makes a page worth
reading: checkpoints from step 0 on, and measurements at log-spaced steps.
"""

from absl import flags

from gpt2_jax import cli, files
from gpt2_jax.errors import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, "report: the run's folder.")
_CORPUS = flags.DEFINE_string(
    'corpus',
    None,
    "Where the run's own corpus is now, if it was moved since training; compare: of all runs.",
)
_OUT = flags.DEFINE_string('out', None, 'The HTML file to write.')
_TEXT = flags.DEFINE_string(
    'text', None, 'The text to follow; by default the beginning of the validation text.'
)
_STEPS = flags.DEFINE_list(
    'steps', [], 'report: updates to open too, as pages beside the report, e.g. --steps=1,500.'
)
_PLATFORM = cli.platform_flag()


def main(arguments: list[str]) -> None:
    """One call of the library."""
    command, *folders = arguments or ['']
    if command not in ('report', 'compare'):
        raise UsageError(f'expected a command, report or compare; got {command or "none"}')
    if _OUT.value is None:
        raise UsageError(f'{command} needs --out: the HTML file to write')
    out = files.output_path(_OUT.value)
    from gpt2_jax.parallel import devices
    from gpt2_jax.reports import compare, run
    from gpt2_jax.workdir import history

    if command == 'compare':
        cli.refuse([_WORKDIR, _STEPS], 'with compare')
    else:
        if _WORKDIR.value is None:
            raise UsageError("report needs --workdir=DIR: the run's folder")
        cli.no_more(folders)
        folders = [_WORKDIR.value]
    workdirs = [files.user_path(folder) for folder in folders]
    corpora = [history.read_config(path).data.corpus for path in workdirs]
    devices.select_platform(_PLATFORM.value)
    options = {'corpus': _CORPUS.value, 'notify': cli.notify}
    with cli.corpus_hint(*corpora):
        if command == 'compare':
            print(compare.write_comparison(workdirs, out, text=_TEXT.value, **options))
            return
        (workdir,) = workdirs
        for line in run.write_steps(workdir, out, _STEPS.value, **options):
            print(line)
        print(run.write_run(workdir, out, text=_TEXT.value, **options))


if __name__ == '__main__':
    cli.run(main)
