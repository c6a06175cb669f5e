"""From a command line to one call: flags, --help and --version, and errors in one line."""

import contextlib
import glob
import importlib.metadata
import itertools
import logging
import math
import os
import re
import select
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

import gpt2_jax
from gpt2_jax import files, foreign, terminal
from gpt2_jax.config import EXPECTED_CONFIG, SETTINGS, check_key, describe, keys_of
from gpt2_jax.errors import DivergedError, UsageError, UserError

WRONG_RESULT = f'get_config() must return {EXPECTED_CONFIG}'
CONFIG_FILE = 'a configuration, e.g. --config=configs/quickstart.py'
NO_CONFIG = f'--config is missing: name {CONFIG_FILE}'
# What Python and absl say of a flag's value -> what is said in its place.
NOT_A_VALUE = {
    r'invalid literal for int\(\) with base 10: .*': 'not a whole number',
    'could not convert string to float: .*': 'not a number',
    r"\('Non-boolean argument to boolean flag', .*\)": 'neither True nor False',
}
MAX_PROMPT_BYTES = 1 << 30
MAX_MESSAGE = 2000  # characters of an error: one that names many settings is this long
CTRL_C_AGAIN = 0.1  # seconds until a Ctrl-C that Python dropped is sent again
STDIN_SECONDS = 2  # to wait for a piped prompt's first byte; --prompt_file=- waits without a limit


def platform_flag() -> flags.FlagHolder:
    """--platform=auto|cpu|gpu|tpu."""
    return flags.DEFINE_enum(
        'platform',
        'auto',
        ['auto', 'cpu', 'gpu', 'tpu'],
        'The device to run on; auto: an accelerator if JAX sees one, else the CPU.',
    )


def config_flag() -> flags.FlagHolder:
    """--config=FILE or FILE:ARGUMENT, and --config.KEY=VALUE for any KEY of config.SETTINGS."""
    return config_flags.DEFINE_config_file(
        'config',
        None,
        'The configuration file, e.g. configs/quickstart.py; change single settings by '
        '--config.train.steps=10. --help lists all settings.',
    )


