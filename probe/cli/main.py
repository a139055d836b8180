"""The command line: what a call comes to."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType

from probe import __version__
from probe.cli.parser import READERS, Reading, check_subcommand, parse
from probe.cli.shorthands import shorthands
from probe.distributed.environment import first_process
from probe.errors.exceptions import ProbeError
from probe.errors.memory import is_out_of_memory
from probe.errors.remedies import Remedy
from probe.sweep.settings import IncompleteSweepError
from probe.terminal import StderrHandler
from probe.text import error_text, printable, text_of

USAGE_ERROR = 2
INTERNAL_ERROR = 1
INCOMPLETE = 3
"""Some points of a sweep failed; the others are there."""
INTERRUPTED = 130
TERMINATED = 143
LIBRARIES = (
    "lightning",
    "lightning.fabric",
    "lightning.pytorch",
    "transformers",
    "datasets",
    "huggingface_hub",
    "bitsandbytes",
    "torch",
)
"""Whose loggers are quiet while a command runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Bad input gives one line on stderr and code 2, a sweep of which points failed one and code 3; `--debug` shows the
    traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"entropy-probe {__version__}")
        return 0
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        with terminated_like_interrupted(), quiet_console():
            check_subcommand(args)
            command = parse(shorthands(args) or ["--help"], lambda: _commands().TrainerSection)
            if isinstance(command, Reading):
                _module(READERS[command.name]).execute(**command.options)
            else:
                _commands().ProbeCLI(command)
    except IncompleteSweepError as error:
        return _fail(error, text_of(error), INCOMPLETE, debug)
    except ProbeError as error:
        return _fail(error, text_of(error), USAGE_ERROR, debug)
    except KeyboardInterrupt as error:
        kept = text_of(error) or "interrupted; everything is restored"
        return _fail(error, kept, TERMINATED if _was_terminated(error) else INTERRUPTED, debug)
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(error, f"out of memory: {text_of(error)}; {Remedy.MEMORY.run}", USAGE_ERROR, debug)
        message = f"unexpected {error_text(error)} (--debug shows where)"
        return _fail(error, message, INTERNAL_ERROR, debug)
    return 0


def _commands() -> ModuleType:
    """What does the work, with all libraries; a command line that is wrong is refused without them."""
    return _module("probe.cli.commands")


def _module(name: str) -> ModuleType:
    """A module that needs libraries."""
    try:
        found = importlib.import_module(name)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted while starting") from error
    _quieten_libraries()  # once more: some set their level when they are imported
    return found


class Terminated(KeyboardInterrupt):
    """SIGTERM has asked for the end."""


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM (a scheduler's notice) end a command as Ctrl-C does: restored, with a word on what was kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def end(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _was_terminated(error: BaseException | None) -> bool:
    """Whether SIGTERM is at the root of an interruption."""
    while error is not None and not isinstance(error, Terminated):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print one line, or the traceback, from the one process that speaks, and give the exit code."""
    lines = "".join(traceback.format_exception(error)) if debug else ""
    if getattr(error, "said_by_others", not first_process()):
        return code
    line = f"{lines}entropy-probe: error: {' '.join(message.split())}"
    with suppress(OSError, ValueError):  # nobody listens any more
        print(printable(line).encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    return code


class _Printable(logging.Formatter):
    """Keeps what only a terminal would understand out of notes."""

    def format(self, record: logging.LogRecord) -> str:
        """The note."""
        return printable(super().format(record))


def _quieten_libraries() -> None:
    """Let the loggers of libraries say errors only."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_console() -> Iterator[None]:
    """Leave stderr to the probe's own notes, progress and errors; libraries' warnings are not the user's to mend."""
    handler = StderrHandler()
    handler.setFormatter(_Printable("%(message)s"))
    handler.addFilter(lambda record: first_process())
    package = logging.getLogger("probe")
    libraries = {name: logging.getLogger(name).level for name in LIBRARIES}
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    _quieten_libraries()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        for name, before in libraries.items():
            logging.getLogger(name).setLevel(before)
