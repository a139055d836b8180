"""What a report says, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.report.numbers import (
    NOT_RESOLVED,
    finite,
    interval_text,
    number_text,
    percent,
    plain_words,
    with_error,
)

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
    values = result.values
    sizes = []
    if values.get("B_E") is not None:
        sizes.append(f"E = {values['B_E']} responses")
    if values.get("B_U") is not None:
        # G is null where a rollout file has groups of several sizes.
        group = f" x {values['G']} responses" if values.get("G") is not None else ""
        sizes.append(f"U = {values['B_U']} prompts{group}")
    if values.get("learning_rate") is not None:
        sizes.append(f"learning rate {values['learning_rate']:.6g}")
    what = f"Entropy probe of {result.checkpoint_name}"
    return f"{what}: {', '.join(sizes)}" if sizes else what


def entropy_rows(values: Mapping[str, Any]) -> list[Row]:
    """The entropies and their changes, as far as they were computed; changes with their 95 % intervals."""
    difference = "predicted minus measured"
    if "residual_se" in values or "residual_tok_se" in values:
        difference = "same E: predicted (matched) minus measured (snis); curvature only, no sampling error"
    lines = (
        ("H before", "H_orig{}", _level, "entropy of the policy as it is"),
        ("H after", "H_upd{}", _level, "entropy after the update, on the same E reweighted"),
        ("deltaH1", "deltaH1{}", _change, "change predicted: entropy gradient times optimizer step"),
        (
            "  spread over U",
            "deltaH1{}_sd_U",
            _plain,
            "another U of this size would move deltaH1 by this much",
        ),
        ("deltaH_true", "deltaH_true{}", _change, "change measured: H after minus H before"),
        ("difference", "residual{}", _change, difference),
        ("deltaH2", "deltaH2{}", _change, "second order: what the prediction leaves out"),
        ("eta_10", "eta_10{}", _plain, "learning rate at which deltaH2 is a tenth of deltaH1"),
    )
    rows = []
    for label, key, show, meaning in lines:
        keys = (key.format("_tok"), key.format(""))
        if any(name in values for name in keys):
            rows.append(Row(label, tuple(show(values, name) for name in keys), meaning))
    return rows


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
        pair = [entries.get(estimand) for estimand in ("token", "sequence")]
        cells = [with_error(entry.get("value"), entry.get("se")) if entry else "-" for entry in pair]
        gains = [_gain(entry.get("variance_ratio")) if entry else "-" for entry in pair]
        meaning = ESTIMATORS.get(estimator, "")
        if any(entry.get("reported") for entry in entries.values()):
            meaning = f"reported: {meaning}" if meaning else "reported"
        rows.append(Row(f"{quantity} {estimator}", (*cells, " / ".join(gains)), meaning))
    return rows


def trust_rows(values: Mapping[str, Any]) -> list[Row]:
    """What says whether the measurement is any good."""
    return [*_weight_rows(values), *_arithmetic_rows(values), *_batch_rows(values)]


def _weight_rows(values: Mapping[str, Any]) -> list[Row]:
    """The importance weights."""
    found, rows = values.get("diagnostics", {}), []
    if "ESS" in found:
        size = (
            f"{number_text(found['ESS'])} of {values['B_E']}"
            if "B_E" in values
            else number_text(found["ESS"])
        )
        rows.append(
            Row("ESS of E", (size,), "reweighted, E is worth this many responses; close to all is good")
        )
    if "pareto_k" in found:
        k, limit = found["pareto_k"], found.get("pareto_k_limit")
        fitted = "not fitted" if k is None or not math.isfinite(k) else f"{k:.2f}"
        below = "" if limit is None else f" (limit {limit:.2f})"
        rows.append(Row("Pareto k", (fitted + below,), "tail of the weights; below the limit is good"))
    if "w_min" in found and "w_max" in found:
        weights = f"{number_text(found['w_min'])} to {number_text(found['w_max'])}"
        rows.append(Row("weights", (weights,), "smallest and largest importance weight; close to 1 is good"))
    if found.get("clipped_fraction") is not None:
        clipped = percent(found["clipped_fraction"])
        rows.append(Row("clipped", (clipped,), "weights clipped in the row snis_clipped; in no other"))
    return rows


def _arithmetic_rows(values: Mapping[str, Any]) -> list[Row]:
    """Rounding, derivatives and error bars."""
    found, rows = values.get("diagnostics", {}), []
    floors = [("_tok", "nats per token"), ("", "nats per response")]
    floor = [
        f"{number_text(found[f'noise_floor{s}'])} {unit}" for s, unit in floors if f"noise_floor{s}" in found
    ]
    if floor:
        rows.append(
            Row("noise floor", ("\n".join(floor),), "rounding: a smaller deltaH_true is not resolved")
        )
    if "derivative_mode" in found:
        reason = found.get("derivative_reason") or "how deltaH1 was differentiated"
        rows.append(Row("derivative", (plain_words(found["derivative_mode"]),), reason))
    if found.get("derivative_agreement") is not None:
        off = f"{found['derivative_agreement']:.1e}"
        rows.append(
            Row("  agreement", (off,), "relative difference of deltaH1 by two methods; close to 0 is good")
        )
    if found.get("step_difference") is not None:
        off = f"{found['step_difference']:.1e}"
        rows.append(
            Row("  forwards", (off,), "relative difference from differences of forwards along the step")
        )
    if found.get("difference_error") is not None:
        off = f"{found['difference_error']:.1e}"
        rows.append(Row("  differences", (off,), "estimated relative error of the finite differences"))
    if "second_order_mode" in found:
        rows.append(
            Row("second order", (plain_words(found["second_order_mode"]),), "how deltaH2 was differentiated")
        )
    if found.get("is_mode") is not None:
        rows.append(Row("measured by", (found["is_mode"],), ESTIMATORS.get(found["is_mode"], "")))
    if found.get("se_method") is not None:
        rows.append(
            Row("error bars", (found["se_method"],), "how standard errors were computed, prompt by prompt")
        )
    if found.get("control_variates"):
        state, _, why = found["control_variates"].partition(":")
        rows.append(Row("controls", (state.strip(),), why.strip() or "control variates"))
    return rows


def _batch_rows(values: Mapping[str, Any]) -> list[Row]:
    """What E and U are made of."""
    found, rows = values.get("diagnostics", {}), []
    if found.get("truncated_fraction") is not None:
        cut = percent(found["truncated_fraction"])
        rows.append(Row("truncated", (cut,), "responses that the token limit cut off"))
    if found.get("distinct_responses") is not None:
        distinct = str(found["distinct_responses"])
        distinct += f" of {values['B_E']}" if "B_E" in values else ""
        rows.append(Row("distinct", (distinct,), "responses of E that differ from each other"))
    if found.get("zero_advantage_groups") is not None:
        groups = str(found["zero_advantage_groups"])
        groups += f" of {values['B_U']}" if "B_U" in values else ""
        rows.append(Row("no signal", (groups,), "prompts of U with equal rewards throughout: no gradient"))
    if "bias_flags" in found:
        flags = ",\n".join(found["bias_flags"]) or "none"
        rows.append(Row("bias flags", (flags,), "known reasons why these numbers are biased"))
    return rows


def settings_rows(values: Mapping[str, Any]) -> list[Row]:
    """Which settings of the update come from the checkpoint, from the configuration, or from neither."""
    found: Mapping[str, Any] = values.get("settings") or {}
    rows = []
    for label in ("checkpoint", "configuration", "default"):
        keys: Mapping[str, Any] = found.get(label) or {}
        if keys:
            listed = ", ".join(f"{key.rsplit('.', 1)[-1]} {_setting(value)}" for key, value in keys.items())
            rows.append(Row(label, (str(len(keys)),), listed))
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
    meanings = {
        "make_demo": "demo policy trained (once; then it is reused)",
        "load": "policy and optimizer state read from the checkpoint",
        "sample": "responses drawn, rewarded and scored",
        "entropy_gradient": "gradient of the entropy on E",
        "update": "gradient of the loss on U, optimizer step",
        "prediction": "deltaH1",
        "ground_truth": "deltaH_true: E scored again after the step",
    }
    return [
        Row(name.replace("_", " "), (f"{timing[name]:.1f} s",), meanings.get(name, ""))
        for name in sorted(timing, key=lambda name: name == "total")
        if timing[name] is not None
    ]


def _level(values: Mapping[str, Any], key: str) -> str:
    """An entropy, with the digits that its change needs."""
    if key not in values:
        return "-"
    value = values[key]
    if value is None or not math.isfinite(value):
        return NOT_RESOLVED
    suffix = "_tok" if key.endswith("_tok") else ""
    error = values.get(f"deltaH_true{suffix}_se")
    decimals = 4 if error is None or not 0 < error < math.inf else 1 - math.floor(math.log10(error))
    return f"{value:.{min(max(decimals, 3), 8)}f}"


def _change(values: Mapping[str, Any], key: str) -> str:
    """A change of entropy with its standard error, and its 95 % interval below, where there are any."""
    if key not in values:
        return "-"
    value, error = values[key], values.get(f"{key}_se")
    shown = with_error(value, error)
    below = "" if shown == NOT_RESOLVED else interval_text(values.get(f"{key}_ci95"))
    return f"{shown}\n{below}" if below else shown


def _plain(values: Mapping[str, Any], key: str) -> str:
    """A number without an error of its own."""
    return f"{values[key]:.3g}" if finite(values.get(key)) else (NOT_RESOLVED if key in values else "-")


def _gain(ratio: float | None) -> str:
    """How many times less variance an estimator has."""
    return f"{ratio:.3g}" if ratio is not None and math.isfinite(ratio) else "?"


def _setting(value: Any) -> str:
    """The value of a setting."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
