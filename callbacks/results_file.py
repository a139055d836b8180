"""The result mapping as a JSON file, for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.files.atomic import atomic_write_bytes, ensure_replaceable
from probe.files.strict_json import dump_bytes

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class ResultsFile(ProbeCallback):
    """Writes the result to `output.results_path`, whole or not at all; NaN and infinities become null.

    Attributes:
        path: the file; None writes nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Args: `path`, the JSON file to write, or None for none."""
        self.path = None if path is None else Path(path)

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the file can be written."""
        if self.path is not None and runner.fabric.is_global_zero:
            ensure_replaceable(self.path)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Write the file."""
        if self.path is None or not runner.fabric.is_global_zero:
            return
        try:
            atomic_write_bytes(self.path, dump_bytes(result.values))
            runner.written["results"] = str(self.path)
        except LogError as error:
            runner.errors.append(error)
