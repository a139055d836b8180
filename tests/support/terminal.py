"""A terminal to write on, and what a person sees there: a pseudo-terminal read by an emulator."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pyte
import pytest

from probe.live import say as said

ROWS = 40
ENVIRONMENT = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def seen(text: str | bytes, columns: int) -> list[str]:
    """The lines that stand on an emulated terminal, those that have scrolled away first; without empty ones below."""
    screen = pyte.HistoryScreen(columns, ROWS, history=10_000, ratio=0.5)
    data = text.encode() if isinstance(text, str) else text
    pyte.ByteStream(screen).feed(data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    above = ["".join(row[x].data for x in range(columns)) for row in screen.history.top]
    lines = [line.rstrip() for line in (*above, *screen.display)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def logger_of_nobody(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """A logger that nobody has set up in the place of the probe's, whose records pytest would take."""
    alone = logging.Logger("probe.live")
    monkeypatch.setattr(said, "logger", alone)
    return alone


class Terminal:
    """A pseudo-terminal.

    Attributes:
        columns: of it.
        stream: what a program writes to.
    """

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        self.stream = os.fdopen(self._slave, "w", encoding="utf-8", buffering=1)
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # nobody has it open any more
                return
            if not part:
                return
            self._parts.append(part)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.stream.closed:
            self.stream.close()
            self._reader.join()
            os.close(self._master)

    @property
    def raw(self) -> bytes:
        """Everything that was written; the terminal is closed."""
        self.__exit__(None, None, None)
        return b"".join(self._parts)

    @property
    def lines(self) -> list[str]:
        """What stands on it in the end."""
        return seen(self.raw, self.columns)

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process write to it, with the environment of a terminal."""
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("sys.stdout", self.stream)
        monkeypatch.setattr("sys.stderr", self.stream)

    def run(self, arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> int:
        """Run the command line on it, as a process of its own; the exit code."""
        kept = {
            k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
        }
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-m", "probe", *arguments],
            cwd=folder,
            env={**kept, **ENVIRONMENT, "PYTHONPATH": root, **(environment or {})},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            check=False,
        )
        return done.returncode
