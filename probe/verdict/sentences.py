"""Numbers and remedies of the sentences."""

from __future__ import annotations

import math

from probe.verdict.facts import Change, Facts, number, pareto_limit

OUT_OF_REACH = 1000
"""Where more than so many times `B_E` would be needed, a larger batch is not the remedy."""
REMEDY_STEP = "lower probe_rework.learning_rate or raise batch_config.B_E"


def praise(facts: Facts) -> str:
    """Why a result is trustworthy."""
    suffix = facts.suffixes[0]
    parts = [f"{facts.primary(suffix).range()}, excludes 0"]
    ess, k = number(facts.found, "ESS"), number(facts.found, "pareto_k")
    if ess is not None and facts.size is not None and facts.reweighted:
        limit = pareto_limit(facts)
        tail = "" if k is None or k > limit else f", Pareto k {k:.2f} below {limit:.2f}"
        parts.append(f"the weights are even (ESS {ess:.4g} of {facts.size:g}{tail})")
    first, bent = facts.estimate("deltaH1", suffix).value, facts.estimate("deltaH2", suffix)
    if first and bent.value is not None:
        resolved = bent.half_width is None or abs(bent.value) > bent.half_width
        bound = bent.value if resolved else abs(bent.value) + (bent.half_width or 0.0)
        parts.append(
            f"the second order is {'' if resolved else 'at most '}{share_text(bound, first)} of the first"
        )
    return "; ".join(parts) + "."


def resolving_size(facts: Facts, estimate: Change) -> str:
    """The remedy for an interval that contains 0: how large E must be, as its width shrinks with `sqrt(B_E)`."""
    larger_step = "raise probe_rework.learning_rate"
    size = number(facts.found, "prompts_E") or facts.size
    if size is None:
        return f"raise batch_config.B_E, or {larger_step}"
    if not estimate.value or estimate.half_width is None:
        return f"the size of the change is not known: {larger_step}"
    factor = (estimate.half_width / estimate.value) ** 2
    if factor > OUT_OF_REACH:
        return f"more than {OUT_OF_REACH} times batch_config.B_E ({size:g}) would be needed: {larger_step}"
    needed = round_up(max(size * factor, size + 1))
    return (
        f"if the change is as large as it seems, batch_config.B_E of about {needed} (now {size:g}) excludes 0, "
        f"or {larger_step}"
    )


def round_up(x: float) -> int:
    """`x`, at least 1, rounded up to two significant digits.

    >>> round_up(99.2), round_up(1234), round_up(7)
    (100, 1300, 7)
    """
    unit = 10 ** max(math.floor(math.log10(x)) - 1, 0)
    return math.ceil(x / unit) * unit


def more_digits(facts: Facts) -> str:
    """The setting that makes the arithmetic finer."""
    return "checkpoint.dtype: " + ("float32" if "half_precision" in facts.flags else "float64")


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.3g} %"


def share_text(part: float, whole: float) -> str:
    """The size of `part` in per cent of that of `whole`."""
    ratio = 100 * abs(part / whole) if whole else math.inf
    if ratio > 1000:
        return "many times the size"
    return f"{ratio:.0f} %" if ratio >= 10 else f"{ratio:.2g} %"


def count_text(value: float | None) -> str:
    """A count that may not be known."""
    return "an unknown number of" if value is None else f"{value:g}"