def config_name() -> str:
    """The name of the --config in use: 'x' for configs/x.py, 'x-small' for configs/x.py:small."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    return '-'.join(filter(None, [os.path.splitext(os.path.basename(path))[0], argument]))


def config_arguments() -> list[str]:
    """The --config and --config.KEY arguments of this command line, for another process."""
    holder = flags.FLAGS['config']
    values = config_flags.get_override_values(holder)
    return [
        f'--config={config_flags.get_config_filename(holder)}',
        *(f'--config.{key}={value}' for key, value in values.items()),
    ]


def no_more(arguments: list[str]) -> None:
    """Raises UsageError for arguments that belong to no flag."""
    if not arguments:
        return
    hint = 'settings are given as --name=value'
    for name in ('workdir', 'ckpt_dir'):
        if name in flags.FLAGS and os.path.isdir(arguments[0]):
            hint = f"a run's folder is given as --{name}={shlex.quote(arguments[0])}"
    raise UsageError(f'unexpected argument {arguments[0]!r}: {hint}; see --help')


def refuse(unused: Iterable[flags.FlagHolder], context: str) -> None:
    """Raises UsageError if a flag is given that means nothing here (context: 'with --lambada')."""
    for flag in unused:
        if flag.present:
            raise UsageError(f'--{flag.name} means nothing {context}: leave it out')


def check_finite(flags_given: Iterable[flags.FlagHolder]) -> None:
    """Raises UsageError for a flag that is nan or inf, which absl takes as a number."""
    for flag in flags_given:
        if flag.value is not None and not math.isfinite(flag.value):
            raise UsageError(f'--{flag.name}={flag.value}: expected a finite number')


@contextlib.contextmanager
def corpus_hint(*corpora: str) -> Iterator[None]:
    """Adds --corpus, if it is not given, to the error of a block in which a corpus has no file."""
    try:
        yield
    except UserError as error:
        if isinstance(error, UsageError) or flags.FLAGS['corpus'].present:
            raise
        for corpus in corpora:
            is_file = os.path.basename(corpus).count('.')
            if is_file and not glob.glob(os.path.expanduser(corpus)):
                raise UserError(f'{error}; --corpus=PATH says where {corpus} is now') from None
        raise


def notify(text: str) -> None:
    """Prints a line of progress, in brackets, to stderr: stdout has results only."""
    print(terminal.printable(f'[{text}]', sys.stderr), file=sys.stderr, flush=True)


def read_prompt(text: str | None, path: str | None) -> str:
    """The prompt of the flags --prompt (`text`) and --prompt_file (`path`).

    A path of '-' is standard input. Without either flag it is read too if a pipe provides a text;
    else the prompt is ''. Raises UsageError if both flags are given, or for bytes that are not
    UTF-8.
    """
    if text is not None:
        if path is not None:
            raise UsageError('--prompt and --prompt_file are both given: give one')
        return text
    if path in (None, '-') and sys.stdin is None:  # closed
        return ''
    if path is None:
        if sys.stdin.isatty():
            return ''
        # A background job may inherit a pipe that nobody writes to: do not wait without a limit.
        if not select.select([sys.stdin], [], [], STDIN_SECONDS)[0]:
            notify(f'no text arrived on standard input within {STDIN_SECONDS} s: no prompt')
            return ''
    data = (
        sys.stdin.buffer.read()
        if path in (None, '-')
        else foreign.read_bytes(files.user_path(path), MAX_PROMPT_BYTES)
    )
    try:
        return ''.join(foreign.decode_utf8([data], path or 'standard input'))
    except UserError as error:
        raise UsageError(str(error)) from None


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs main(arguments) and exits with its result, or prints one line for an error and exits."""
    # Orbax warns of choices that were made on purpose, and repeats a failed save's error many
    # times.
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    # If JAX's cache of compiled programs cannot be used, JAX compiles: no warning is needed.
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
    if hasattr(sys.stdout, 'reconfigure'):  # None if it was closed
        # A character that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors='replace')
        # The error of a failed print names no file: these name standard output.
        sys.stdout.write = terminal.printing()(sys.stdout.write)
        sys.stdout.flush = terminal.printing()(sys.stdout.flush)
    message = None
    try:
        code = main(_parse(sys.argv)) or 0
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # the reader of the output ended first, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        message, code = f'{error.filename or "input or output"}: {error.strerror or error}', 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except ValueError as error:  # JAX reads its variables of the environment when it is imported
        if not re.search('for (JAX flag|environment) ', str(error)):
            raise
        message, code = f'{error}: correct this variable of the environment, or unset it', 2
    except FloatingPointError as error:  # under JAX_DEBUG_NANS or JAX_DEBUG_INFS
        message, code = f'{error}, {_last_line(error)}', DivergedError.exit_code
    if message:
        line = foreign.escape(' '.join(filter(None, map(str.strip, message.splitlines()))))
        print('error:', line[:MAX_MESSAGE] + '..' * (len(line) > MAX_MESSAGE), file=sys.stderr)
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Ends the process with an exit code; after an error, without waiting for anything.

    Orbax's threads wait 300 s for each other if the folder of a save could not be made, a
    compilation that nobody needs any more may take minutes, and JAX would wait for the other
    processes of a run, which wait for this one.
    """
    if code:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, UserError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _last_line(error: Exception) -> str:
    """The last line of this package that an error came through."""
    folder = os.path.dirname(gpt2_jax.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if frame.filename.startswith(folder)][-1]
    return f'in {frame.filename}, line {frame.lineno} ({frame.line})'


def _report_unraisable(unraisable) -> None:
    """An unraisablehook that hides the message which each write of a failed save repeats.

    Python drops a Ctrl-C that arrives in a callback of the garbage collector, where JAX clears its
    caches. The hook sends it again.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        again = threading.Timer(CTRL_C_AGAIN, os.kill, [os.getpid(), signal.SIGINT])
        again.daemon = True
        again.start()
    elif str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str]) -> list[str]:
    """Parses all flags; returns the other arguments.

    Raises UsageError. --help and --version exit with 0, also if the rest of the line is wrong.
    """
    if {'--help', '-help', '-h', '--helpfull'} & set(argv):
        _print_help()
        sys.exit(0)
    if '--version' in argv:
        libraries = ' '.join(
            f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'optax')
        )
        python = sys.version.split()[0]
        print(f'gpt2_jax {gpt2_jax.__version__} ({libraries}, Python {python})', flush=True)
        sys.exit(0)
    path = _check_config_flags(argv[1:])
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise _flag_error(error, path) from None
    except Exception as error:  # any error of the code in a configuration file
        raise _config_error(error, path) from None
    if 'config' in flags.FLAGS:
        if path is None:
            raise UsageError(NO_CONFIG)
        _check_config(flags.FLAGS['config'].value, path)
    return rest


def _print_help() -> None:
    """The script's docstring, its flags and, if it has a --config, all settings."""
    script = sys.modules['__main__']
    print((script.__doc__ or '').strip(), end='\n\n')
    for module in (script, sys.modules[__name__]):  # the flags of each, without the module's name
        print(flags.FLAGS.module_help(module).strip().partition('\n')[2])
    if 'config' in flags.FLAGS:
        print('\nSettings, each changed by --config.KEY=VALUE, and their defaults:')
        for key, (default, *_) in SETTINGS.items():
            value = 'left open' if isinstance(default, type) else repr(default)
            print(f'  {describe(key)} [{value}]')
    print(end='', flush=True)


