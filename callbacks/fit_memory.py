"""The file in which runs of one policy keep what their control variates learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.files.atomic import ensure_replaceable
from probe.phases.fit_memory import write_fit_memory

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class FitMemoryFile(ProbeCallback):
    """Writes what this run's E has added to `probe_rework.control_variates_path`, whole or not at all.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Args: `path`, the file."""
        self.path = Path(path)

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the file can be written."""
        if runner.fabric.is_global_zero:
            ensure_replaceable(self.path)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Write the file; where that fails, what was measured is published all the same."""
        predicted = runner.state.predicted
        if predicted is None or predicted.controls is None or not runner.fabric.is_global_zero:
            return
        try:
            write_fit_memory(self.path, predicted.controls.learnt)
        except LogError as error:
            runner.errors.append(error)
