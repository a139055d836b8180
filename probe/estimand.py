"""The two estimands, a pair of values for them, and the names that these have in a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T", covariant=True)
S = TypeVar("S")


@dataclass(frozen=True)
class Estimand:
    """One of the two entropies whose change is estimated.

    Attributes:
        name: `token` or `sequence`.
        suffix: ending of its keys and columns.
        unit: its unit.
    """

    name: str
    suffix: str
    unit: str

    @property
    def per(self) -> str:
        """`per token` or `per response`."""
        return self.unit.removeprefix("nats ")

    def key(self, name: str, part: str = "") -> str:
        """The key of a quantity, or of a part of it (`_se`).

        >>> TOKEN.key("deltaH1"), TOKEN.key("deltaH1", "_se"), SEQUENCE.key("deltaH1")
        ('deltaH1_tok', 'deltaH1_tok_se', 'deltaH1')
        """
        return f"{name}{self.suffix}{part}"


TOKEN = Estimand("token", "_tok", "nats per token")
SEQUENCE = Estimand("sequence", "", "nats per response")
ESTIMANDS = (TOKEN, SEQUENCE)
"""The headline one first."""


@dataclass(frozen=True)
class PerEstimand(Generic[T]):
    """A value for each estimand.

    Attributes:
        sequence: in nats per response.
        token: in nats per token.
    """

    sequence: T
    token: T

    @classmethod
    def of(cls, both: Sequence[T]) -> PerEstimand[T]:
        """Args: `both`, `(sequence, token)`."""
        sequence, token = both
        return cls(sequence, token)

    def __getitem__(self, estimand: Estimand) -> T:
        """The value of an estimand."""
        return self.token if estimand is TOKEN else self.sequence

    def map(self, function: Callable[[T], S]) -> PerEstimand[S]:
        """A function of each of the two values."""
        return PerEstimand(function(self.sequence), function(self.token))


@dataclass(frozen=True)
class Number:
    """A number of a result.

    Attributes:
        value: null where it was computed and could not be resolved.
        se: its standard error; None where it has none.
        ci95: the ends of its 95 % interval; None where it has none.
        null_error: whether it has an error that is null, as one is in a file that was not finite.
    """

    value: float | None
    se: float | None = None
    ci95: tuple[float, float] | None = None
    null_error: bool = False


Numbers = PerEstimand[Number | None]
"""A number for each estimand; None where the result does not have it."""


def as_mapping(name: str, numbers: Numbers) -> dict[str, Any]:
    """A quantity under its keys, response before token.

    >>> as_mapping("deltaH1", PerEstimand(Number(-0.1, 0.02), None))
    {'deltaH1': -0.1, 'deltaH1_se': 0.02}
    """
    values: dict[str, Any] = {}
    for estimand in (SEQUENCE, TOKEN):
        number = numbers[estimand]
        if number is None:
            continue
        values[estimand.key(name)] = number.value
        if number.se is not None or number.null_error:
            values[estimand.key(name, "_se")] = number.se
        if number.ci95 is not None:
            values[estimand.key(name, "_ci95")] = list(number.ci95)
    return values


def from_mapping(values: Mapping[str, Any], name: str) -> Numbers:
    """The inverse of `as_mapping`; what is not in the mapping is None."""

    def read(estimand: Estimand) -> Number | None:
        key, error = estimand.key(name), estimand.key(name, "_se")
        if key not in values:
            return None
        ends = values.get(estimand.key(name, "_ci95"))
        se = values.get(error)
        return Number(values[key], se, None if ends is None else tuple(ends), error in values and se is None)

    return PerEstimand(read(SEQUENCE), read(TOKEN))
