"""The report of a run as a table on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.callbacks.base import ProbeCallback
from probe.errors import LogError

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.results import ProbeResult
    from probe.runner import ProbeRunner

NOT_RESOLVED = "not resolved"
"""What stands in the place of a value that is null in the result."""


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        label: what the line is about.
        cells: the values: `(per token, per response)`, or one value for both.
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
        _aligned(entropy_rows(values), ("", "nats per token", "nats per response", "")),
        _aligned(trust_rows(values), ("Can this be trusted?", "", "", "")),
        _aligned(time_rows(values), ("Time", "", "", "")),
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
    """The entropies and their changes, as far as they were computed."""
    lines = (
        ("H before", "H_orig", "entropy of the policy as it is"),
        ("H after", "H_upd", "entropy after the update, on the same responses, reweighted"),
        ("deltaH1", "deltaH1", "change predicted: entropy gradient times optimizer step"),
        ("deltaH_true", "deltaH_true", "change measured: H after minus H before"),
        ("difference", "residual", "predicted minus measured"),
    )
    rows = []
    for label, key, meaning in lines:
        keys = (f"{key}_tok", key)
        if any(name in values for name in keys):
            show = _level if key.startswith("H_") else _change
            cells = tuple(show(values, name) for name in keys)
            rows.append(Row(label, cells, meaning))
    return rows


def trust_rows(values: Mapping[str, Any]) -> list[Row]:
    """What says whether the measurement is any good."""
    found = values.get("diagnostics", {})
    rows = []
    if "ESS" in found:
        size = f"{_number(found['ESS'])} of {values['B_E']}" if "B_E" in values else _number(found["ESS"])
        rows.append(
            Row("ESS of E", (size,), "reweighted, E is worth this many responses; close to all is good")
        )
    if "w_min" in found and "w_max" in found:
        weights = f"{_number(found['w_min'])} to {_number(found['w_max'])}"
        rows.append(Row("weights", (weights,), "smallest and largest importance weight; close to 1 is good"))
    if found.get("truncated_fraction") is not None:
        cut = f"{100 * found['truncated_fraction']:.3g} %"
        rows.append(Row("truncated", (cut,), "responses that the token limit cut off"))
    if found.get("zero_advantage_groups") is not None:
        groups = str(found["zero_advantage_groups"])
        groups += f" of {values['B_U']}" if "B_U" in values else ""
        rows.append(Row("no signal", (groups,), "prompts of U with equal rewards throughout: no gradient"))
    if "bias_flags" in found:
        flags = ", ".join(found["bias_flags"]) or "none"
        rows.append(Row("bias flags", (flags,), "known reasons why these numbers are biased"))
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
    size = math.floor(math.log10(max(abs(value), error)))
    decimals = 1 - math.floor(math.log10(error))
    if size >= -4 and decimals <= 8:
        return f"{_fixed(value, decimals)} +/- {_fixed(error, decimals)}"
    scale, decimals = 10.0**-size, min(decimals + size, 8)
    return f"({_fixed(value * scale, decimals)} +/- {_fixed(error * scale, decimals)})e{size:+03d}"


def say(runner: ProbeRunner, text: str) -> None:
    """Print to stdout; a closed pipe (`| head`) becomes an error of the runner's, so that publishing goes on.

    What stdout cannot show (control characters, text beyond its encoding) is shown as escapes.
    """
    escapes = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print("".join(escapes).encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except OSError as error:
        runner.errors.append(LogError(f"cannot print to stdout: {error}; the log files have the results"))


def _verdict(values: Mapping[str, Any]) -> list[str]:
    """The verdict and its reasons, if there is one."""
    reasons = [f"  - {reason}" for reason in values.get("verdict_reasons") or ()]
    return [f"Verdict: {values['verdict']}", *reasons] if values.get("verdict") is not None else reasons


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
    """A change of entropy, with its standard error where there is one."""
    return with_error(values[key], values.get(f"{key}_se")) if key in values else "-"


def _fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals; never `-0.00`."""
    decimals = max(decimals, 0)
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _number(value: float | None) -> str:
    """A number with four significant digits."""
    return NOT_RESOLVED if value is None or not math.isfinite(value) else f"{value:.4g}"


def _aligned(rows: Sequence[Row], heads: tuple[str, str, str, str]) -> list[str]:
    """Rows as lines with columns of equal width under their heads; nothing for no rows."""
    if not rows:
        return []
    columns = max(len(row.cells) for row in rows)
    label = max(12, len(heads[0]) - 2, *(len(row.label) for row in rows))
    widths = [
        max(len(heads[1 + k]), *(len(row.cells[k]) if k < len(row.cells) else 0 for row in rows))
        for k in range(columns)
    ]
    head = heads[0].ljust(label + 4) + "  ".join(heads[1 + k].ljust(widths[k]) for k in range(columns))
    lines = [head.rstrip()]
    for row in rows:
        cells = [*row.cells, *[""] * (columns - len(row.cells))]
        numbers = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {row.label.ljust(label)}  {numbers}  {row.meaning}".rstrip())
    return lines
