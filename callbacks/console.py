"""The report of a run as a table on the terminal."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.callbacks.base import ProbeCallback
from probe.errors import LogError
from probe.text import printable

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results import ProbeResult
    from probe.runner import ProbeRunner

NOT_RESOLVED = "not resolved"
"""What stands in the place of a value that is null in the result."""
WIDTH = 120
"""Columns of the report; plain words are wrapped to stay within it, numbers are not."""

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


class ConsoleReport(ProbeCallback):
    """Prints the report of a run to stdout."""

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Print the report."""
        if runner.fabric.is_global_zero:
            say(runner, report(result))


def report(result: ProbeResult) -> str:
    """The report of a run as plain text: verdict, entropies, whether to trust them, where the time went."""
    values = result.values
    parts = [
        [headline(result)],
        _verdict(values),
        _aligned(entropy_rows(values), ("", "nats per token", "nats per response", ERRORS)),
        _aligned(
            estimator_rows(values), ("Estimators", "nats per token", "nats per response", "variance ratio")
        ),
        _aligned(trust_rows(values), ("Can this be trusted?",)),
        _aligned(settings_rows(values), ("Settings of the update",)),
        _aligned(time_rows(values), ("Time",)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


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
        size = f"{_number(found['ESS'])} of {values['B_E']}" if "B_E" in values else _number(found["ESS"])
        rows.append(
            Row("ESS of E", (size,), "reweighted, E is worth this many responses; close to all is good")
        )
    if "pareto_k" in found:
        k, limit = found["pareto_k"], found.get("pareto_k_limit")
        fitted = "not fitted" if k is None or not math.isfinite(k) else f"{k:.2f}"
        below = "" if limit is None else f" (limit {limit:.2f})"
        rows.append(Row("Pareto k", (fitted + below,), "tail of the weights; below the limit is good"))
    if "w_min" in found and "w_max" in found:
        weights = f"{_number(found['w_min'])} to {_number(found['w_max'])}"
        rows.append(Row("weights", (weights,), "smallest and largest importance weight; close to 1 is good"))
    if found.get("clipped_fraction") is not None:
        clipped = _percent(found["clipped_fraction"])
        rows.append(Row("clipped", (clipped,), "weights clipped in the row snis_clipped; in no other"))
    return rows


def _arithmetic_rows(values: Mapping[str, Any]) -> list[Row]:
    """Rounding, derivatives and error bars."""
    found, rows = values.get("diagnostics", {}), []
    floors = [("_tok", "nats per token"), ("", "nats per response")]
    floor = [
        f"{_number(found[f'noise_floor{s}'])} {unit}" for s, unit in floors if f"noise_floor{s}" in found
    ]
    if floor:
        rows.append(
            Row("noise floor", ("\n".join(floor),), "rounding: a smaller deltaH_true is not resolved")
        )
    if "derivative_mode" in found:
        reason = found.get("derivative_reason") or "how deltaH1 was differentiated"
        rows.append(Row("derivative", (_words(found["derivative_mode"]),), reason))
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
            Row("second order", (_words(found["second_order_mode"]),), "how deltaH2 was differentiated")
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
        cut = _percent(found["truncated_fraction"])
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


def with_error(value: float | None, error: float | None) -> str:
    """`value +/- error` with as many digits as the error (two of its own) makes meaningful.

    Without an error, four significant digits; small numbers get a common power of ten.

    >>> with_error(-0.00112345, 0.00031), with_error(-1.12345e-7, 3.1e-8), with_error(0.25, None)
    ('-0.00112 +/- 0.00031', '(-1.12 +/- 0.31)e-07', '0.25')
    """
    if value is None or not math.isfinite(value):
        return NOT_RESOLVED
    if error is None or not math.isfinite(error) or error <= 0:
        return _number(value)
    scale, decimals, power = _digits(max(abs(value), error), error)
    shown = f"{_fixed(value * scale, decimals)} +/- {_fixed(error * scale, decimals)}"
    return f"({shown}){power}" if power else shown


def interval_text(interval: Sequence[float | None] | None) -> str:
    """`[low, high]` with two digits of a standard error (its width over four), or nothing for none.

    >>> interval_text([-0.00173, -0.00051]), interval_text([-1.73e-7, 5.1e-8]), interval_text(None)
    ('[-0.00173, -0.00051]', '[-1.73, 0.51]e-07', '')
    """
    ends = [end for end in interval or () if end is not None and math.isfinite(end)]
    if len(ends) != 2:
        return ""
    error = abs(ends[1] - ends[0]) / 4
    if error == 0:
        return f"[{_number(ends[0])}, {_number(ends[1])}]"
    scale, decimals, power = _digits(max(abs(ends[0]), abs(ends[1])), error)
    return f"[{_fixed(ends[0] * scale, decimals)}, {_fixed(ends[1] * scale, decimals)}]{power}"


def _digits(largest: float, error: float) -> tuple[float, int, str]:
    """How to show numbers up to `largest` known to `error`: a scale, decimals, and the power of ten taken out."""
    size = math.floor(math.log10(largest))
    decimals = 1 - math.floor(math.log10(error))
    if size >= -4 and decimals <= 8:
        return 1.0, decimals, ""
    return 10.0**-size, min(decimals + size, 8), f"e{size:+03d}"


def say(runner: ProbeRunner, text: str) -> None:
    """Print to stdout; a closed pipe (`| head`) becomes an error of the runner's, so that publishing goes on.

    What stdout cannot show (control characters, text beyond its encoding) is shown as escapes.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except (OSError, ValueError) as error:  # a full disk, a closed pipe; a stdout that a reward has closed
        runner.errors.append(LogError(f"cannot print to stdout: {error}; the log files have the results"))


def _verdict(values: Mapping[str, Any]) -> list[str]:
    """The verdict and its reasons, if there is one."""
    lines = [f"Verdict: {values['verdict']}"] if values.get("verdict") is not None else []
    for reason in values.get("verdict_reasons") or ():
        lines += textwrap.wrap(
            reason, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


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
    return f"{values[key]:.3g}" if _finite(values.get(key)) else (NOT_RESOLVED if key in values else "-")


def _gain(ratio: float | None) -> str:
    """How many times less variance an estimator has."""
    return f"{ratio:.3g}" if ratio is not None and math.isfinite(ratio) else "?"


def _finite(value: float | None) -> bool:
    """Whether there is a value, and it is finite."""
    return value is not None and math.isfinite(value)


def _percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.3g} %"


def _setting(value: Any) -> str:
    """The value of a setting."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _words(name: str | None) -> str:
    """A name from the result as words."""
    return "none" if name is None else name.replace("_", " ")


def _fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals; never `-0.00`."""
    decimals = max(decimals, 0)
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _number(value: float | None) -> str:
    """A number with four significant digits."""
    return NOT_RESOLVED if value is None or not math.isfinite(value) else f"{value:.4g}"


def _aligned(rows: Sequence[Row], heads: Sequence[str]) -> list[str]:
    """Rows as lines with columns of equal width; nothing for no rows.

    The heads are those of the labels, of the cells, and of the meanings, as far as they are given.
    """
    if not rows:
        return []
    count = max(len(row.cells) for row in rows)
    heads = [*heads, *[""] * (2 + count - len(heads))]
    table = [[cell.split("\n") for cell in row.cells] + [[""]] * (count - len(row.cells)) for row in rows]
    label = max(12, len(heads[0]) - 2, *(len(row.label) for row in rows))
    widths = [
        max(len(heads[1 + k]), *(len(line) for cells in table for line in cells[k])) for k in range(count)
    ]
    margin = label + 4 + sum(widths) + 2 * count
    titles = map(str.ljust, heads[1 : 2 + count], [*widths, 0])
    lines = [(heads[0].ljust(label + 4) + "  ".join(titles)).rstrip()]
    for row, cells in zip(rows, table, strict=True):
        meaning = textwrap.wrap(row.meaning, max(WIDTH - margin, 30), break_on_hyphens=False)
        for k in range(max(1, len(meaning), *(len(cell) for cell in cells))):
            numbers = "  ".join(
                (cells[c][k] if k < len(cells[c]) else "").ljust(widths[c]) for c in range(count)
            )
            words = meaning[k] if k < len(meaning) else ""
            lines.append(f"  {(row.label if k == 0 else '').ljust(label)}  {numbers}  {words}".rstrip())
    return lines
