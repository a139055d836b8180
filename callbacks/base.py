"""The hooks of a probe run: every hook that any callback may define is listed in `ProbeCallback`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.state import PhaseResult
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class ProbeCallback:
    """Base class of the callbacks of a probe run; every hook does nothing unless overridden.

    `runner.state` (a `probe.phases.state.ProbeState`) holds what the phases produced so far.
    """

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called first, before the policy is loaded: the place to try whether files can be written."""

    def compute(self, runner: ProbeRunner, module: EntropyProbe) -> PhaseResult | None:
        """Called when E and U are there, in the order of the callbacks: run the phases that this callback is for.

        Each through `runner.phase`, which calls the hooks around it, times it and keeps its result.

        Returns:
            The result of the last of them; None from a callback that computes nothing.
        """
        return None

    def on_sample_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before E and U are drawn."""

    def on_sample_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when E, U, rewards and advantages are there and E is scored."""

    def on_entropy_gradient_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before the entropy's gradient X is computed on E."""

    def on_entropy_gradient_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when X is there."""

    def on_update_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before the gradient on U and the optimizer's step."""

    def on_update_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when the step is there; the parameters are unchanged."""

    def on_prediction_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before X and the step are put together."""

    def on_prediction_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when deltaH1 is there."""

    def on_attribution_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before deltaH1 is attributed to the tokens of U."""

    def on_attribution_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when the contributions of U's tokens are there."""

    def on_what_if_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before interventions on the update are compared."""

    def on_what_if_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when their effects are there; parameters and optimizer are as before."""

    def on_ground_truth_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before the real step is measured."""

    def on_ground_truth_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called when deltaH_true is there; the parameters are restored."""

    def on_report_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Called before the result object is built."""

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Called with the finished result: the place to publish it."""

    def on_progress(self, runner: ProbeRunner, phase: str, done: int, total: int, what: str) -> None:
        """Called as a phase advances: `done` of `total` sequences of the pass named `what`."""

    def on_probe_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Called last, also after everything is published."""

    def on_exception(self, runner: ProbeRunner, module: EntropyProbe, exception: BaseException) -> None:
        """Called when a run stops with an exception (Ctrl-C included), after everything is restored."""
