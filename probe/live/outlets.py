"""Where numbers and lines go: the console, loggers of several makers, and the charts of TensorBoard."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.errors.exceptions import ConfigError
from probe.live.alarm import Alarm
from probe.live.lines import cost_line, probe_line
from probe.live.names import ALARMS, STEPS, band, full_name, probe_scalars, scalars
from probe.live.notes import Notes, NoteTaker
from probe.live.outcome import Outcome
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.live.settings import WatchSettings
from probe.report.boards import TensorBoardWriter, TrackedRun, board_of, board_of_logger
from probe.report.summary import Summary
from probe.snapshot import isolated_rng
from probe.text import error_text

Log = Callable[[Mapping[str, float], int], None]
"""Called with numbers by name (`entropy_probe/...`) and the optimizer step they belong to."""
Show = Callable[[Notes, int], None]
"""Called with what is more than numbers, and the optimizer step that it belongs to."""
OWN_LOG_FAILED = (
    "{name} failed at step {step} and is not used any more ({error}); the numbers are still in `history`"
)
HOSTS_LOG_FAILED = (
    "{name} failed and gets nothing from the probe any more ({error}); the numbers are still in "
    "`watch.history`"
)
"""What is said of a log that was given to the probe alone, and of one that a trainer writes to as well."""
NOTES_FAILED = "{name} takes no pictures and texts from step {step} on ({error}); it gets numbers as before"
STILL_STEPS = 3
"""Probed steps of exactly 0 after which there is a warning."""
LAYOUT: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "Entropy, nats per token, with 95 % interval": {
        "measured: level of the policy before the step": ("Margin", band("H_orig")),
        "predicted: the first probe's plus the sum of deltaH1": ("Margin", band("H_predicted")),
        "tracked: the first probe's plus the sum of deltaH_true": ("Margin", band("H_tracked")),
    },
    "Change since the first probe, nats per token, with 95 % interval": {
        "of the level": ("Margin", band("cumulative_H")),
        "predicted: sum of deltaH1": ("Margin", band("cumulative_deltaH1")),
        "measured: sum of deltaH_true": ("Margin", band("cumulative_deltaH_true")),
    },
    "Change per step, nats per token, with 95 % interval": {
        "predicted: deltaH1": ("Margin", band("deltaH1")),
        "measured: deltaH_true": ("Margin", band("deltaH_true")),
        "mean of the last probes, predicted": ("Margin", band("mean_deltaH1")),
        "mean of the last probes, measured": ("Margin", band("mean_deltaH_true")),
    },
    "Forecast": {
        "steps to collapse: median, ends of the 95 % interval where it has any": ("Multiline", STEPS),
        "chance of collapse within the horizon; alarms are peaks": (
            "Multiline",
            ("collapse_chance", ALARMS[False]),
        ),
        "chance of explosion within the horizon; alarms are peaks": (
            "Multiline",
            ("explosion_chance", ALARMS[True]),
        ),
    },
}
"""The charts of TensorBoard's tab CUSTOM SCALARS: chart type and names.

A chart has one colour for all curves of a run, so that each has a chart of its own, with its band; curves beside each
other are in the pictures (`probe.report.training_figures`)."""


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """The layout for `SummaryWriter.add_custom_scalars`."""

    def tags(kind: str, names: tuple[str, ...]) -> list[str]:
        full = [full_name(name) for name in names]
        # in charts of several lines TensorBoard takes tags for regular expressions
        return [f"^{name}$" for name in full] if kind == "Multiline" else full

    layout = {}
    for category, charts in LAYOUT.items():
        shown = {title: [kind, tags(kind, names)] for title, (kind, names) in charts.items()}
        # of charts with bands TensorBoard shows the last one first
        banded = any(kind == "Margin" for kind, _ in charts.values())
        layout[category] = dict(reversed(shown.items())) if banded else shown
    return layout


@dataclass(frozen=True)
class LogTo:
    """A log that takes more than numbers; called like one that does not.

    Attributes:
        write: writes numbers by name, at a step.
        show: shows texts and pictures, at a step.
    """

    write: Log
    show: Show

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers."""
        self.write(numbers, step)


