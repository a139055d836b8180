"""What a report says, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.digits import (
    NOT_RESOLVED,
    interval_text,
    number_text,
    plain_words,
    with_error,
)
from probe.estimand import ESTIMANDS, SEQUENCE, TOKEN, Estimand, Number, Numbers, PerEstimand, from_mapping
from probe.results import diagnostic_keys, keys
from probe.results.quantity import Form, Shown
from probe.text import percent

if TYPE_CHECKING:
    from probe.results.result import ProbeResult

ERRORS = "+/- standard error, [95 % interval]"
"""How the errors of changes are shown."""
ESTIMATORS = {
    "causal": "by the entropy ahead",
    "matched": "by whole responses",
    "causal+cv": "with control variates",
    "matched+cv": "with control variates",
    "snis": "one weight per response",
    "snis_clipped": "biased: large weights clipped",
    "per_decision": "one weight per token",
    "per_decision+cv": "with control variates",
    "resample": "a fresh E after the update",
}
"""The estimators of `estimates` in words."""
PHASES = {
    "demo_policy": "trained (once; from now on it is reused)",
    "load": "policy and optimizer state read from the checkpoint",
    "sample": "responses drawn, rewarded and scored",
    "entropy_gradient": "gradient of the entropy on E",
    "update": "gradient of the loss on U, optimizer step",
    "prediction": "deltaH1",
    "attribution": "what every token of U adds to deltaH1",
    "what_if": "interventions on the update",
    "ground_truth": "deltaH_true: E scored again after the step",
}
"""What takes time in words."""


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        label: what the line is about.
        cells: the values: `(per token, per response)`, or one value for both; a cell may have several lines.
        meaning: the same in plain words.
    """

    label: str
    cells: tuple[str, ...]
    meaning: str


def headline(result: ProbeResult) -> str:
    """The first line: what was probed, with which sizes."""
    sizes, what = size_texts(result.values), f"Entropy probe of {result.checkpoint_name}"
    return f"{what}: {', '.join(sizes)}" if sizes else what


def size_texts(values: Mapping[str, Any]) -> list[str]:
    """The sizes of the batches and the learning rate, as far as they are known."""
    sizes = []
    if values.get("B_E") is not None:
        sizes.append(f"E = {values['B_E']} responses")
    if values.get("B_U") is not None:
        # G is null where a rollout file has groups of several sizes.
        group = f" x {values['G']} responses" if values.get("G") is not None else ""
        sizes.append(f"U = {values['B_U']} prompts{group}")
    if values.get("learning_rate") is not None:
        sizes.append(f"learning rate {values['learning_rate']:.6g}")
    return sizes


def entropy_rows(values: Mapping[str, Any]) -> list[Row]:
    """The entropies and their changes, as far as they were computed; changes with their 95 % intervals."""
    rows = []
    for quantity in keys.QUANTITIES:
        numbers = from_mapping(values, quantity.key)
        if quantity.per_token and (numbers.token or numbers.sequence):
            if quantity.row is not None:
                rows.append(_pair_row(values, quantity.row, numbers))
            for part in quantity.parts:
                found = _part(values, quantity.key, part.ending)
                if part.row is not None and (found.token or found.sequence):
                    rows.append(_pair_row(values, part.row, found))
    return rows


def _part(values: Mapping[str, Any], key: str, ending: str) -> Numbers:
    """A part of a quantity as numbers of their own."""

    def read(estimand: Estimand) -> Number | None:
        name = estimand.key(key, ending)
        return Number(values[name]) if name in values else None

    return PerEstimand(read(SEQUENCE), read(TOKEN))


def _pair_row(values: Mapping[str, Any], shown: Shown, numbers: Numbers) -> Row:
    """The row of a quantity that both estimands have."""
    with_errors = any(one is not None and (one.se is not None or one.null_error) for one in numbers)
    meaning = shown.meaning if with_errors or not shown.without_error else shown.without_error
    digits = from_mapping(values, "deltaH_true") if shown.form == "level" else numbers
    cells = [_cell(shown.form, numbers[estimand], digits[estimand]) for estimand in ESTIMANDS]
    return Row(shown.label, tuple(cells), meaning)


def estimator_rows(values: Mapping[str, Any]) -> list[Row]:
    """Every estimator that was computed, where there are more of a change than the reported one."""
    found: Sequence[Mapping[str, Any]] = values.get("estimates") or ()
    if all(entry.get("reported") for entry in found):
        return []
    rows = []
    for quantity, estimator in dict.fromkeys((entry["quantity"], entry["estimator"]) for entry in found):
        entries = {
            entry["estimand"]: entry
            for entry in found
            if (entry["quantity"], entry["estimator"]) == (quantity, estimator)
        }
        pair = [entries.get(estimand.name) for estimand in ESTIMANDS]
        cells = [with_error(entry.get("value"), entry.get("se")) if entry else "-" for entry in pair]
        gains = [_gain(entry.get("variance_ratio")) if entry else "-" for entry in pair]
        meaning = ESTIMATORS.get(estimator, "")
        if any(entry.get("reported") for entry in entries.values()):
            meaning = f"reported: {meaning}" if meaning else "reported"
        rows.append(Row(f"{quantity} {estimator}", (*cells, " / ".join(gains)), meaning))
    return rows


def trust_rows(values: Mapping[str, Any]) -> list[Row]:
    """What says whether the measurement is any good."""
    found = values.get("diagnostics", {})
    rows = []
    for one in diagnostic_keys.DIAGNOSTICS:
        if one.row is not None and any(estimand.key(one.key) in found for estimand in one.estimands):
            cell = _FORMS[one.row.form](found, one.key, _of(values, one.row.of))
            if cell is not None:
                rows.append(Row(one.row.label, (cell,), _meaning(found, one.key, one.row)))
    return rows


