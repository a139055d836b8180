"""Where numbers and lines go: the console, loggers of several makers, and the charts of TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from probe.errors.exceptions import ConfigError
from probe.live.alarm import Alarm
from probe.live.lines import cost_line, probe_line
from probe.live.names import ALARMS, band, full_name, scalars
from probe.live.outcome import Outcome
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.snapshot import isolated_rng
from probe.text import error_text

Log = Callable[[Mapping[str, float], int], None]
"""Called with numbers by name (`entropy_probe/...`) and the optimizer step they belong to."""
OWN_LOG_FAILED = (
    "{name} failed at step {step} and is not used any more ({error}); the numbers are still in `history`"
)
HOSTS_LOG_FAILED = (
    "{name} failed and gets nothing from the probe any more ({error}); the numbers are still in "
    "`watch.history`"
)
"""What is said of a log that was given to the probe alone, and of one that a trainer writes to as well."""
STILL_STEPS = 3
"""Probed steps of exactly 0 after which there is a warning."""
LAYOUT: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "Entropy: predicted and realised": {
        "nats per token": (
            "Multiline",
            ("H_orig_tok", "H_predicted_tok", "H_tracked_tok", "collapse_entropy"),
        ),
        "change since the first probe": (
            "Multiline",
            ("cumulative_H_tok", "cumulative_deltaH1_tok", "cumulative_deltaH_true_tok"),
        ),
    },
    "Entropy: predicted and realised, with 95 % interval": {
        "predicted: the first probe's plus the sum of deltaH1, nats per token": (
            "Margin",
            band("H_predicted"),
        ),
        "measured: the same plus the sum of deltaH_true, nats per token": ("Margin", band("H_tracked")),
    },
    "Change of entropy since the first probe, with 95 % interval": {
        "of the level, nats per token": ("Margin", band("cumulative_H")),
        "sum of deltaH1 (predicted), nats per token": ("Margin", band("cumulative_deltaH1")),
        "sum of deltaH_true (measured), nats per token": ("Margin", band("cumulative_deltaH_true")),
    },
    "Change of entropy per step, with 95 % interval": {
        "deltaH1 (predicted), nats per token": ("Margin", band("deltaH1")),
        "deltaH_true (measured), nats per token": ("Margin", band("deltaH_true")),
        "mean per step over the last probes: predicted, nats per token": ("Margin", band("mean_deltaH1")),
        "mean per step over the last probes: measured, nats per token": ("Margin", band("mean_deltaH_true")),
        "parts of deltaH1": (
            "Multiline",
            ("deltaH1_tok", "deltaH1_gradient_tok", "deltaH1_momentum_tok", "deltaH1_decay_tok"),
        ),
    },
    "Forecast": {
        "chance of collapse and of explosion within the horizon, and alarms": (
            "Multiline",
            ("collapse_chance", "explosion_chance", *ALARMS.values()),
        ),
        # the upper end is often far away, and would set the scale
        "steps to collapse, and the lower end of the interval": (
            "Multiline",
            ("steps_to_collapse", "steps_to_collapse_low"),
        ),
    },
}
"""The charts of TensorBoard's tab CUSTOM SCALARS: chart type and names."""


def tensorboard_layout(prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout for `SummaryWriter.add_custom_scalars`.

    Args:
        prefix: what the host puts before names (`train/` in transformers' Trainer).
    """

    def tags(kind: str, names: tuple[str, ...]) -> list[str]:
        full = [prefix + full_name(name) for name in names]
        # in charts of several lines TensorBoard takes tags for regular expressions
        return [f"^{name}$" for name in full] if kind == "Multiline" else full

    return {
        category: {title: [kind, tags(kind, names)] for title, (kind, names) in charts.items()}
        for category, charts in LAYOUT.items()
    }


def as_log(target: Any) -> Log | None:
    """A function that logs to `target`.

    Args:
        target: None, a function of a mapping and a step (Fabric's `log_dict`), a Lightning logger (`log_metrics`), a
            `SummaryWriter` (`add_scalar`), or a Weights & Biases run (`log`).

    Raises:
        ConfigError: it is none of these.
    """
    if target is None:
        return None
    if hasattr(target, "log_metrics"):
        return lambda metrics, step: target.log_metrics(dict(metrics), step=step)
    if hasattr(target, "add_scalar"):
        if hasattr(target, "add_custom_scalars"):
            target.add_custom_scalars(tensorboard_layout())

        def write(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                target.add_scalar(name, value, step)

        return write
    if callable(target):
        return lambda metrics, step: target(dict(metrics), step)
    if callable(getattr(target, "log", None)):
        return lambda metrics, step: target.log(dict(metrics), step=step)
    raise ConfigError(
        "log: expected a function of (mapping, step), a Lightning logger, a SummaryWriter or a wandb run, found "
        f"{type(target).__name__}"
    )


class Outlet:
    """One log of the host's. What fails there is said and ends no training; after that it gets nothing any more."""

    def __init__(self, write: Log, name: str, strict: bool, failure: str = HOSTS_LOG_FAILED) -> None:
        """Nothing is written yet.

        Args:
            write: writes numbers by name, at a step.
            name: of the log.
            strict: raise what `write` raises.
            failure: what is said, with `{name}`, `{step}` and `{error}`.
        """
        self._write, self._name, self._strict, self._failure = write, name, strict, failure
        self._failed = False

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Write, unless it has failed before."""
        if self._failed:
            return
        try:
            with isolated_rng():  # loggers draw names for files and runs
                self._write(numbers, step)
        except Exception as error:
            if self._strict:
                raise
            self._failed = True
            say(self._failure.format(name=self._name, step=step, error=error_text(error)), warn=True)


class Outlets:
    """Where the entries of one watch go: a line for each, the log, and what is worth a line only sometimes."""

    def __init__(self, log: Log | None, schedule: Schedule, strict: bool) -> None:
        """Args: `log` or None, the `schedule` whose cost is said, and whether errors of the log are raised."""
        self._log = None if log is None else Outlet(log, "the log", strict, OWN_LOG_FAILED)
        self._schedule = schedule
        self._verdict_said = ""
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
            self._log.send(scalars(entry), entry["step"])
        self._watch_for_standstill(outcome.moved)

    def publish_alarms(self, alarms: Sequence[Alarm]) -> None:
        """Log alarms under the step after which they were raised, which may be one that was not probed."""
        if self._log is not None and alarms:
            self._log.send(scalars({ALARMS[one.forecast.rising]: 1.0 for one in alarms}), alarms[0].step)

    def say_cost(self) -> None:
        """The cost model, once, when a training step and a probe have been timed that was not the first one.

        With `every` given nothing depends on it, and the first one will do.
        """
        timed = self._schedule.probes > 1 or self._schedule.every is not None
        if self._cost_of is not None and timed and not self._cost_said:
            self._cost_said = True
            say(cost_line(self._schedule, *self._cost_of))

    def _say_probe(self, entry: Mapping[str, Any]) -> None:
        """One line per probe; with the first reason where the verdict has changed for the worse."""
        line = probe_line(entry)
        if entry["verdict"] not in ("trustworthy", self._verdict_said):
            line += f" [{entry['verdict_reasons'][0]}]"
        self._verdict_said = entry["verdict"]
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
