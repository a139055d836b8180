"""The two estimands, a pair of values for them, and the names that these have in a mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T", covariant=True)
S = TypeVar("S")
O = TypeVar("O")


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
        value: T = getattr(self, estimand.name)  # what is no estimand has no name, and is refused
        return value

    def __iter__(self) -> Iterator[T]:
        """The two values, that per response first."""
        return iter((self.sequence, self.token))

    def map(self, function: Callable[[T], S]) -> PerEstimand[S]:
        """A function of each of the two values."""
        return PerEstimand(function(self.sequence), function(self.token))

    def with_other(self, function: Callable[[T, O], S], other: PerEstimand[O]) -> PerEstimand[S]:
        """A function of each of the two values and that of another pair."""
        return PerEstimand(function(self.sequence, other.sequence), function(self.token, other.token))


@dataclass(frozen=True)
class Number:
    """A number of a result.

    Attributes:
        value: null where it was computed and could not be resolved.
        se: its standard error; None where it has none.
        ci95: the ends of its 95 % interval; None where it has none.
        sd_U: its standard deviation over update batches; None where it has none.
        df: degrees of freedom of its standard error, see `Estimate.df`; None where it has none.
        null_error: whether it has a standard error that is null, as one is in a file that was not finite.
    """

    value: float | None
    se: float | None = None
    ci95: tuple[float, float] | None = None
    sd_U: float | None = None
    df: float | None = None
    null_error: bool = False


PARTS = tuple(field.name for field in fields(Number) if field.name not in ("value", "null_error"))
"""What comes with a value, in a mapping under its key with this ending."""
Numbers = PerEstimand[Number | None]
"""A number for each estimand; None where the result does not have it."""


def as_mapping(quantities: Mapping[str, Numbers]) -> dict[str, Any]:
    """Quantities under their keys, those per response first.

    >>> as_mapping({"deltaH1": PerEstimand(Number(-0.1, 0.02), Number(-0.001))})
    {'deltaH1': -0.1, 'deltaH1_se': 0.02, 'deltaH1_tok': -0.001}
    """
    values: dict[str, Any] = {}
    for estimand in (SEQUENCE, TOKEN):
        for name, numbers in quantities.items():
            number = numbers[estimand]
            if number is None:
                continue
            values[estimand.key(name)] = number.value
            for part in PARTS:
                found = getattr(number, part)
                if found is not None:
                    values[estimand.key(name, f"_{part}")] = (
                        list(found) if isinstance(found, tuple) else found
                    )
    return values


def from_mapping(values: Mapping[str, Any], name: str) -> Numbers:
    """A quantity as `as_mapping` wrote it, a training or an older version; what is not there is None."""

    def read(estimand: Estimand) -> Number | None:
        key = estimand.key(name)
        if key not in values:
            return None
        parts = {part: values.get(estimand.key(name, f"_{part}")) for part in PARTS}
        found: dict[str, Any] = {
            part: tuple(one) if isinstance(one, (list, tuple)) else one for part, one in parts.items()
        }
        error = estimand.key(name, "_se")
        return Number(values[key], **found, null_error=error in values and values[error] is None)

    return PerEstimand(read(SEQUENCE), read(TOKEN))
