"""From a command line to one call: flags, --help and --version, and errors in one line."""

import importlib.metadata
import itertools
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import gpt2_jax
from gpt2_jax import files
from gpt2_jax.config import SETTINGS, check_key, describe
from gpt2_jax.errors import UsageError, UserError

WRONG_RESULT = (
    'get_config() must return what default_config() of gpt2_jax.config makes, with other values'
)
STDIN_SECONDS = (
    2  # for the first byte of a piped prompt; name it by --prompt_file=- to wait for ever
)


def platform_flag() -> flags.FlagHolder:
    """--platform=auto|cpu|gpu|tpu."""
    return flags.DEFINE_enum(
        'platform',
        'auto',
        ['auto', 'cpu', 'gpu', 'tpu'],
        'Device to run on; auto takes an accelerator where one is seen.',
    )


def config_flag() -> flags.FlagHolder:
    """--config=FILE or FILE:ARGUMENT, and --config.SECTION.SETTING=VALUE for any of config.SETTINGS."""
    return config_flags.DEFINE_config_file(
        'config',
        None,
        'Configuration file, e.g. configs/quickstart.py; change single settings by '
        '--config.train.steps=10. All of them: gpt2_jax/config.py.',
    )


def config_name() -> str:
    """The name of the --config in use: configs/shakespeare.py -> 'shakespeare', x.py:small -> 'x-small'."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    return '-'.join(filter(None, [os.path.splitext(os.path.basename(path))[0], argument]))


def config_arguments() -> list[str]:
    """The --config and --config.KEY of this command line, for another one."""
    holder = flags.FLAGS['config']
    return [
        f'--config={config_flags.get_config_filename(holder)}',
        *(
            f'--config.{key}={value}'
            for key, value in config_flags.get_override_values(holder).items()
        ),
    ]


def _check_config_flags(argv: list[str]) -> str | None:
    """Every --config.KEY must be a setting, and the file of --config=FILE be there; returns that file."""
    path = None
    for arg, following in itertools.pairwise([*argv, '']):
        if match := re.match(r'--?(?:no)?config\.([^=]+)', arg):
            try:
                check_key(match[1])
            except UsageError as error:
                raise UsageError(f'--config.{match[1]}: {error}') from None
        elif match := re.fullmatch(r'--?config(?:=(.*))?', arg):
            path = (match[1] or following).partition(':')[0]
            if not os.path.isfile(path):
                raise UsageError(
                    f'--config={path}: there is no such file; the path counts from the current folder, '
                    f'{os.getcwd()}'
                )
    return path


def _config_error(error: BaseException, path: str) -> UsageError:
    """What the code in the configuration file did wrong, and in which line of it."""
    frames = traceback.extract_tb(error.__traceback__)
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
        frames += traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename == path]
    if 'Attempting to lookup' in str(
        error
    ):  # a setting of the command line, in something that has none
        return UsageError(f'{path}: {WRONG_RESULT}')
    where = f'{path}, line {frames[-1].lineno} ({frames[-1].line})' if frames else path
    what = f'{type(error).__name__}: {error}'
    for key in re.findall(
        r'\w\.(\w+\.\w+)', frames[-1].line if frames else ''
    ):  # config.train.steps -> train.steps
        try:
            check_key(key)
            what += (
                f'; expected {describe(key)}' if isinstance(error, TypeError | ValueError) else ''
            )
        except UsageError as unknown:
            what = unknown
            break
    return UsageError(f'{where}: {error if isinstance(error, UserError) else what}')


def _check_config(config, path: str) -> None:
    """A configuration file must return all of our settings, and no others."""
    sections = config.to_dict() if isinstance(config, ConfigDict) else {}
    keys = {
        f'{section}.{name}'
        for section, values in sections.items()
        if isinstance(values, dict)
        for name in values
    }
    if keys != set(SETTINGS):
        raise UsageError(f'{path}: {WRONG_RESULT}')


def _parse(argv: list[str]) -> list[str]:
    """Parses all flags; returns the arguments that are none. Raises UsageError; --help and --version exit with 0."""
    # First of all: they must answer also where the rest of the line is wrong.
    if {'--help', '-help', '-h', '--helpfull'} & set(argv):
        script = sys.modules['__main__']
        print((script.__doc__ or '').strip(), end='\n\n')
        for module in (script, sys.modules[__name__]):  # the flags of each, without its name
            print(flags.FLAGS.module_help(module).strip().partition('\n')[2])
        if 'config' in flags.FLAGS:
            print('\nSettings, each to be changed by --config.KEY=VALUE, and their defaults:')
            for key, (default, *_) in SETTINGS.items():
                print(
                    f'  {describe(key)} [{"open" if isinstance(default, type) else repr(default)}]'
                )
        sys.exit(0)
    if '--version' in argv:
        libraries = ' '.join(
            f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'optax')
        )
        print(f'gpt2_jax {gpt2_jax.__version__} ({libraries}, Python {sys.version.split()[0]})')
        sys.exit(0)
    path = _check_config_flags(argv[1:])
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        text = ' '.join(str(error).split())
        if missing := re.search(r'Flag (--\w+) must have a value other than None', text):
            raise UsageError(f'{missing[1]} is missing; see --help') from None
        if 'Error whilst parsing config file' in text:
            raise _config_error(error, path) from None
        if 'before a value for --config' in text:
            raise UsageError(
                '--config=FILE must come before the settings that change it, --config.KEY=VALUE'
            ) from None
        key = re.search(r'--config\.([\w.]+)=', text)
        raise UsageError(f'{text}; expected {describe(key[1])}' if key else text) from None
    except Exception as error:  # whatever the code in a configuration file raises
        raise _config_error(error, path) from None
    if 'config' in flags.FLAGS:
        if path is None:
            raise UsageError(
                '--config is missing: name a configuration, e.g. --config=configs/quickstart.py'
            )
        _check_config(flags.FLAGS['config'].value, path)
    return rest


def no_more(arguments: list[str]) -> None:
    """Raises UsageError for arguments that belong to no flag."""
    if arguments:
        raise UsageError(
            f'unexpected argument {arguments[0]!r}: settings are given as --name=value; see --help'
        )


def refuse(unused: Iterable[flags.FlagHolder], where: str) -> None:
    """Raises UsageError for a flag that was given and means nothing `where`, e.g. 'with --lambada'."""
    for flag in unused:
        if flag.present:
            raise UsageError(f'--{flag.name} means nothing {where}: leave it out')


def read_prompt(path: str | None) -> str:
    """The text of a file, or of standard input: for '-', and where something is piped in; else ''."""
    if path in (None, '-') and sys.stdin is None:  # closed
        return ''
    if path is None:
        if sys.stdin.isatty():
            return ''
        # A pipe that nobody writes to, as background jobs inherit one, must not hang the program.
        if not select.select([sys.stdin], [], [], STDIN_SECONDS)[0]:
            print(
                f'[nothing came from standard input in {STDIN_SECONDS} s: no prompt]',
                file=sys.stderr,
            )
            return ''
    try:
        data = sys.stdin.buffer.read() if path in (None, '-') else Path(path).read_bytes()
        return ''.join(files.decode_utf8([data], path or 'standard input'))
    except UserError as error:
        raise UsageError(str(error)) from None


def _without_noise(unraisable) -> None:
    """An unraisablehook that leaves out what each write of a save says when another one has failed."""
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs main(arguments) and exits with what it returns, or, after one line on stderr, with the error's code."""
    # Orbax warns of every choice that is made on purpose, and of a save that fails it tells a hundred times.
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_noise
    # JAX's cache of compiled programs is a convenience: without it, or past a damaged entry, it compiles.
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
    if hasattr(sys.stdout, 'reconfigure'):  # it is None where it was closed
        sys.stdout.reconfigure(errors='replace')  # what a terminal cannot show must not end a run
    message = None
    try:
        code = main(_parse(sys.argv)) or 0
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
    except UserError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        message, code = f'{error.filename or "input or output"}: {error.strerror or error}', 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    if message:
        print('error:', ' '.join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
