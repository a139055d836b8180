"""What the drop-in probe reports: the names of its numbers, the lines it prints, and where they go."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from probe.callbacks.console import with_error
from probe.errors import ConfigError
from probe.live.cost import Schedule
from probe.live.forecast import Forecast
from probe.snapshot import isolated_rng
from probe.text import error_text, printable
from probe.verdict import WORDS

logger = logging.getLogger("probe.live")

PREFIX = "entropy_probe"
Log = Callable[[Mapping[str, float], int], None]
"""Called with numbers by name (`entropy_probe/...`) and the optimizer step they belong to."""

LIVE_KEYS: dict[str, str] = {
    "H_orig": "entropy of the policy before the step",
    "deltaH1": "change predicted: entropy gradient times the optimizer's step",
    "deltaH_true": "change measured: E rescored after the step",
    "residual": "same-E difference of the two: curvature and code error only",
    "cumulative_deltaH1": "sum of deltaH1 over all steps since the first probe, interpolated linearly between probes",
    "cumulative_deltaH_true": "the same of deltaH_true",
    "cumulative_H": "H_orig now minus H_orig at the first probe: what the two above should be",
    "H_predicted": "H_orig at the first probe plus cumulative_deltaH1",
    "H_tracked": "H_orig at the first probe plus cumulative_deltaH_true",
    "deltaH1_momentum": "part of deltaH1 that earlier batches have in the step, through the optimizer's momentum",
    "deltaH1_decay": "part of deltaH1 from weight decay",
    "deltaH1_gradient": "part of deltaH1 from this step's own gradient: the rest",
}
"""Quantities in nats per response, and with the suffix `_tok` in nats per token; `_se` is the standard error,
`_ci95_low` and `_ci95_high` the ends of the 95 % interval. Errors are those of sampling E; those of cumulative sums
count the scatter of steps between probes too."""

LIVE_NUMBERS: dict[str, str] = {
    "momentum_share_tok": "deltaH1_momentum_tok / deltaH1_tok; absent where deltaH1_tok cannot be told from 0",
    "decay_share_tok": "deltaH1_decay_tok / deltaH1_tok; absent likewise",
    "steps_to_collapse": "optimizer steps until H_orig_tok is forecast to fall to the collapse threshold; None before "
    "the third probe, infinite where it does not fall",
    "steps_to_collapse_low": "lower end of its 95 % interval",
    "steps_to_collapse_high": "upper end of its 95 % interval; absent where it is infinite",
    "entropy_rate": "mean relative change of H_orig_tok per step over the last probes",
    "collapse_entropy": "the threshold, nats per token",
    "verdict_code": "0 trustworthy, 1 caution, 2 unresolved, 3 invalid: how far this probe's numbers can be believed",
    "ESS": "effective sample size of the importance weights, at most B_E",
    "pareto_k": "shape of the tail of the importance weights; absent where it cannot be fitted",
    "noise_floor_tok": "size that a change of 0 can seem to have by rounding, nats per token",
    "truncated_fraction": "share of E cut off by max_new_tokens",
    "avg_generation_length": "tokens per response of E",
    "learning_rate": "largest learning rate of the watched parameters",
    "step_norm": "Euclidean norm of the step",
    "seconds": "time of this probe",
    "cost_share": "time in probes over training time without them, since the second step",
    "every": "steps from probe to probe",
}
"""Further numbers, without a suffix."""

STEPS = ("steps_to_collapse", "steps_to_collapse_low", "steps_to_collapse_high")
IN_SIGHT, FEW_PROBES = 10, 50
"""Horizons within which a collapse is in sight; steps between probes from which on a hint says how to get more."""
LIVE_TEXTS: dict[str, str] = {
    "verdict_reasons": "why the verdict is not better, a list of sentences",
    "shares_reason": "why there are no parts of momentum and decay; absent where there are",
    "outlook": "the forecast in words; `no collapse in sight` where the drift is not clearly downward, or it is far",
}
"""Texts in the history; they are not logged."""

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
    "Change of entropy per step, with 95 % interval": {
        "deltaH1 (predicted), nats per token": (
            "Margin",
            ("deltaH1_tok", "deltaH1_tok_ci95_low", "deltaH1_tok_ci95_high"),
        ),
        "deltaH_true (measured), nats per token": (
            "Margin",
            ("deltaH_true_tok", "deltaH_true_tok_ci95_low", "deltaH_true_tok_ci95_high"),
        ),
        "parts of deltaH1": (
            "Multiline",
            ("deltaH1_tok", "deltaH1_gradient_tok", "deltaH1_momentum_tok", "deltaH1_decay_tok"),
        ),
    },
    "Forecast": {
        # the upper end is often far away, and would set the scale
        "steps to collapse, and the lower end of the interval": (
            "Multiline",
            ("steps_to_collapse", "steps_to_collapse_low"),
        ),
    },
}
"""The charts of TensorBoard's tab CUSTOM SCALARS: chart type and names."""


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a history entry that are logged, by their full names.

    >>> scalars({"step": 3, "H_orig_tok": 0.5, "pareto_k": None, "steps_to_collapse": math.inf, "verdict": "caution"})
    {'entropy_probe/H_orig_tok': 0.5}
    """
    found = {}
    for name, value in entry.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if _is_logged(name) and number and math.isfinite(value):
            found[f"{PREFIX}/{name}"] = float(value)
    return found


def _is_logged(name: str) -> bool:
    """Whether a number of the history goes to the log: not the errors of parts and sums, nor these per response."""
    key = re.sub(r"(_se|_ci95_low|_ci95_high)$", "", name)
    if key.removesuffix("_tok") not in LIVE_KEYS:
        return name in LIVE_NUMBERS
    plain = key.removesuffix("_tok") in ("H_orig", "deltaH1", "deltaH_true")
    if name == key:
        return plain or key.endswith("_tok")
    return plain and (name.endswith("_se") or (key.endswith("_tok") and key != "H_orig_tok"))


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one probe's values under the names of `LIVE_KEYS` and `LIVE_NUMBERS`, its verdict and texts."""
    entry: dict[str, Any] = {"verdict": values["verdict"], "verdict_code": WORDS.index(values["verdict"])}
    for key in LIVE_KEYS:
        for name in (key, f"{key}_tok"):
            if name in values:
                entry[name] = values[name]
            if f"{name}_se" in values:
                entry[f"{name}_se"] = values[f"{name}_se"]
            if f"{name}_ci95" in values:
                entry[f"{name}_ci95_low"], entry[f"{name}_ci95_high"] = values[f"{name}_ci95"]
    for source in (values, values["diagnostics"]):
        entry |= {name: source[name] for name in LIVE_NUMBERS if name in source}
    entry |= {name: values[name] for name in LIVE_TEXTS if name in values}
    return entry


