"""Text for a terminal, which obeys the control characters in it."""

import sys
from typing import TextIO

from gpt2_jax.foreign import escape


def printable(text: str, stream: TextIO | None) -> str:
    r"""The text with control characters shown as escapes, \x1b for one, if `stream` is a terminal.

    A model may have learned sequences that set the title, clear the screen or fill the clipboard.
    Newlines and tabs stay. In a file or a pipe the text stays as it is.
    """
    return escape(text, keep='\n\t') if stream and stream.isatty() else text


def say(text: str) -> None:
    """Prints a line, which may hold names that others chose, at once."""
    print(printable(text, sys.stdout), flush=True)
