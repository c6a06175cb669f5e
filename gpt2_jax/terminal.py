"""Text for a terminal, which obeys the control characters in it."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TextIO

from gpt2_jax.errors import UserError
from gpt2_jax.foreign import escape


def printable(text: str, stream: TextIO | None) -> str:
    r"""The text with control characters shown as escapes, \x1b for one, if `stream` is a terminal.

    A model may have learned sequences that set the title, clear the screen or fill the clipboard.
    Newlines and tabs stay. In a file or a pipe the text stays as it is.
    """
    return escape(text, keep='\n\t') if stream and stream.isatty() else text


def in_one_line(text: str) -> str:
    r"""The text with newlines as \n and all other control characters as escapes."""
    return escape(json.dumps(text, ensure_ascii=False)[1:-1])


def counted(n: int, plural: str) -> str:
    """'2,000 empty files', '1 empty file'."""
    return f'{n:,} {plural.removesuffix("s") if n == 1 else plural}'


def binary_size(n_bytes: int) -> str:
    """'1.5 GiB', '0.2 MiB'."""
    return f'{n_bytes / 2**30:.1f} GiB' if n_bytes >= 2**30 else f'{n_bytes / 2**20:.1f} MiB'


def say(text: str) -> None:
    """Prints a line, which may hold names that others chose, at once."""
    put(printable(text, sys.stdout))


def put(text: str) -> None:
    """Prints a line as it is, at once. Raises UserError if standard output cannot be written."""
    with printing():
        print(text, flush=True)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Raises UserError if the block, which prints, cannot write to standard output."""
    try:
        yield
    except BrokenPipeError:  # the reader ended first: no error of this process
        raise
    except OSError as error:
        raise UserError(
            f'cannot write to standard output: {error.strerror or error}; remove the cause, or '
            'send the output elsewhere, and run the same command again'
        ) from None
