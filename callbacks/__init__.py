"""The callbacks of a probe run: what computes the phases, and what publishes the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.imports import at_first_use

if TYPE_CHECKING:
    from probe.callbacks.base import ProbeCallback
    from probe.callbacks.console import ConsoleReport
    from probe.callbacks.defaults import default_callbacks
    from probe.callbacks.delta_h1 import DeltaH1
    from probe.callbacks.detailed_logging import DetailedLogging
    from probe.callbacks.fit_memory import FitMemoryFile
    from probe.callbacks.ground_truth import GroundTruth
    from probe.callbacks.html_report import HtmlReport
    from probe.callbacks.progress import ProgressBars
    from probe.callbacks.results_file import ResultsFile
    from probe.callbacks.tensorboard import TensorBoardDiagnostics
    from probe.phases.state import PHASES

_HOME = {
    "PHASES": "probe.phases.state",
    "ConsoleReport": "probe.callbacks.console",
    "DeltaH1": "probe.callbacks.delta_h1",
    "DetailedLogging": "probe.callbacks.detailed_logging",
    "FitMemoryFile": "probe.callbacks.fit_memory",
    "GroundTruth": "probe.callbacks.ground_truth",
    "HtmlReport": "probe.callbacks.html_report",
    "ProbeCallback": "probe.callbacks.base",
    "ProgressBars": "probe.callbacks.progress",
    "ResultsFile": "probe.callbacks.results_file",
    "TensorBoardDiagnostics": "probe.callbacks.tensorboard",
    "default_callbacks": "probe.callbacks.defaults",
}

__all__ = [
    "PHASES",
    "ConsoleReport",
    "DeltaH1",
    "DetailedLogging",
    "FitMemoryFile",
    "GroundTruth",
    "HtmlReport",
    "ProbeCallback",
    "ProgressBars",
    "ResultsFile",
    "TensorBoardDiagnostics",
    "default_callbacks",
]

__getattr__ = at_first_use(__name__, _HOME)
"""The base class alone, which the command line needs to read `trainer.callbacks`, loads no library."""
