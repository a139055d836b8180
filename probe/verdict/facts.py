"""What is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.estimators.estimate import NORMAL_975
from probe.estimators.importance_weights import PARETO_K_LIMIT, pareto_k_limit
from probe.verdict.words import UNITS


@dataclass(frozen=True)
class Change:
    """A value with its 95 % interval `low` to `high`; None where it is null or not in the result."""

    name: str
    suffix: str
    value: float | None
    interval: tuple[float, float] | None

    @property
    def contains_zero(self) -> bool:
        """Whether there is an interval, and 0 lies in it; its ends count as inside."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def range(self) -> str:
        """`The 95 % interval of NAME, LOW to HIGH UNIT`."""
        low, high = self.interval if self.interval is not None else (math.nan, math.nan)
        return f"The 95 % interval of {self.name}, {low:.3g} to {high:.3g} {UNITS[self.suffix]}"


@dataclass(frozen=True)
class Facts:
    """A result mapping, and what is judged in it.

    Attributes:
        values: the result mapping.
        found: its diagnostics.
        quantity: `deltaH_true` where it was measured, else `deltaH1`.
        suffixes: of the estimands of `quantity`, the headline one first.
    """

    values: Mapping[str, Any]
    found: Mapping[str, Any]
    quantity: str
    suffixes: tuple[str, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Find out what there is to judge."""
        for quantity in ("deltaH_true", "deltaH1"):
            suffixes = tuple(suffix for suffix in ("_tok", "") if quantity + suffix in values)
            if suffixes:
                return cls(values, values.get("diagnostics") or {}, quantity, suffixes)
        raise ValueError(
            "expected a result with deltaH1 or deltaH_true (or deltaH1_tok, deltaH_true_tok), found neither among "
            f"{len(values)} keys; switch on probe_rework.compute_delta_h1 or importance.enabled"
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """The bias flags."""
        return tuple(self.found.get("bias_flags") or ())

    @property
    def reweighted(self) -> bool:
        """Whether the measurement stands on importance weights (`resample` draws a fresh E instead)."""
        return self.found.get("is_mode") != "resample"

    @property
    def size(self) -> float | None:
        """Sequences in E."""
        return number(self.values, "B_E")

    def estimate(self, name: str, suffix: str) -> Change:
        """A result with its interval: the one it came with, else the normal one from its standard error."""
        value, interval = number(self.values, name + suffix), self.values.get(f"{name}{suffix}_ci95")
        error = number(self.values, f"{name}{suffix}_se")
        ends: tuple[float, float] | None = None
        if interval is not None and len(interval) == 2 and all(map(is_finite, interval)):
            ends = (float(interval[0]), float(interval[1]))
        elif value is not None and error is not None:
            ends = (value - NORMAL_975 * error, value + NORMAL_975 * error)
        return Change(name, suffix, value, ends)

    def primary(self, suffix: str) -> Change:
        """The estimate that is judged."""
        return self.estimate(self.quantity, suffix)


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`; None where it is absent, null or not finite.

    >>> number({"ESS": 5}, "ESS"), number({"ESS": None}, "ESS"), number({}, "ESS")
    (5.0, None, None)
    """
    value = mapping.get(key)
    return float(value) if value is not None and is_finite(value) else None


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that is neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ess_share(facts: Facts) -> float | None:
    """ESS as a share of E."""
    ess, size = number(facts.found, "ESS"), facts.size
    return None if ess is None or not size else ess / size


def pareto_limit(facts: Facts) -> float:
    """The limit of Pareto k: the one in the result, else `min(1 - 1 / log10(B_E), 0.7)`."""
    limit, size = number(facts.found, "pareto_k_limit"), facts.size
    if limit is not None:
        return limit
    return PARETO_K_LIMIT if size is None or size < 2 else pareto_k_limit(size)
