"""How far work has come: a bar on a terminal that goes when it is done, lines now and then in a file."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from probe.terminal import drawn, padded, terminal_width, understands_escapes
from probe.text import duration, percent, printable

LABEL = 38
"""Columns of the text before a bar, so that bars that follow each other stand alike."""
REDRAW_SECONDS = 0.1
LINE_SECONDS, LINE_SHARE, SILENCE_SECONDS = 10.0, 0.1, 60.0
"""A line comes after a tenth of the work, but not within so many seconds; and after so many seconds at the latest."""


class ProgressDisplay(ABC):
    """Shows one pass at a time."""

    @abstractmethod
    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        """A pass has come so far; another label is another pass.

        Args:
            label: of the pass.
            done: sequences, or steps.
            total: of them.
            note: a value that goes with it.
        """

    @abstractmethod
    def line(self, text: str) -> None:
        """Print a line that stays."""

    @abstractmethod
    def close(self) -> None:
        """The pass has ended, or is left where it stands."""


class LiveBar(ProgressDisplay):
    """A bar on a terminal; nothing of it stays."""

    def __init__(self, stream: TextIO) -> None:
        """Args: `stream`, a terminal."""
        self._stream = stream
        self._console = Console(file=stream, force_terminal=True, force_jupyter=False, legacy_windows=False)
        self._pass: str | None = None
        self._open = ExitStack()
        self._bar: Progress | None = None
        self._drawn_at = 0.0

    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        """Draw the bar, not more often than one can see; a terminal that is gone is no reason to end the work."""
        with suppress(OSError, ValueError):
            self._show(label, done, total, note)

    def _show(self, label: str, done: int, total: int, note: str) -> None:
        """Draw the bar."""
        if label != self._pass:
            self.close()
            self._pass = label
        if done >= total:  # a pass of a single batch is over before there is anything to see
            self.close()
            return
        now = time.monotonic()
        if self._bar is not None and now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        self._console.width = terminal_width(self._stream)
        bar = self._bar or self._started()
        (task,) = bar.task_ids or (bar.add_task("", total=total),)
        text = padded(printable(f"{label}, {note}" if note else label), LABEL)
        bar.update(task, description=text, completed=done, total=total, refresh=True)

    def _started(self) -> Progress:
        """A new bar; without a thread of its own, and stdout and stderr stay what they are."""
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f} %", markup=False),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar = self._open.enter_context(bar)
        self._open.enter_context(drawn(self))
        return bar

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError, ValueError):
            self._console.width = terminal_width(self._stream)
            self._console.print(Text(printable(text)))

    def close(self) -> None:
        """Take the bar away."""
        self._bar = self._pass = None
        with suppress(OSError, ValueError):
            self._open.close()


class ProgressLines(ProgressDisplay):
    """Lines with per cent and time left, a few for a pass that takes long, none for a short one."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: `stream`, any; and `clock`, seconds."""
        self._stream, self._clock = stream, clock
        self._pass: str | None = None
        self._start = self._said_at = clock()
        self._said = 0

    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        """Print a line where one is due."""
        if label != self._pass:
            if self._pass is not None:
                self.close()
            self._pass = label
        if not 0 < done < total:
            self.close()
            return
        now = self._clock()
        waited, share = now - self._said_at, (done - self._said) / total
        if waited < LINE_SECONDS or (share < LINE_SHARE and waited < SILENCE_SECONDS):
            return
        self._said_at, self._said = now, done
        left = (now - self._start) / done * (total - done)
        noted = f", {note}" if note else ""
        self.line(f"{label}: {percent(done / total)} ({done} of {total}){noted}, about {duration(left)} left")

    def line(self, text: str) -> None:
        """Print a line; a stream that nobody reads any more is no reason to end the work."""
        with suppress(OSError, ValueError):
            print(printable(text), file=self._stream, flush=True)

    def close(self) -> None:
        """The next word is of another pass, which begins now."""
        self._pass, self._said = None, 0
        self._start = self._said_at = self._clock()


def done_line(name: str, seconds: float, meaning: str = "") -> str:
    """The line that stays of a phase.

    >>> done_line("ground truth", 2.345, "deltaH_true")
    'ground truth        2.3 s  deltaH_true'
    """
    return f"{name:<16} {seconds:6.1f} s  {meaning}".rstrip()


def progress_display() -> ProgressDisplay:
    """What stderr can show: a bar on a terminal, else lines."""
    return LiveBar(sys.stderr) if understands_escapes(sys.stderr) else ProgressLines(sys.stderr)
