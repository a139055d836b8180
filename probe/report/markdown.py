"""The report of a run as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.report.attribution import attribution_tables
from probe.report.rows import ERRORS, Row, entropy_rows, estimator_rows, headline, time_rows, trust_rows

if TYPE_CHECKING:
    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult

PREFORMATTED, LEAST_WORDS = 44, 30
"""Characters up to which a line of a cell is kept in one piece, and that a column of words has room for at least."""


def report_markdown(result: ProbeResult) -> str:
    """The report as Markdown tables."""
    values = result.values
    parts = [
        f"**{escaped(headline(result))}**",
        verdict_markdown(values),
        f"Changes: {escaped(ERRORS)}",
        _table(("", "nats per token", "nats per response", ""), entropy_rows(values)),
        _table(
            ("Estimators", "nats per token", "nats per response", "variance ratio", ""),
            estimator_rows(values),
        ),
        _table(("Can this be trusted?", "", ""), trust_rows(values)),
        *(_table((*table.heads, ""), table.rows) for table in attribution_tables(values)),
        _table(("Time", "", ""), time_rows(values)),
    ]
    return "\n\n".join(part for part in parts if part)


def verdict_markdown(values: Mapping[str, Any]) -> str:
    """The verdict and its reasons as Markdown; nothing where there is none."""
    if values.get("verdict") is None:
        return ""
    reasons = [f"- {escaped(reason)}" for reason in values.get("verdict_reasons") or ()]
    return "\n".join([f"Verdict: **{escaped(values['verdict'])}**", "", *reasons])


def examples_markdown(state: ProbeState, count: int) -> str:
    """The first `count` responses of E with what was found for them, as Markdown."""
    if state.E is None:
        return ""
    parts = []
    for i in range(min(count, len(state.E))):
        found = [f"{int(state.E.lengths[i])} tokens"]
        if state.E_scores is not None:
            found.append(f"entropy {float(state.E_scores.sequence_entropy[i]):.4g} nats")
        if state.ground_truth is not None:
            found.append(f"importance weight {float(state.ground_truth.weights.weights[i]):.4g}")
        cells = f"| {escaped(state.E.prompts[i])} | {escaped(state.E.completions[i])} |"
        parts.append(f"**Response {i} of E**: {', '.join(found)}")
        parts.append(f"| prompt | response |\n| --- | --- |\n{cells}")
    return "\n\n".join(parts)


def escaped(text: str, limit: int = 2000) -> str:
    """`text` so that Markdown and HTML show it as it is, in a cell of a table; at most `limit` characters.

    >>> escaped("<b>*a*|b")
    '&#60;b&#62;&#42;a&#42;&#124;b'
    """
    rest = len(text) - limit
    shown = text[:limit].strip() + (f" ... ({rest} more characters)" if rest > 0 else "")
    # Markdown uses some control characters as marks of its own.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)
    # Numeric entities mean nothing to Markdown; only the browser puts in what they stand for.
    shown = re.sub(r"[\\`*_{}\[\]<>()#|~!&^$\"']|^[-+]", lambda match: f"&#{ord(match[0])};", shown)
    return re.sub(r"\s*\n\s*", "<br>", shown)


def unbroken(text: str) -> str:
    """`escaped`, in one piece: TensorBoard breaks lines within numbers, but not in what is preformatted.

    >>> unbroken("1.5 +/- 0.3")
    '<pre>1.5 &plusmn; 0.3</pre>'
    """
    shown = escaped(text).replace(" +/- ", " &plusmn; ")
    longest = max(map(len, text.splitlines()), default=0)
    return f"<pre>{shown}</pre>" if 0 < longest <= PREFORMATTED else shown


def _table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table; nothing for no rows."""
    if not rows:
        return ""
    *others, last = heads
    # a head that cannot be broken keeps a column of words from becoming one of letters where there is little room
    wide = f"<pre>{escaped(last) + '&nbsp;' * (LEAST_WORDS - len(last))}</pre>"
    lines = [[*map(escaped, others), wide if any(row.meaning for row in rows) else escaped(last)]]
    lines.append(["---"] * len(heads))
    lines += [[*map(unbroken, (row.label.strip(), *row.cells)), escaped(row.meaning)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
