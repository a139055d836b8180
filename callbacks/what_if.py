"""What if the update were another one: interventions on the same E and U."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.what_if import WhatIf as Compared
    from probe.runner import ProbeRunner


class WhatIf(ProbeCallback):
    """Compares interventions on the update that was attributed, and takes the steps of chosen ones."""

    def compute(self, runner: ProbeRunner, module: EntropyProbe) -> Compared:
        """Compare interventions; the attribution has to be there."""
        state = runner.state
        if state.attribution is None:
            raise RuntimeError("expected an attribution, found none; the callback Attribution comes first")
        return runner.phase("what_if", module, lambda progress: module.what_if(state, progress))
