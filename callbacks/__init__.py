"""The callbacks of a probe run: what computes the phases, and what publishes the result."""

from probe.callbacks.base import ProbeCallback
from probe.callbacks.console import ConsoleReport
from probe.callbacks.delta_h1 import DeltaH1
from probe.callbacks.detailed_logging import DetailedLogging
from probe.callbacks.fit_memory import FitMemoryFile
from probe.callbacks.ground_truth import GroundTruth
from probe.callbacks.progress import ProgressBars
from probe.callbacks.results_file import ResultsFile
from probe.callbacks.tensorboard import TensorBoardDiagnostics
from probe.phases.state import PHASES

__all__ = [
    "PHASES",
    "ConsoleReport",
    "DeltaH1",
    "DetailedLogging",
    "FitMemoryFile",
    "GroundTruth",
    "ProbeCallback",
    "ProgressBars",
    "ResultsFile",
    "TensorBoardDiagnostics",
]
