"""Progress bars on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar

from tqdm import tqdm

from probe.callbacks.base import ProbeCallback

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results.result import ProbeResult
    from probe.runner import ProbeRunner


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar without tqdm's background thread, which would outlive the run."""

    monitor_interval: ClassVar[int] = 0


class ProgressBars(ProbeCallback):
    """One bar per pass over E or U, on stderr.

    Attributes:
        force: show the bars also where stderr is not a terminal (a file, a pipe).
    """

    def __init__(self, force: bool = False) -> None:
        """Args: `force`, whether bars are shown also where stderr is not a terminal."""
        self.force = force
        self._bar: _Bar | None = None
        self._pass: tuple[str, str] | None = None

    def on_progress(self, runner: ProbeRunner, phase: str, done: int, total: int, what: str) -> None:
        """Advance the bar of this pass; a new pass gets a new bar."""
        if not runner.fabric.is_global_zero or not (self.force or sys.stderr.isatty()):
            return
        if self._pass != (phase, what):
            self._close()
            label = bar_label(phase, what)
            self._bar = _Bar(total=total, desc=label, unit="seq", file=sys.stderr, dynamic_ncols=True)
            self._pass = (phase, what)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._close()

    def on_report_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Close the last bar before the report is printed."""
        self._close()

    def on_probe_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Close the last bar."""
        self._close()

    def on_exception(self, runner: ProbeRunner, module: EntropyProbe, exception: BaseException) -> None:
        """Close the bar where it stands, so that the error starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        """Close the bar that is shown, if one is; the next pass starts a new one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._pass = None


def bar_label(phase: str, what: str) -> str:
    """The text before the bar, wide enough that the bars of a run stand below each other.

    >>> bar_label("ground_truth", "score E")
    'ground truth: score E                 '
    """
    label = phase.replace("_", " ")
    return (f"{label}: {what}" if what else label).ljust(38)