def _check_config_flags(argv: list[str]) -> str | None:
    """Checks that --config.KEY is a setting and --config=FILE a Python file; returns the file."""
    path = None
    for argument, following in itertools.pairwise([*argv, '']):
        if match := re.match(r'--?(?:no)?config\.([^=]+)', argument):
            try:
                check_key(match[1])
            except UsageError as error:
                raise UsageError(f'--config.{match[1]}: {error}') from None
        elif match := re.fullmatch(r'--?config(?:=(.*))?', argument):
            path = (match[1] or following).partition(':')[0]
            if not os.path.isfile(path):
                raise UsageError(
                    f'--config={path}: no such file; the path is relative to the current folder, '
                    f'{os.getcwd()}'
                )
            if not path.endswith('.py'):
                raise UsageError(f'--config={path} is not a Python file: expected {CONFIG_FILE}')
    return path


def _flag_error(error: flags.Error, path: str | None) -> UsageError:
    """The UsageError for an error that absl or ml_collections found on the command line."""
    text = ' '.join(str(error).split())
    if missing := re.search(r'Flag (--\w+) must have a value other than None', text):
        return UsageError(f'{missing[1]} is missing; see --help')
    if 'Error whilst parsing config file' in text:
        return _config_error(error, path)
    if 'before a value for --config' in text:
        return UsageError(
            '--config=FILE must come before the settings that change it, --config.KEY=VALUE'
        )
    if unknown := re.match(r"Unknown command line flag '(.*?)'(?:.*Did you mean: (.*) \?)?", text):
        if not path and unknown[1].removeprefix('no').startswith('config.'):
            return UsageError(NO_CONFIG)
        return UsageError(f'there is no flag --{unknown[1]}; {_flag_hint(*unknown.groups())}')
    for pythons_words, plain in NOT_A_VALUE.items():
        text = re.sub(pythons_words, plain, text)
    key = re.search(r'--config\.([\w.]+)=', text)
    return UsageError(f'{text}; expected {describe(key[1])}' if key else text)


def _flag_hint(name: str, alike: str | None) -> str:
    """What to give in place of the unknown flag `name`; `alike` are the flags that absl suggests.

    A setting that was given without its section is changed by --config.SECTION.NAME.
    """
    if 'config' in flags.FLAGS:
        last = name.rpartition('.')[2]
        keys = [key for key in SETTINGS if key.rpartition('.')[2] == last]
        if keys:
            return f'a setting is changed by {" or ".join(f"--config.{key}=.." for key in keys)}'
    return f'did you mean --{alike}?' if alike else 'see --help'


def _config_error(error: BaseException, path: str) -> UsageError:
    """The UsageError for an error in the code of a configuration file; it names the line."""
    frames = traceback.extract_tb(error.__traceback__)
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
        frames += traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename == path]
    # A setting of the command line was looked up in a result that has no settings.
    looked_up = 'Attempting to lookup' in str(error) or isinstance(error, KeyError)
    if looked_up and not frames:
        return UsageError(f'{path}: {WRONG_RESULT}')
    if "has no attribute 'get_config'" in str(error) and not frames:
        return UsageError(f'{path} has no function get_config(): {WRONG_RESULT}')
    line = frames[-1].line if frames else ''
    place = f'{path}, line {frames[-1].lineno} ({line})' if frames else path
    if isinstance(error, UserError):
        return UsageError(f'{place}: {error}')
    problem = f'{type(error).__name__}: {error}'
    if types := re.search(r"original type <class '(.+?)'> .* to type <class '(.+?)'>", problem):
        found, expected = (name.rpartition('.')[2] for name in types.groups())
        problem = f'a value of type {found} cannot take the place of one of type {expected}'
    for key in re.findall(r'\w\.(\w+\.\w+)', line):  # config.train.steps -> train.steps
        try:
            check_key(key)
        except UsageError as unknown:
            return UsageError(f'{place}: {unknown}')
        if isinstance(error, TypeError | ValueError):
            problem += f'; expected {describe(key)}'
    return UsageError(f'{place}: {problem}')


def _check_config(config, path: str) -> None:
    """Raises UsageError unless a configuration file returned all settings and no others."""
    if not isinstance(config, ConfigDict) or keys_of(config) != set(SETTINGS):
        raise UsageError(f'{path}: {WRONG_RESULT}')
