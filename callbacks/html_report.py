"""The run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.files.atomic import ensure_replaceable
from probe.loading.tokenizer import token_decoder
from probe.report.html.run import write_page
from probe.text import error_text

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class HtmlReport(ProbeCallback):
    """Writes a run to `output.report_path`: one page that needs no network, whole or not at all.

    It has everything that a log of the level `debug` has for people, whatever the level of the log; texts are left out
    where `detailed_logging.log_sequences` is false.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Args: `path`, the HTML file to write."""
        self.path = Path(path)

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the file can be written."""
        if runner.fabric.is_global_zero:
            ensure_replaceable(self.path)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Write the file."""
        if not runner.fabric.is_global_zero:
            return
        config = runner.config.detailed_logging
        try:
            write_page(self.path, result, runner.state, config, token_decoder(module.tokenizer))
        except LogError as error:
            runner.errors.append(error)
        except Exception as error:  # a fault of the page ends no run, and keeps nobody else from publishing
            failure = LogError(f"the report was not written to {self.path}: {error_text(error)}")
            failure.__cause__ = error
            runner.errors.append(failure)
        else:
            runner.written["report"] = str(self.path)