def as_log(target: Any) -> Log | None:
    """A function that logs to `target`.

    Args:
        target: None, a function of a mapping and a step (Fabric's `log_dict`), a Lightning logger (`log_metrics`), a
            `SummaryWriter` (`add_scalar`), or a run of Weights & Biases or trackio (`log`).

    Raises:
        ConfigError: it is none of these.
    """
    if target is None or isinstance(target, LogTo):
        return target
    if hasattr(target, "log_metrics"):
        return to_logger(target)
    if hasattr(target, "add_scalar"):
        if hasattr(target, "add_custom_scalars"):
            target.add_custom_scalars(tensorboard_layout())
        writer = TensorBoardWriter(target)
        return LogTo(writer.numbers, lambda notes, step: notes.show_on(board_of(target), step))
    if callable(target):
        return lambda metrics, step: target(dict(metrics), step)
    if callable(getattr(target, "log", None)):
        run = TrackedRun(target)
        return LogTo(run.numbers, lambda notes, step: notes.show_on(board_of(target), step))
    raise ConfigError(
        "log: expected a function of (mapping, step), a Lightning logger, a SummaryWriter or a wandb run, found "
        f"{type(target).__name__}"
    )


def to_logger(logger: Any) -> LogTo:
    """A log to a Lightning logger."""
    return LogTo(
        lambda numbers, step: logger.log_metrics(dict(numbers), step=step),
        lambda notes, step: notes.show_on(board_of_logger(logger), step),
    )


def kind_of(reason: str) -> str:
    """A reason without its numbers, so that those of one kind are equal.

    >>> kind_of("The effective sample size of E is 9.5 of 64 responses") == kind_of(
    ...     "The effective sample size of E is 12 of 64 responses"
    ... )
    True
    """
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason)


