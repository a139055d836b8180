"""Which built-in callbacks a configuration asks for."""

from __future__ import annotations

from probe.callbacks.attribution import Attribution
from probe.callbacks.base import ProbeCallback
from probe.callbacks.console import ConsoleReport
from probe.callbacks.delta_h1 import DeltaH1
from probe.callbacks.detailed_logging import DetailedLogging
from probe.callbacks.fit_memory import FitMemoryFile
from probe.callbacks.ground_truth import GroundTruth
from probe.callbacks.html_report import HtmlReport
from probe.callbacks.progress import ProgressBars
from probe.callbacks.results_file import ResultsFile
from probe.callbacks.tensorboard import TensorBoardDiagnostics
from probe.callbacks.what_if import WhatIf
from probe.config.schema import ProbeConfig


def measuring_callbacks(config: ProbeConfig) -> list[ProbeCallback]:
    """Those that compute what the sections of a configuration ask for."""
    callbacks: list[ProbeCallback] = []
    if config.probe_rework.compute_delta_h1:
        callbacks.append(DeltaH1())
        if config.probe_rework.control_variates_path is not None:
            callbacks.append(FitMemoryFile(config.probe_rework.control_variates_path))
        if config.attribution.enabled:
            callbacks.append(Attribution())
            if config.whatif.enabled:
                callbacks.append(WhatIf())
    if config.importance.enabled:
        callbacks.append(GroundTruth())
    return callbacks


def default_callbacks(config: ProbeConfig) -> list[ProbeCallback]:
    """Those that compute, and those that publish: progress, report, log files, TensorBoard."""
    callbacks: list[ProbeCallback] = [ProgressBars(), *measuring_callbacks(config), ConsoleReport()]
    if config.output.results_path is not None:
        callbacks.append(ResultsFile(config.output.results_path))
    if config.detailed_logging.enabled:
        callbacks.append(DetailedLogging(config.detailed_logging))
    if config.output.report_path is not None:
        callbacks.append(HtmlReport(config.output.report_path))
    return [*callbacks, TensorBoardDiagnostics()]
