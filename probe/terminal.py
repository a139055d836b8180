"""What a person's terminal can show: its width, its colours, whole numbers; and lines beside what is drawn on it."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.cells import cell_len, chop_cells

from probe.text import printable

NARROWEST, WIDEST = 80, 120
"""Columns that a report has at least, and at most: longer lines are hard to follow."""
_NUMBER = r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?"
_WHOLE = re.compile(
    rf"\(?{_NUMBER} \+/- {_NUMBER}\)?\S*"  # with its error
    rf"|\[{_NUMBER},? {_NUMBER}\]\S*"  # an interval
    rf"|{_NUMBER} to {_NUMBER}"
    rf"|{_NUMBER} %"
)
"""What is read as one number, and never broken over two lines."""


class Drawing(Protocol):
    """What is drawn on a terminal and drawn again as it changes."""

    def line(self, text: str) -> None:
        """Print a line above what is drawn."""


_drawings: list[Drawing] = []
"""What is being drawn on stderr now."""


def columns(stream: TextIO) -> int:
    """The columns that a report on this stream has: `COLUMNS`, else the terminal's, between 80 and 120.

    Where the stream is no terminal there are 80: a file or a pipe is read anywhere, and 80 columns fit everywhere.
    """
    try:
        asked = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        asked = 0
    if asked <= 0:
        try:
            asked = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else NARROWEST
        except (OSError, ValueError, AttributeError):  # a stream without a file, or a closed one
            asked = NARROWEST
    return min(max(asked, NARROWEST), WIDEST)


def understands_escapes(stream: TextIO) -> bool:
    """Whether escape sequences may be written: to terminals only, and not where `NO_COLOR` asks for plain text."""
    try:
        terminal = stream.isatty()
    except (ValueError, AttributeError):  # closed
        return False
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def encodable(text: str, encoding: str) -> str:
    r"""A text as a stream of this encoding can show it: what it cannot is shown as escapes.

    >>> print(encodable("grün\x1b[31m", "ascii"))
    gr\xfcn\x1b[31m
    """
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def encoding_of(stream: TextIO) -> str:
    """The encoding of a stream, where it says one."""
    return getattr(stream, "encoding", None) or "utf-8"


def wrapped(
    text: str, width: int, first: str = "", further: str | None = None, chop: bool = True
) -> list[str]:
    """A text as lines of at most `width` columns; numbers with their errors, and intervals, stay whole.

    Args:
        text: one paragraph; control characters are shown as escapes.
        width: of the terminal.
        first: what the first line begins with.
        further: what the others begin with; by default spaces of the same width.
        chop: cut words that are wider than a line; else they stand on one that is too long.

    >>> wrapped("the change is -0.0039 +/- 0.0001 nats", 20)
    ['the change is', '-0.0039 +/- 0.0001', 'nats']
    >>> wrapped("a long tale", 8, "- ")
    ['- a long', '  tale']
    """
    further = " " * cell_len(first) if further is None else further
    narrow = max(width - max(cell_len(first), cell_len(further)), 1)

    def glued(found: re.Match[str]) -> str:
        return found[0].replace(" ", "\xa0") if len(found[0]) <= narrow else found[0]

    lines, line, empty = list[str](), first, True
    for whole in re.split("[ \n]+", _WHOLE.sub(glued, printable(text))):
        for word in chop_cells(whole, narrow) if chop and cell_len(whole) > narrow else [whole]:
            if not empty and cell_len(line) + 1 + cell_len(word) > width:
                lines.append(line)
                line, empty = further, True
            line += word if empty else f" {word}"
            empty = empty and not word
    return [one.replace("\xa0", " ").rstrip() for one in (*lines, line)]


def padded(text: str, width: int) -> str:
    """A text with spaces up to `width` columns."""
    return text + " " * max(width - cell_len(text), 0)


@contextmanager
def drawn(drawing: Drawing) -> Iterator[None]:
    """While this lasts, lines for stderr go above a drawing."""
    _drawings.append(drawing)
    try:
        yield
    finally:
        _drawings.remove(drawing)


def print_above(text: str) -> None:
    """Print a text on stderr, whatever that is now, above what is drawn there; on a terminal wrapped between words."""
    if _drawings:
        _drawings[-1].line(text)
        return
    stream = sys.stderr
    if understands_escapes(stream):
        text = fitted_lines(text, stream)
    print(text, file=stream, flush=True)


def fitted_lines(text: str, stream: TextIO) -> str:
    """Lines as they are where a terminal has room, else wrapped; a path that is too long stays whole, to be copied."""
    width = terminal_width(stream)
    return "\n".join(
        line if cell_len(line) <= width else "\n".join(wrapped(line, width, "", "  ", chop=False))
        for line in text.split("\n")
    )


def terminal_width(stream: TextIO) -> int:
    """The columns of a terminal, as many as it has; 80 where that is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or NARROWEST
    except (OSError, ValueError, AttributeError):
        return NARROWEST


class StderrHandler(logging.Handler):
    """Prints records on what `sys.stderr` is when they come, above what is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            print_above(self.format(record))
        except Exception:
            self.handleError(record)


def rendered(text: Any, stream: TextIO) -> str:
    """A `rich.text.Text` as it is written to a stream: with colours where that is a terminal.

    Whoever prints it deals with a closed pipe: rich would end the process.
    """
    if not understands_escapes(stream):
        return str(text.plain)
    from rich.console import Console  # 20 ms that the help has no use for

    console = Console(
        file=stream, force_terminal=True, force_jupyter=False, legacy_windows=False, width=WIDEST
    )
    with console.capture() as captured:
        console.print(text, end="", soft_wrap=True, highlight=False, markup=False, emoji=False)
    return captured.get()