class Outlet:
    """One log of the host's. What fails there is said and ends no training; after that it gets nothing any more."""

    def __init__(self, write: Log, name: str, strict: bool, failure: str = HOSTS_LOG_FAILED) -> None:
        """Nothing is written yet.

        Args:
            write: writes numbers by name, at a step; a `LogTo` shows notes too.
            name: of the log.
            strict: raise what `write` raises.
            failure: what is said, with `{name}`, `{step}` and `{error}`.
        """
        self._write, self._name, self._strict = write, name, strict
        self._failures = {False: failure, True: NOTES_FAILED}
        self._failed: set[bool] = set()

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Write, unless it has failed before."""
        self._attempt(lambda: self._write(numbers, step), step)

    def show(self, notes: Notes, step: int) -> None:
        """Show what is more than numbers, where the log takes it; what fails there ends no numbers."""
        if isinstance(self._write, LogTo):
            show = self._write.show
            self._attempt(lambda: show(notes, step), step, of_notes=True)

    def _attempt(self, write: Callable[[], None], step: int, of_notes: bool = False) -> None:
        """Write, unless it has failed before; a failure is said."""
        if self._failed & {False, of_notes}:  # numbers that cannot be written end the notes too
            return
        try:
            with isolated_rng():  # loggers draw names for files and runs
                write()
        except Exception as error:
            if self._strict:
                raise
            self._failed.add(of_notes)
            said = self._failures[of_notes].format(name=self._name, step=step, error=error_text(error))
            say(said, warn=True)


class Outlets:
    """Where the entries of one watch go: a line for each, the log, and what is worth a line only sometimes.

    Attributes:
        notes: what is worth a text or a picture.
        report: writes the page of the training, at every alarm and in the end; None where nobody wants one.
    """

    def __init__(self, log: Log | None, schedule: Schedule, settings: WatchSettings) -> None:
        """Args: `log` or None, the `schedule` whose cost is said, and the `settings` of the probe."""
        self._log = None if log is None else Outlet(log, "the log", settings.strict, OWN_LOG_FAILED)
        self.notes = NoteTaker(settings)
        self.report: Callable[[], object] | None = None
        self._strict = settings.strict
        self._schedule = schedule
        self._verdict_said = ""
        self._kinds_said: set[str] = set()
        self._still = 0
        self._cost_of: tuple[int, float, Mapping[str, float]] | None = None
        self._cost_said = False

    def publish(self, entry: Mapping[str, Any], outcome: Outcome) -> None:
        """Say and log one entry.

        Args:
            entry: of the history.
            outcome: what it was made from.
        """
        self._say_probe(entry)
        timing = dict(outcome.timing)
        timing["other"] = max(entry["seconds"] - sum(timing.values()), 0.0)
        self._cost_of = (outcome.sizes.B_E, outcome.mean_length, timing)
        if self._log is not None:
            self._log.send(probe_scalars(entry), entry["step"])
        self._watch_for_standstill(outcome.moved)

    def publish_alarms(
        self, alarms: list[Alarm], history: Sequence[Mapping[str, Any]], probed: bool = True
    ) -> list[Alarm]:
        """Log alarms under the step after which they were raised, and what is worth a text or a picture.

        Args:
            alarms: new ones.
            history: with the last probe.
            probed: whether that has just been made.

        Returns:
            The alarms.
        """
        if alarms:
            self._write_report()
        if self._log is None:
            return alarms
        if alarms:
            self._log.send(scalars({ALARMS[one.forecast.rising]: 1.0 for one in alarms}), alarms[0].step)
        notes = self.notes.of_probe(history, alarms) if probed else self.notes.of_alarms(history, alarms)
        if notes is not None:
            self._log.show(notes, alarms[0].step if alarms else history[-1]["step"])
        return alarms

    def publish_end(self, history: Sequence[Mapping[str, Any]], summary: Summary | None, step: int) -> None:
        """Show what the training comes to.

        Args:
            history: of all of it.
            summary: of the history.
            step: the last one.
        """
        if history:
            self._write_report()
        notes = None if self._log is None else self.notes.of_end(history, summary)
        if self._log is not None and notes is not None:
            self._log.show(notes, step)

    def _write_report(self) -> None:
        """Write the page; where it cannot be written, that is said, and training goes on."""
        if self.report is None:
            return
        start = time.perf_counter()
        try:
            self.report()
        except Exception as error:  # no reason to end a training
            if self._strict:
                raise
            say(f"the report was not written ({error_text(error)}); training goes on", warn=True)
        self.notes.spent(time.perf_counter() - start)

    def say_cost(self) -> None:
        """The cost model, once, when a training step and a probe have been timed that was not the first one.

        With `every` given nothing depends on it, and the first one will do.
        """
        timed = self._schedule.probes > 1 or self._schedule.every is not None
        if self._cost_of is not None and timed and not self._cost_said:
            self._cost_said = True
            say(cost_line(self._schedule, *self._cost_of))

    def _say_probe(self, entry: Mapping[str, Any]) -> None:
        """One line per probe; with the first reason where the verdict is another one, or the reason of a new kind."""
        line, word = probe_line(entry), entry["verdict"]
        if word != "trustworthy":
            kind = kind_of(entry["verdict_reasons"][0])
            if word != self._verdict_said or kind not in self._kinds_said:
                line += f" [{entry['verdict_reasons'][0]}]"
            self._kinds_said.add(kind)
        self._verdict_said = word
        say(line)

    def _watch_for_standstill(self, moved: bool) -> None:
        """Warn where the parameters seem to move outside of `optimizer.step`."""
        self._still = 0 if moved else self._still + 1
        if self._still == STILL_STEPS:
            say(
                f"{STILL_STEPS} probed steps in a row have changed nothing: a learning rate of 0, gradients of 0, "
                "steps below the resolution of 16-bit weights, or an optimizer that moves parameters outside of its "
                "step (in gradient hooks, say), which the probe does not see",
                warn=True,
            )
