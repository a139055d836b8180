"""What there is to know of a quantity: one entry of the table of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from probe.estimand import SEQUENCE, TOKEN, Estimand

LOW_HIGH = ("low", "high")
"""What names of the ends of an interval end in."""
Form = Literal[
    "level", "change", "plain",
    "number", "count", "share", "difference", "words", "name",
    "pareto", "weights", "floor", "derivative", "estimator", "switch", "flags", "passes",
]  # fmt: skip
"""How a report shows a quantity, see `probe.report.rows`: a value per estimand; one value; one that says more."""


@dataclass(frozen=True)
class Shown:
    """A row of the report.

    Attributes:
        label: what the row is about.
        form: how the value is shown.
        meaning: the same in plain words.
        of: the key of what the value is a part of; empty where it is of nothing.
        without_error: the meaning where the value has no error; empty where it is the same.
    """

    label: str
    form: Form
    meaning: str
    of: str = ""
    without_error: str = ""


@dataclass(frozen=True)
class Part:
    """An error or interval of a quantity, under the quantity's key with an ending.

    Attributes:
        ending: of the key.
        words: what it is, with its unit.
        core: whether the quick overview of a run has it.
        row: of the report; None where the quantity's own row shows it.
        interval: whether it is the two ends of an interval, which are numbers of their own where all is flat.
        logged: for which estimands a training logs it.
    """

    ending: str
    words: str
    core: bool = False
    row: Shown | None = None
    interval: bool = False
    logged: tuple[Estimand, ...] = ()

    def flat(self, key: str, value: Any, ends: tuple[str, str] = LOW_HIGH) -> dict[str, Any]:
        """It as plain numbers by their names; an interval by its two ends, both null where it is.

        >>> Part("_ci95", "", interval=True).flat("deltaH1_tok_ci95", [-0.2, -0.1])
        {'deltaH1_tok_ci95_low': -0.2, 'deltaH1_tok_ci95_high': -0.1}
        """
        if not self.interval:
            return {key: value}
        found = (None, None) if value is None else value
        return {f"{key}_{end}": one for end, one in zip(ends, found, strict=True)}


@dataclass(frozen=True)
class Quantity:
    """One quantity of a result.

    Attributes:
        key: in the result mapping, or in a mapping inside of it.
        words: what it is, with its unit.
        per_token: whether it exists per token too, under the key with `_tok`, nats per token then.
        parts: its errors and intervals.
        group: of the charts in loggers.
        headline: whether its value stands with the results themselves there, whatever its parts do.
        metric: its place among the columns of the HPARAMS tab; None where it is none.
        core: whether the log's level `minimal` and the summary have it.
        integer: whether the columns of a sweep hold it as an integer.
        row: of the report; None where it has none.
        live: what it is in a training; empty where a training does not have it.
        logged: for which estimands a training logs its value.
    """

    key: str
    words: str
    per_token: bool = False
    parts: tuple[Part, ...] = ()
    group: str = "prediction"
    headline: bool = False
    metric: int | None = None
    core: bool = False
    integer: bool = False
    row: Shown | None = None
    live: str = ""
    logged: tuple[Estimand, ...] = (TOKEN,)

    @property
    def estimands(self) -> tuple[Estimand, ...]:
        """Those that it has a key for."""
        return (SEQUENCE, TOKEN) if self.per_token else (SEQUENCE,)

    def described(self) -> dict[str, str]:
        """Its keys per response, with what they are."""
        return {self.key: self.words} | {self.key + part.ending: part.words for part in self.parts}

    def band(self, estimand: Estimand) -> list[str]:
        """Names of its value and of the ends of its interval, for a chart; of the value alone where it has none."""
        intervals = (part for part in self.parts if part.interval)
        ends = [end for part in intervals for end in part.flat(estimand.key(self.key, part.ending), None)]
        return [estimand.key(self.key), *ends]

    def keyed_parts(self) -> dict[str, Part]:
        """Its parts by their keys, of all its estimands."""
        return {
            estimand.key(self.key, part.ending): part for estimand in self.estimands for part in self.parts
        }
