"""Entropy Probe: what the next RL update does to a language model's entropy, predicted and measured.

>>> from probe import OfflineEntropyProbe
>>> probe = OfflineEntropyProbe.from_config_file("configs/quickstart.yaml")  # doctest: +SKIP
>>> results = probe.run_mixed_probe()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from probe.imports import at_first_use

if TYPE_CHECKING:
    from probe.callbacks.defaults import default_callbacks
    from probe.callbacks.rollout_recorder import RolloutRecorderCallback
    from probe.callbacks.training_lightning import EntropyProbeCallback
    from probe.callbacks.training_transformers import EntropyProbeTrainerCallback
    from probe.config.schema import ProbeConfig
    from probe.errors.exceptions import ProbeError
    from probe.files.log_files import load_log
    from probe.live.watch import watch
    from probe.module import EntropyProbe
    from probe.offline import OfflineEntropyProbe
    from probe.report.compare import compare
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner

try:
    __version__ = version("entropy-probe")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_HOME = {
    "EntropyProbeCallback": "probe.callbacks.training_lightning",
    "EntropyProbeTrainerCallback": "probe.callbacks.training_transformers",
    "EntropyProbe": "probe.module",
    "OfflineEntropyProbe": "probe.offline",
    "ProbeConfig": "probe.config",
    "ProbeError": "probe.errors",
    "ProbeResult": "probe.results",
    "ProbeRunner": "probe.runner",
    "RolloutRecorderCallback": "probe.callbacks.rollout_recorder",
    "compare": "probe.report.compare",
    "default_callbacks": "probe.callbacks.defaults",
    "load_log": "probe.files.log_files",
    "watch": "probe.live.watch",
}

__all__ = [
    "EntropyProbe",
    "EntropyProbeCallback",
    "EntropyProbeTrainerCallback",
    "OfflineEntropyProbe",
    "ProbeConfig",
    "ProbeError",
    "ProbeResult",
    "ProbeRunner",
    "RolloutRecorderCallback",
    "compare",
    "default_callbacks",
    "load_log",
    "watch",
]

__getattr__ = at_first_use(__name__, _HOME)
"""`import probe` alone does not load transformers and Lightning."""
