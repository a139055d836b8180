"""Phases 1 to 3: the first-order prediction deltaH1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.prediction import Predicted
    from probe.runner import ProbeRunner


class DeltaH1(ProbeCallback):
    """Computes X on E, the optimizer's step from U, and their inner product."""

    def compute(self, runner: ProbeRunner, module: EntropyProbe) -> Predicted:
        """Compute deltaH1."""
        sample = runner.state.drawn
        derivative = runner.phase(
            "entropy_gradient", module, lambda progress: module.entropy_gradient(sample, progress)
        )
        update = runner.state.update or runner.phase(
            "update", module, lambda progress: module.update(sample, progress)
        )
        return runner.phase(
            "prediction", module, lambda progress: module.prediction(sample, derivative, update, progress)
        )
