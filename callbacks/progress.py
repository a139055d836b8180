"""Progress on stderr: how far a pass has come, and a line for each phase that is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.progress import ProgressDisplay, done_line, progress_display
from probe.report.rows import PHASES

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class ProgressBars(ProbeCallback):
    """Shows each pass over E or U while it lasts, and says of each phase how long it took.

    On a terminal a pass is a bar that goes when it is done; where stderr is a file or a pipe, or `NO_COLOR` is set, a
    pass that takes long has a line now and then, with per cent and time left.
    """

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._display: ProgressDisplay | None = None
        self._said: set[str] = set()

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Begin anew."""
        self._close()
        self._display, self._said = None, set()

    def on_progress(self, runner: ProbeRunner, phase: str, done: int, total: int, what: str) -> None:
        """Show how far this pass has come."""
        if runner.fabric.is_global_zero:
            self._shown().show(label_of(phase, what), done, total)

    def on_sample_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Say how long loading took."""
        self._say_done(runner)

    def on_sample_end(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Say how long it took."""
        self._say_done(runner)

    on_entropy_gradient_end = on_update_end = on_prediction_end = on_sample_end
    on_attribution_end = on_what_if_end = on_ground_truth_end = on_sample_end

    def on_report_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Take the last bar away, and leave a line free before the report."""
        self._close()
        if self._said and runner.fabric.is_global_zero:
            self._shown().line("")

    def on_probe_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Take the last bar away."""
        self._close()

    def on_exception(self, runner: ProbeRunner, module: EntropyProbe, exception: BaseException) -> None:
        """Take the bar away, so that the error stands on a line of its own."""
        self._close()

    def _shown(self) -> ProgressDisplay:
        """What stderr can show."""
        if self._display is None:
            self._display = progress_display()
        return self._display

    def _say_done(self, runner: ProbeRunner) -> None:
        """One line for each phase that has ended since the last one."""
        self._close()
        new = [name for name in runner.state.timing if name not in self._said]
        self._said.update(new)
        for name in new if runner.fabric.is_global_zero else ():
            seconds = runner.state.timing[name]
            self._shown().line(done_line(name.replace("_", " "), seconds, PHASES.get(name, "")))

    def _close(self) -> None:
        """Take away what is shown."""
        if self._display is not None:
            self._display.close()


def label_of(phase: str, what: str) -> str:
    """What a pass is called.

    >>> label_of("ground_truth", "score E")
    'ground truth: score E'
    """
    label = phase.replace("_", " ")
    return f"{label}: {what}" if what else label
