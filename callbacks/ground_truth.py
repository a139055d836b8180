"""Phase 5: the ground truth deltaH_true."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.runner import ProbeRunner


class GroundTruth(ProbeCallback):
    """Takes the optimizer's real step on a snapshot and measures the entropy change on E."""

    phases = ("ground_truth",)

    def run_ground_truth(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Compute deltaH_true, and first the step where no prediction has needed it yet."""
        progress = runner.progress("ground_truth")
        if runner.state.update is None:
            runner.state.update = module.update(runner.state, progress)
        runner.state.ground_truth = module.ground_truth(runner.state, progress)
