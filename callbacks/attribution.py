"""Phase 4: which tokens of U did it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.attribution import Attribution as Attributed
    from probe.runner import ProbeRunner


class Attribution(ProbeCallback):
    """Attributes deltaH1, and the change of the expected reward, to the tokens of U."""

    def compute(self, runner: ProbeRunner, module: EntropyProbe) -> Attributed:
        """Attribute the prediction, which has to be there."""
        sample, update, predicted = runner.state.drawn, runner.state.update, runner.state.predicted
        if update is None or predicted is None:
            raise RuntimeError("expected deltaH1, found none; the callback DeltaH1 comes first")
        return runner.phase(
            "attribution", module, lambda progress: module.attribution(sample, update, predicted, progress)
        )