def tensorboard_layout(prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout for `SummaryWriter.add_custom_scalars`.

    Args:
        prefix: what the host puts before names (`train/` in transformers' Trainer).
    """

    def tags(kind: str, names: tuple[str, ...]) -> list[str]:
        full = [f"{prefix}{PREFIX}/{name}" for name in names]
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


# ---------------------------------------------------------------- lines


def say(line: str, *, warn: bool = False) -> None:
    """Print a line through logging; where nobody has set logging up, or its handlers fail, on stderr.

    Never raises: a full disk or a dead socket behind a logging handler is no reason to end a training.
    """
    try:
        _log_line(line, warn)
    except Exception as error:
        with contextlib.suppress(Exception):  # stderr may be closed too, and then nobody listens
            print(f"entropy probe: {line} (logging failed: {error_text(error)})", file=sys.stderr, flush=True)


def log_or_say(write: Callable[[], object], name: str, strict: bool) -> bool:
    """Give numbers to a host's log; what fails there is said and ends no training.

    Args:
        write: writes them.
        name: of the log, for the message.
        strict: raise what `write` raises.

    Returns:
        Whether it worked; a log that failed is to get nothing any more.
    """
    try:
        with isolated_rng():  # loggers draw names for files and runs
            write()
    except Exception as error:
        if strict:
            raise
        say(
            f"{name} failed and gets nothing from the probe any more ({error_text(error)}); the numbers are still in "
            "`watch.history`",
            warn=True,
        )
        return False
    return True


def _log_line(line: str, warn: bool) -> None:
    """Hand a line to logging."""
    line = printable(line)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    logger.log(logging.WARNING if warn else logging.INFO, "entropy probe: %s", line)


def probe_line(entry: Mapping[str, Any]) -> str:
    """One probe in a line."""
    change = [_with_error(entry, name) for name in ("deltaH1_tok", "deltaH_true_tok")]
    parts = [
        f"step {entry['step']}: H {_with_error(entry, 'H_orig_tok')} nats/token",
        f"this step {change[0]} predicted, {change[1]} measured ({entry['verdict']})",
    ]
    if entry.get("outlook"):
        parts.append(entry["outlook"])
    return "; ".join(parts)


def outlook(found: Forecast | None, horizon: int) -> str:
    """What a forecast comes to, in words; empty where there is none.

    Args:
        found: the forecast.
        horizon: of the alarm. Ten of them ahead nothing is in sight.
    """
    if found is None:
        return ""
    if found.threshold >= found.H:
        return "collapsed"
    if not found.expected or found.steps > IN_SIGHT * horizon:
        return "no collapse in sight"
    return f"collapse in {forecast_words(found.steps, found.low, found.high)}"


def forecast_words(steps: float, low: float, high: float) -> str:
    """A number of steps with its interval.

    >>> forecast_words(31.2, 21.9, 55.0), forecast_words(31.2, 21.9, math.inf)
    ('about 31 steps (95 %: 22 to 55)', 'about 31 steps (95 %: at least 22)')
    """
    interval = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else f"at least {low:.0f}"
    return f"about {steps:.0f} steps (95 %: {interval})"


def cost_line(schedule: Schedule, B_E: int, length: float, timing: Mapping[str, float]) -> str:
    """The cost model in a line."""
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.2g}" for name, seconds in timing.items())
    line = f"a probe of {B_E} responses of {length:.0f} tokens takes {schedule.expected_cost:.2g} s ({parts})"
    if schedule.step_seconds is None or schedule.interval is None:
        return line
    line += f", a training step {schedule.step_seconds:.2g} s"
    every = "every step" if schedule.interval == 1 else f"every {schedule.interval} steps"
    share = f"{100 * (schedule.share_ahead or 0):.0f} % of the training time"
    if schedule.every is not None:
        return f"{line}: {every}, {share}"
    hint = " (set every=... for more)" if schedule.interval > FEW_PROBES else ""
    return f"{line}: one {every}, {share}, keeps the budget of {100 * schedule.budget:.3g} %{hint}"


def alarm_line(entry: Mapping[str, Any], threshold: float, horizon: int) -> str:
    """The warning, with its remedy."""
    H = entry["H_orig_tok"]
    if threshold >= H:
        what = f"the policy's entropy has collapsed: {H:.3g} nats/token, at or below {threshold:.3g}"
    else:
        what = (
            f"entropy collapse forecast: from {H:.3g} to {threshold:.3g} nats/token in "
            f"{forecast_words(*(entry[name] for name in STEPS))}, within the horizon of {horizon}"
        )
    share = entry.get("momentum_share_tok")
    inertia = (
        f" {100 * share:.0f} % of the change is momentum, so a lower rate acts with delay."
        if share is not None and share > 0.5
        else ""
    )
    return (
        f"{what}; lower the learning rate, raise the entropy or KL coefficient, or clip less from above "
        f"(epsilon_high).{inertia}"
    )


def _with_error(entry: Mapping[str, Any], name: str) -> str:
    value, se = entry.get(name), entry.get(f"{name}_se")
    return "not resolved" if value is None else with_error(value, se)
