"""What there is to know of a quantity: one entry of the table of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.estimand import SEQUENCE, TOKEN, Estimand

Form = Literal[
    "level", "change", "plain",
    "number", "count", "share", "difference", "words", "name",
    "pareto", "weights", "floor", "derivative", "estimator", "switch", "flags",
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
    """

    ending: str
    words: str
    core: bool = False
    row: Shown | None = None


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
        logged: endings of the names under which a training logs it.
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
    logged: tuple[str, ...] = ("_tok",)

    @property
    def estimands(self) -> tuple[Estimand, ...]:
        """Those that it has a key for."""
        return (SEQUENCE, TOKEN) if self.per_token else (SEQUENCE,)

    def described(self) -> dict[str, str]:
        """Its keys per response, with what they are."""
        return {self.key: self.words} | {self.key + part.ending: part.words for part in self.parts}
