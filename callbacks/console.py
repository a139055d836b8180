"""The report of a run as a table on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.text import Text

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.report.terminal import closing, styled_report
from probe.terminal import columns, encodable, encoding_of, fitted_lines, rendered, understands_escapes

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class ConsoleReport(ProbeCallback):
    """Prints the report of a run to stdout."""

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Print the report, as wide as the terminal allows."""
        width, encoding = columns(sys.stdout), encoding_of(sys.stdout)
        _print(runner, rendered(styled_report(result, width, encoding), sys.stdout))

    def on_probe_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """The verdict once more, where the eye is when a run has ended, and where its files are."""
        last = closing(result.values, runner.written, columns(sys.stdout), encoding_of(sys.stdout))
        _print(runner, rendered(Text("\n") + last if last else last, sys.stdout))


def say(runner: ProbeRunner, text: str) -> None:
    """Print to stdout, from the first process.

    What stdout cannot show (control characters, text beyond its encoding) is shown as escapes; on a terminal, lines
    that are too long are wrapped between words.
    """
    text = encodable(text, encoding_of(sys.stdout))
    if understands_escapes(sys.stdout):
        text = fitted_lines(text, sys.stdout)
    _print(runner, text)


def _print(runner: ProbeRunner, text: str) -> None:
    """Print to stdout, from the first process; a closed pipe (`| head`) becomes an error of the runner's.

    Publishing goes on.
    """
    if not runner.fabric.is_global_zero:
        return
    try:
        print(text, end="", flush=True)
    except (OSError, ValueError) as error:  # a full disk, a closed pipe; a stdout that a reward has closed
        runner.errors.append(LogError(f"cannot print to stdout: {error}; the log files have the results"))
