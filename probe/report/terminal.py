"""The report of a run as a table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.report.attribution import attribution_tables
from probe.report.rows import (
    ERRORS,
    Row,
    entropy_rows,
    estimator_rows,
    headline,
    settings_rows,
    time_rows,
    trust_rows,
)

if TYPE_CHECKING:
    from probe.results.result import ProbeResult

WIDTH = 120
"""Columns of the report; plain words are wrapped to stay within it, numbers are not."""


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
        *(_aligned(table.rows, table.heads) for table in attribution_tables(values)),
        _aligned(settings_rows(values), ("Settings of the update",)),
        _aligned(time_rows(values), ("Time",)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _verdict(values: Mapping[str, Any]) -> list[str]:
    """The verdict and its reasons, if there is one."""
    lines = [f"Verdict: {values['verdict']}"] if values.get("verdict") is not None else []
    for reason in values.get("verdict_reasons") or ():
        lines += textwrap.wrap(
            reason, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


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
