"""Phases 1 to 3: the first-order prediction deltaH1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.files.atomic import ensure_replaceable

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.runner import ProbeRunner


class DeltaH1(ProbeCallback):
    """Computes X on E, the optimizer's step from U, and their inner product."""

    phases = ("entropy_gradient", "update", "prediction")

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that what the control variates learn can be written."""
        path = module.config.probe_rework.control_variates_path
        if path is not None and runner.fabric.is_global_zero:
            ensure_replaceable(path)

    def run_entropy_gradient(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Compute X."""
        runner.state.entropy_gradient = module.entropy_gradient(
            runner.state, runner.progress("entropy_gradient")
        )

    def run_update(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Compute the step."""
        runner.state.update = module.update(runner.state, runner.progress("update"))

    def run_prediction(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Compute deltaH1."""
        runner.state.prediction = module.prediction(runner.state, runner.progress("prediction"))