def _of(values: Mapping[str, Any], key: str) -> str:
    """` of WHOLE` where a value is a part of something that is known."""
    return f" of {values[key]}" if key in values else ""


def _meaning(found: Mapping[str, Any], key: str, shown: Shown) -> str:
    """What a row means, where its value does not say more itself."""
    if shown.form == "derivative":
        return found.get("derivative_reason") or shown.meaning
    if shown.form == "estimator":
        return ESTIMATORS.get(found[key], "")
    if shown.form == "switch":
        return found[key].partition(":")[2].strip() or shown.meaning
    return shown.meaning


def _pareto(found: Mapping[str, Any], key: str, of: str) -> str:
    k, limit = found[key], found.get("pareto_k_limit")
    fitted = "not fitted" if k is None or not math.isfinite(k) else f"{k:.2f}"
    return fitted + ("" if limit is None else f" (limit {limit:.2f})")


def _weights(found: Mapping[str, Any], key: str, of: str) -> str | None:
    if "w_max" not in found:
        return None
    return f"{number_text(found['w_min'])} to {number_text(found['w_max'])}"


def _floor(found: Mapping[str, Any], key: str, of: str) -> str:
    floors = [(found[e.key(key)], e.unit) for e in ESTIMANDS if e.key(key) in found]
    return "\n".join(f"{number_text(floor)} {unit}" for floor, unit in floors)


def _passes(found: Mapping[str, Any], key: str, of: str) -> str:
    return f"{found['passes_E']:.1f} over E, {found['passes_U']:.1f} over U"


def _if_there(text: Callable[[Any], str]) -> Callable[[Mapping[str, Any], str, str], str | None]:
    """The form of a value that has no row where it is null."""
    return lambda found, key, of: None if found[key] is None else text(found[key]) + of


_FORMS: Mapping[str, Callable[[Mapping[str, Any], str, str], str | None]] = {
    "number": lambda found, key, of: number_text(found[key]) + of,
    "count": _if_there(str),
    "share": _if_there(percent),
    "difference": _if_there("{:.1e}".format),
    "name": _if_there(str),
    "words": lambda found, key, of: plain_words(found[key]),
    "derivative": lambda found, key, of: plain_words(found[key]),
    "estimator": _if_there(str),
    "switch": lambda found, key, of: found[key].partition(":")[0].strip() if found[key] else None,
    "flags": lambda found, key, of: ",\n".join(found[key]) or "none",
    "pareto": _pareto,
    "weights": _weights,
    "floor": _floor,
    "passes": _passes,
}
"""How a diagnostic is shown, by form: from the diagnostics, its key and what it is a part of; None for no row."""


def settings_rows(values: Mapping[str, Any]) -> list[Row]:
    """Which settings of the update come from the checkpoint, from the configuration, or from neither."""
    found: Mapping[str, Any] = values.get("settings") or {}
    rows = []
    for label in ("checkpoint", "configuration", "default"):
        given: Mapping[str, Any] = found.get(label) or {}
        if given:
            listed = ", ".join(f"{key.rsplit('.', 1)[-1]} {_setting(value)}" for key, value in given.items())
            rows.append(Row(label, (str(len(given)),), listed))
    overruled: Mapping[str, Any] = found.get("overruled") or {}
    if overruled:
        listed = ", ".join(f"{key.rsplit('.', 1)[-1]} {_setting(value)}" for key, value in overruled.items())
        rows.append(
            Row("overruled", (str(len(overruled)),), f"the configuration counts; trained with {listed}")
        )
    unknown: Sequence[str] = found.get("unknown") or ()
    if unknown:
        listed = ", ".join(unknown)
        rows.append(Row("not known", (str(len(unknown)),), f"options that may matter: {listed}"))
    if found:
        rows.append(Row("file", ("",), found.get("note", "")))
    return rows


def time_rows(values: Mapping[str, Any]) -> list[Row]:
    """Seconds per phase, in the order in which they ran, the total last."""
    timing = values.get("timing", {})
    throughput: Mapping[str, Mapping[str, float]] = values.get("throughput") or {}

    def meaning(name: str) -> str:
        passes = throughput.get(name)
        if passes is None:
            return PHASES.get(name, "")
        return (
            f"{PHASES.get(name, name)} ({passes['tokens_per_second']:,.0f} tokens/s, "
            f"{percent(passes['padding'])} padding)"
        )

    return [
        Row(name.replace("_", " "), (f"{timing[name]:.1f} s",), meaning(name))
        for name in sorted(timing, key=lambda name: name == "total")
        if timing[name] is not None
    ]


def _cell(form: Form, number: Number | None, digits: Number | None) -> str:
    """A number of an estimand; `-` where the result does not have it.

    Args:
        form: `level`, an entropy; `change`, with its standard error, and its 95 % interval below, where there are any;
            or `plain`, without an error of its own.
        number: what is shown.
        digits: whose error says how many digits an entropy needs.
    """
    if number is None:
        return "-"
    if number.value is None or not math.isfinite(number.value):
        return NOT_RESOLVED
    if form == "plain":
        return f"{number.value:.3g}"
    if form == "level":
        error = None if digits is None else digits.se
        decimals = 4 if error is None or not 0 < error < math.inf else 1 - math.floor(math.log10(error))
        return f"{number.value:.{min(max(decimals, 3), 8)}f}"
    below = interval_text(number.ci95)
    return with_error(number.value, number.se) + (f"\n{below}" if below else "")


def _gain(ratio: float | None) -> str:
    """How many times less variance an estimator has."""
    return f"{ratio:.3g}" if ratio is not None and math.isfinite(ratio) else "?"


def _setting(value: Any) -> str:
    """The value of a setting."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
