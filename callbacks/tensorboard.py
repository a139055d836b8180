"""The result of a run on TensorBoard, or in any other Lightning logger."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from probe.callbacks.base import ProbeCallback
from probe.errors.exceptions import LogError
from probe.files.atomic import ensure_writable
from probe.files.failures import write_error, write_failure, writer_errors_raised_once
from probe.loading.tokenizer import token_decoder
from probe.report.publish import Shown, publish

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class TensorBoardDiagnostics(ProbeCallback):
    """Sends a result to the run's loggers: numbers, settings, and where they take them pictures, texts, histograms.

    On TensorBoard the tab IMAGES begins with prediction against measurement, TEXT has the verdict and the report. A
    logger of one's own, which may get several checkpoints, has the changes with their 95 % intervals in CUSTOM SCALARS.

    Attributes:
        hyperparameters: log the configuration as hyper-parameters.
        examples: how many responses of E are shown as text.
    """

    def __init__(self, hyperparameters: bool = True, examples: int = 4) -> None:
        """Args: `hyperparameters`, switched off inside a training loop that logs its own, and `examples`."""
        self.hyperparameters = hyperparameters
        self.examples = examples

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the loggers' files can be written."""
        if runner.fabric.is_global_zero:
            for logger in runner.fabric.loggers:
                folder = _folder(logger, "root_dir")
                if folder is not None:
                    ensure_writable(folder)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Publish; a logger that fails does not keep the others from publishing."""
        if not runner.fabric.is_global_zero:
            return
        show_texts = runner.config.detailed_logging.log_sequences is not False
        shown = Shown(
            examples=self.examples if show_texts else 0,
            hyperparameters=self.hyperparameters,
            several=runner.logger is not True,
            tokens=show_texts,
            text_of=token_decoder(module.tokenizer),
        )
        for logger in runner.fabric.loggers:
            try:
                with writer_errors_raised_once():
                    publish(logger, runner.state, result, shown)
                folder = _folder(logger, "log_dir")
                if folder is not None:
                    runner.written[_called(logger)] = folder
            except Exception as error:
                # Loggers of all makers come by here, with exceptions of any kind.
                folder, of_disk = _folder(logger, "log_dir"), write_failure(error)
                failure = LogError(f"{_called(logger)} did not take the results: {error}")
                if folder is not None and of_disk is not None:
                    failure = write_error(folder, of_disk)
                    if runner.logger is True:
                        # the folder is this run's own, and holds half of an events file
                        shutil.rmtree(folder, ignore_errors=True)
                failure.__cause__ = error
                runner.errors.append(failure)


def _called(logger: Any) -> str:
    """What a person knows a logger as: TensorBoard, whatever its class is derived for; else the name of its class."""
    names = [kind.__name__ for kind in type(logger).__mro__]
    return "TensorBoard" if "TensorBoardLogger" in names else names[0]


def _folder(logger: Any, name: str) -> str | None:
    """The local folder that a logger names by `root_dir` or `log_dir`; None where it has none."""
    folder = getattr(logger, name, None)
    return os.fspath(folder) if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder) else None
