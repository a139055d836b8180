"""The report of a run as a table on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.report.terminal import report
from probe.text import printable

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class ConsoleReport(ProbeCallback):
    """Prints the report of a run to stdout."""

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Print the report."""
        say(runner, report(result))


def say(runner: ProbeRunner, text: str) -> None:
    """Print to stdout, from the first process.

    A closed pipe (`| head`) becomes an error of the runner's, so that publishing goes on.
    What stdout cannot show (control characters, text beyond its encoding) is shown as escapes.
    """
    if not runner.fabric.is_global_zero:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except (OSError, ValueError) as error:  # a full disk, a closed pipe; a stdout that a reward has closed
        runner.errors.append(LogError(f"cannot print to stdout: {error}; the log files have the results"))
