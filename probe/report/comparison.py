"""Two runs beside each other: what a comparison found, and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from probe.digits import interval_text, with_error
from probe.estimand import ESTIMANDS, Estimand, Number
from probe.text import printable

COMPARISON_SCHEMA = "entropy-probe/comparison"
WIDTH = 80
"""Columns of the page; a number that needs more has it."""
LABELS = {
    "H_orig": "H before",
    "H_upd": "H after",
    "deltaH1": "deltaH1",
    "deltaH_true": "deltaH_true",
}
"""The quantities that are compared, in this order, with their labels."""
How = Literal["paired", "by prompt", "unpaired"]


@dataclass(frozen=True)
class ComparedRun:
    """One of the two runs.

    Attributes:
        name: of its checkpoint.
        path: of its log; None where the log was given as it is.
        checkpoint_path: of what was probed; None where it is not known.
        started_at: local date and time, ISO 8601.
        learning_rate: of the update; None where there was none.
        B_E: responses of E.
        B_U: prompts of U; None where it is not known.
        G: responses per prompt of U; None where they differ.
        verdict: of the run.
        bias_flags: why its results are biased.
    """

    name: str
    path: str | None
    checkpoint_path: str | None
    started_at: str
    learning_rate: float | None
    B_E: int
    B_U: int | None
    G: int | None
    verdict: str | None
    bias_flags: tuple[str, ...]

    @property
    def words(self) -> str:
        """The run in a line."""
        parts = [self.name]
        if self.learning_rate is not None:
            parts.append(f"learning rate {self.learning_rate:.6g}")
        if self.B_U is not None:
            parts.append(f"U = {self.B_U}" + ("" if self.G is None else f" x {self.G}"))
        return ", ".join([*parts, *([] if self.verdict is None else [self.verdict])])


@dataclass(frozen=True)
class ComparedRow:
    """One quantity in both runs.

    Attributes:
        quantity: its key per response, one of `LABELS`.
        estimand: per token or per response; all numbers are in its unit.
        a: in run A.
        b: in run B.
        difference: `B - A`; None where there is none, and `note` says why. Its error is paired or not as the
            comparison says.
        unpaired_se: the standard error of the difference, were the two independent; None where it is not known.
        note: what to know about the row; empty for nothing.
    """

    quantity: str
    estimand: Estimand
    a: Number
    b: Number
    difference: Number | None
    unpaired_se: float | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """The key of the quantity in results, `deltaH1_tok` for example."""
        return self.estimand.key(self.quantity)

    @property
    def label(self) -> str:
        """The quantity as reports call it."""
        return LABELS[self.quantity]

    @property
    def gain(self) -> float | None:
        """How many times smaller the paired standard error is; None where that is not known."""
        paired = None if self.difference is None else self.difference.se
        if not paired or self.unpaired_se is None:
            return None
        return self.unpaired_se / paired


@dataclass(frozen=True)
class Comparison:
    """What two runs differ by.

    Attributes:
        a: run A.
        b: run B.
        how: `paired` on one E; `by prompt`, of responses of their own to the same prompts; or `unpaired`, of two
            samples, with independent errors.
        same_policy: whether both updates start from one policy; None where that is not known (`unpaired`).
        responses: of E; None where there are two E.
        prompts: of E, the independent units of the errors; None where those of the runs differ.
        rows: every quantity, those per token first.
        notes: what to know about all of them.
    """

    a: ComparedRun
    b: ComparedRun
    how: How
    same_policy: bool | None
    responses: int | None
    prompts: int | None
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...]

    def row(self, key: str) -> ComparedRow:
        """The row of a key, `deltaH1_tok` for example.

        Raises:
            KeyError: there is none.
        """
        found = {row.key: row for row in self.rows}
        if key not in found:
            raise KeyError(f"expected one of {', '.join(found)}, found {key!r}")
        return found[key]

    def as_mapping(self) -> dict[str, Any]:
        """The comparison as plain values, for a JSON file."""
        rows = [
            {
                "quantity": row.quantity,
                "estimand": row.estimand.name,
                **{f"A{end}": value for end, value in _plain(row.a).items()},
                **{f"B{end}": value for end, value in _plain(row.b).items()},
                **{f"difference{end}": value for end, value in _plain(row.difference).items()},
                "unpaired_se": row.unpaired_se,
                "note": row.note,
            }
            for row in self.rows
        ]
        return {
            "schema": COMPARISON_SCHEMA,
            "schema_version": 1,
            "how": self.how,
            "same_policy": self.same_policy,
            "responses": self.responses,
            "prompts": self.prompts,
            "A": asdict(self.a),
            "B": asdict(self.b),
            "rows": rows,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """The comparison as a page for a terminal."""
        parts = [_heading(self), *(_table(self, estimand) for estimand in ESTIMANDS), _notes(self)]
        return printable("\n\n".join("\n".join(lines) for lines in parts if lines) + "\n")

    def _repr_html_(self) -> str:
        """The same page in a notebook."""
        return f"<pre>{escape(str(self))}</pre>"


def _plain(number: Number | None) -> dict[str, Any]:
    """A number's parts by the endings of their keys."""
    if number is None:
        return {"": None, "_se": None, "_ci95": None, "_df": None}
    interval = None if number.ci95 is None else list(number.ci95)
    return {"": number.value, "_se": number.se, "_ci95": interval, "_df": number.df}


