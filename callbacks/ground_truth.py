"""Phase 5: the ground truth deltaH_true."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.estimators.ground_truth import GroundTruth as MeasuredChange
    from probe.module import EntropyProbe
    from probe.runner import ProbeRunner


class GroundTruth(ProbeCallback):
    """Takes the optimizer's real step on a snapshot and measures the entropy change on E."""

    def compute(self, runner: ProbeRunner, module: EntropyProbe) -> MeasuredChange:
        """Compute deltaH_true, and first the step where no prediction has needed it yet."""
        sample, predicted = runner.state.drawn, runner.state.predicted
        update = runner.state.update or runner.phase(
            "update", module, lambda progress: module.update(sample, progress)
        )
        return runner.phase(
            "ground_truth", module, lambda progress: module.ground_truth(sample, update, predicted, progress)
        )
