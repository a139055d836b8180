"""Numbers and remedies of the sentences."""

from __future__ import annotations

import math

from probe.errors.remedies import Remedy
from probe.verdict.facts import Change, Facts, number, pareto_limit

OUT_OF_REACH = 1000
"""Where more than so many times `B_E` would be needed, a larger batch is not the remedy."""


def praise(facts: Facts) -> str:
    """Why a result is trustworthy."""
    estimand = facts.estimands[0]
    parts = [f"{facts.primary(estimand).range()}, excludes 0"]
    ess, k = number(facts.diagnostics, "ESS"), number(facts.diagnostics, "pareto_k")
    if ess is not None and facts.size is not None and facts.reweighted:
        limit = pareto_limit(facts)
        tail = "" if k is None or k > limit else f", Pareto k {k:.2f} below {limit:.2f}"
        parts.append(f"the weights are even (ESS {ess:.4g} of {facts.size:g}{tail})")
    first, bent = facts.change("deltaH1", estimand).value, facts.change("deltaH2", estimand)
    if first and bent.value is not None:
        resolved = bent.half_width is None or abs(bent.value) > bent.half_width
        bound = bent.value if resolved else abs(bent.value) + (bent.half_width or 0.0)
        parts.append(
            f"the second order is {'' if resolved else 'at most '}{share_text(bound, first)} of the first"
        )
    return "; ".join(parts) + "."


def resolving_size(facts: Facts, change: Change) -> tuple[str | Remedy, ...]:
    """The remedy for an interval that contains 0: how large E must be, as its width shrinks with `sqrt(B_E)`."""
    size = facts.draws
    if size is None:
        return "raise ", Remedy.B_E, ", ", Remedy.OR_LARGER_STEP
    if not change.value or change.half_width is None:
        return "the size of the change is not known: ", Remedy.LARGER_STEP
    factor = (change.half_width / change.value) ** 2
    if factor > OUT_OF_REACH:
        times = f"more than {OUT_OF_REACH} times "
        return times, Remedy.B_E, f" ({size:g}) would be needed: ", Remedy.LARGER_STEP
    needed = larger_size(size, factor)
    return (
        "if the change is as large as it seems, ",
        Remedy.B_E,
        f" of about {needed} (now {size:g}) excludes 0, ",
        Remedy.OR_LARGER_STEP,
    )


def larger_size(size: float, factor: float) -> int:
    """`size` times `factor`, larger by one at least, rounded up to two significant digits."""
    return round_up(max(size * factor, size + 1))


def round_up(x: float) -> int:
    """`x`, at least 1, rounded up to two significant digits.

    >>> round_up(99.2), round_up(1234), round_up(7)
    (100, 1300, 7)
    """
    unit = 10 ** max(math.floor(math.log10(x)) - 1, 0)
    return math.ceil(x / unit) * unit


def more_digits(facts: Facts) -> Remedy:
    """The setting that makes the arithmetic finer."""
    return Remedy.FLOAT32 if "half_precision" in facts.flags else Remedy.FLOAT64


def share_text(part: float, whole: float) -> str:
    """The size of `part` in per cent of that of `whole`."""
    ratio = 100 * abs(part / whole) if whole else math.inf
    if ratio > 1000:
        return "many times the size"
    return f"{ratio:.0f} %" if ratio >= 10 else f"{ratio:.2g} %"


def count_text(value: float | None) -> str:
    """A count that may not be known."""
    return "an unknown number of" if value is None else f"{value:g}"