def _heading(found: Comparison) -> list[str]:
    """What is compared, and how."""
    if found.how == "paired":
        of = f"{found.responses} responses to {found.prompts} prompts"
        first = f"B - A in nats, on one E: {of}; 95 % intervals, paired errors"
    elif found.how == "by prompt":
        first = f"B - A in nats, on the same {found.prompts} prompts: 95 % intervals, errors paired by prompt"
    else:
        first = "B - A in nats, of two different E: 95 % intervals, errors taken as independent"
    lines = [*textwrap.wrap(first, WIDTH), ""]
    for name, run in (("A", found.a), ("B", found.b)):
        lines += textwrap.wrap(run.words, WIDTH, initial_indent=f"  {name}  ", subsequent_indent="     ")
        lines += [] if run.path is None else [f"     {run.path}"]
    return lines


def _table(found: Comparison, estimand: Estimand) -> list[str]:
    """The rows of an estimand: the numbers, and below them the interval and what independent errors would be."""
    rows = [row for row in found.rows if row.estimand == estimand]
    if not rows:
        return []
    heads = (estimand.per, "A", "B", "B - A")
    below = [
        (row.note or _gain(row), "" if row.difference is None else interval_text(row.difference.ci95))
        for row in rows
    ]
    for shown in (
        _with_error,
        _alone,
    ):  # where there is no room for the errors of A and B, their logs have them
        cells = [(row.label, shown(row.a), shown(row.b), _difference(row.difference)) for row in rows]
        widths = [max(len(line[k]) for line in (heads, *cells)) for k in range(4)]
        beside = max(len(text) for text, interval in [("", ""), *below] if interval or not text)
        widths[2] = max(widths[2], beside - widths[1] - 2)
        if sum(widths) + 2 * len(widths) <= WIDTH:
            break
    lines = [_line(heads, widths)]
    for line, (text, interval) in zip(cells, below, strict=True):
        lines.append(_line(line, widths))
        if text or interval:
            lines.append(_line(("", text, interval), (widths[0], widths[1] + 2 + widths[2])))
    return lines


def _with_error(number: Number) -> str:
    """A value of one run with its error."""
    return with_error(number.value, number.se)


def _alone(number: Number) -> str:
    """The same without its error, with the digits that this makes meaningful.

    >>> _alone(Number(-0.0001617, 5.6e-05)), _alone(Number(-1.6e-06, 5.6e-07)), _alone(Number(None))
    ('-0.000162', '-1.60e-06', 'not resolved')
    """
    value, sign, rest = with_error(number.value, number.se).partition(" +/- ")
    return value.lstrip("(") + rest.partition(")")[2] if sign else value


def _difference(number: Number | None) -> str:
    """The difference with its error."""
    return "-" if number is None else with_error(number.value, number.se)


def _gain(row: ComparedRow) -> str:
    """What independent errors would be."""
    if row.gain is None or row.unpaired_se is None:
        return ""
    times = f"{row.gain:.0f}" if row.gain >= 10 else f"{row.gain:.1f}"
    return f"unpaired: +/- {row.unpaired_se:.2g}, {times} times that"


def _line(cells: Sequence[str], widths: Sequence[int] = ()) -> str:
    """Cells in columns."""
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  " + "  ".join([*padded, *cells[len(padded) :]]).rstrip()


def _notes(found: Comparison) -> list[str]:
    """What to know."""
    return [
        line
        for note in found.notes
        for line in textwrap.wrap(
            note, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
        )
    ]
