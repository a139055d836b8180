"""What is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.config.numbers import is_finite
from probe.digits import interval_text
from probe.estimand import ESTIMANDS, Estimand, Number, Numbers, from_mapping
from probe.estimators.estimate import NORMAL_975
from probe.estimators.importance_weights import PARETO_K_LIMIT, pareto_k_limit

JUDGED = ("deltaH1", "deltaH_true", "residual", "deltaH2", "eta_10")
"""The quantities that are looked at."""


@dataclass(frozen=True)
class Change:
    """A value with its 95 % interval `low` to `high` and standard error; None where it is null or not in the result."""

    name: str
    estimand: Estimand
    value: float | None
    interval: tuple[float, float] | None
    se: float | None = None

    @property
    def key(self) -> str:
        """Its key in a result."""
        return self.estimand.key(self.name)

    @property
    def largest(self) -> float | None:
        """The larger end of the interval in size: what the change is at most; None without an interval."""
        return None if self.interval is None else max(abs(end) for end in self.interval)

    @property
    def contains_zero(self) -> bool:
        """Whether there is an interval, and 0 lies in it; its ends count as inside."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and 0 lies outside of it."""
        return self.interval is not None and not self.contains_zero

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def range(self) -> str:
        """`The 95 % interval of NAME, [LOW, HIGH] UNIT`, in the digits of the report."""
        return f"The 95 % interval of {self.name}, {interval_text(self.interval)} {self.estimand.unit}"


@dataclass(frozen=True)
class Facts:
    """The numbers of a result that are judged.

    Attributes:
        numbers: by quantity, those of `JUDGED` that the result has.
        diagnostics: how good its estimates are.
        size: sequences in E; None where it is not known.
        learning_rate: of the step; None where it is not known.
        keys: how many the result has.
    """

    numbers: Mapping[str, Numbers]
    diagnostics: Mapping[str, Any]
    size: float | None = None
    learning_rate: float | None = None
    keys: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Read a result mapping, that of an older version or of a training too."""
        numbers = {name: from_mapping(values, name) for name in JUDGED}
        diagnostics = values.get("diagnostics") or {}
        return cls(numbers, diagnostics, number(values, "B_E"), number(values, "learning_rate"), len(values))

    def __post_init__(self) -> None:
        """Refuse what has nothing to judge.

        Raises:
            ValueError: there is neither a prediction nor a measurement.
        """
        if not self.estimands:
            raise ValueError(
                "expected a result with deltaH1 or deltaH_true (or deltaH1_tok, deltaH_true_tok), found neither among "
                f"{self.keys} keys; switch on probe_rework.compute_delta_h1 or importance.enabled"
            )

    @property
    def quantity(self) -> str:
        """`deltaH_true` where it was measured, else `deltaH1`."""
        return "deltaH_true" if any(self.number("deltaH_true", e) for e in ESTIMANDS) else "deltaH1"

    @property
    def judged_quantities(self) -> tuple[str, ...]:
        """`quantity`, and the prediction beside it."""
        return tuple(dict.fromkeys((self.quantity, "deltaH1")))

    @property
    def draws(self) -> float | None:
        """Independent draws in E: its prompts, where they were counted, else its responses; None where not known."""
        return number(self.diagnostics, "prompts_E") or self.size

    @property
    def estimands(self) -> tuple[Estimand, ...]:
        """Those of `quantity`, the headline one first."""
        return tuple(estimand for estimand in ESTIMANDS if self.number(self.quantity, estimand))

    @property
    def flags(self) -> tuple[str, ...]:
        """The bias flags."""
        return tuple(self.diagnostics.get("bias_flags") or ())

    @property
    def reweighted(self) -> bool:
        """Whether the measurement stands on importance weights (`resample` draws a fresh E instead)."""
        return self.diagnostics.get("is_mode") != "resample"

    def number(self, name: str, estimand: Estimand) -> Number | None:
        """A number as the result has it."""
        return self.numbers[name][estimand] if name in self.numbers else None

    def change(self, name: str, estimand: Estimand) -> Change:
        """A number with its interval: the one it came with, else the normal one from its standard error."""
        given = self.number(name, estimand)
        if given is None:
            return Change(name, estimand, None, None)
        value = float(given.value) if given.value is not None and is_finite(given.value) else None
        ends: tuple[float, float] | None = None
        if given.ci95 is not None and len(given.ci95) == 2 and all(map(is_finite, given.ci95)):
            ends = (float(given.ci95[0]), float(given.ci95[1]))
        elif value is not None and given.se is not None and is_finite(given.se):
            ends = (value - NORMAL_975 * given.se, value + NORMAL_975 * given.se)
        se = given.se if given.se is not None and is_finite(given.se) else None
        return Change(name, estimand, value, ends, se)

    def primary(self, estimand: Estimand) -> Change:
        """The change that is judged."""
        return self.change(self.quantity, estimand)

    def noise_floor(self, estimand: Estimand) -> float | None:
        """The noise floor of the arithmetic, nats; None where it was not measured."""
        return number(self.diagnostics, estimand.key("noise_floor"))


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`; None where it is absent, null or not finite.

    >>> number({"ESS": 5}, "ESS"), number({"ESS": None}, "ESS"), number({}, "ESS")
    (5.0, None, None)
    """
    value = mapping.get(key)
    return float(value) if value is not None and is_finite(value) else None


def ess_share(facts: Facts) -> float | None:
    """ESS as a share of E."""
    ess, size = number(facts.diagnostics, "ESS"), facts.size
    return None if ess is None or not size else ess / size


def pareto_limit(facts: Facts) -> float:
    """The limit of Pareto k: the one in the result, else `min(1 - 1 / log10(B_E), 0.7)`."""
    limit, size = number(facts.diagnostics, "pareto_k_limit"), facts.size
    if limit is not None:
        return limit
    return PARETO_K_LIMIT if size is None or size < 2 else pareto_k_limit(size)
