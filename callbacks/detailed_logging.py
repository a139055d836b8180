"""The log files of a run: main log, summary and configuration, in a folder per date."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.config.output import DetailedLoggingConfig
from probe.errors.exceptions import LogError
from probe.files.atomic import ensure_writable, remove_leftovers
from probe.files.failures import write_error
from probe.loading.tokenizer import token_decoder
from probe.logs.store import DATE_FOLDERS, prune
from probe.logs.write import LogPaths, log_of, write_log

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class DetailedLogging(ProbeCallback):
    """Writes the log of a run, at one of four levels of detail.

    Attributes:
        config: the section `detailed_logging`.
        paths: the files of the last run, None before.
    """

    def __init__(self, config: DetailedLoggingConfig | None = None) -> None:
        """Args: `config`, by default that of an empty section."""
        self.config = config if config is not None else DetailedLoggingConfig()
        self.paths: LogPaths | None = None

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the log can be written."""
        self.paths = None
        if self.config.enabled and runner.fabric.is_global_zero:
            folder = ensure_writable(self.config.output_directory)
            for dated in folder.glob(DATE_FOLDERS):
                remove_leftovers(dated)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Write the files, and delete the oldest runs where `max_files` asks for it."""
        if not self.config.enabled:
            return
        if not runner.fabric.is_global_zero:
            if runner.state.sharded:
                log_of(result, runner.state, self.config)  # the first process needs the others' parts
            return
        try:
            self.paths = write_log(result, runner.state, self.config, token_decoder(module.tokenizer))
            runner.written["log"] = str(self.paths.main)
            if self.config.max_files is not None:
                prune(self.config.output_directory, self.config.max_files, keep=self.paths.main)
        except LogError as error:
            runner.errors.append(error)
        except OSError as error:
            runner.errors.append(write_error(self.config.output_directory, error))
