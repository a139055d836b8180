"""Whether the change is told from zero."""

from __future__ import annotations

import math

from probe.verdict.facts import Facts, is_finite, number
from probe.verdict.sentences import count_text, more_digits, percent, resolving_size, share_text
from probe.verdict.words import MATERIAL, PER, UNITS, Finding


def has_no_error_bar(facts: Facts, suffix: str) -> Finding | None:
    """A value that is no number, or of which nothing says how far it may be off."""
    for name in dict.fromkeys((facts.quantity, "deltaH1")):
        key = name + suffix
        raw, error = facts.values.get(key), facts.values.get(f"{key}_se", math.inf)
        if raw is None:
            continue
        if not is_finite(raw):
            return Finding("invalid", f"{key} is {raw}, not a finite number.")
        estimate = facts.estimate(name, suffix)
        if f"{key}_se" in facts.values and (not is_finite(error) or (error <= 0 and raw != 0)):
            return Finding(
                "invalid",
                f"{key} = {raw:.3g} {UNITS[suffix]} has the standard error {error}: its interval says nothing; "
                f"E needs several prompts with different responses (batch_config.B_E, now {count_text(facts.size)}).",
            )
        if estimate.interval is None and name == facts.quantity:
            return Finding("caution", f"{key} = {raw:.3g} {UNITS[suffix]} comes without an error bar.")
    return None


def is_null(facts: Facts, suffix: str) -> Finding | None:
    """A value that the run left open, as the measurement is where it drowns in rounding."""
    key = facts.quantity + suffix
    if facts.values[key] is not None:
        return None
    floor = number(facts.found, f"noise_floor{suffix}")
    if facts.quantity != "deltaH_true" or floor is None:
        return Finding("unresolved", f"{key} could not be resolved and is null.")
    predicted = facts.estimate("deltaH1", suffix).value
    expected = "" if predicted is None else f" (deltaH1 predicts {predicted:.3g})"
    return Finding(
        "unresolved",
        f"{facts.quantity} is below the noise floor of the arithmetic, {floor:.3g} {UNITS[suffix]}{expected}; "
        f"raise probe_rework.learning_rate, or set {more_digits(facts)}.",
    )


def contains_zero(facts: Facts, suffix: str) -> Finding | None:
    """A change whose sign is not known."""
    estimate = facts.primary(suffix)
    if not estimate.contains_zero:
        return None
    others = [s for s in facts.suffixes if s != suffix]
    resolved = [s for s in others if (e := facts.primary(s)).interval is not None and not e.contains_zero]
    but = f" ({PER[resolved[0]]} it excludes 0)" if resolved else ""
    return Finding("unresolved", f"{estimate.range()}, contains 0{but}; {resolving_size(facts, estimate)}.")


def prediction_contains_zero(facts: Facts, suffix: str) -> Finding | None:
    """A prediction of unknown sign beside a measurement whose sign is known."""
    if facts.quantity == "deltaH1" or facts.primary(suffix).contains_zero:
        return None
    estimate = facts.estimate("deltaH1", suffix)
    if f"deltaH1{suffix}" in facts.values and facts.values[f"deltaH1{suffix}"] is None:
        return Finding("caution", f"deltaH1 {PER[suffix]} could not be resolved and is null.")
    if not estimate.contains_zero:
        return None
    return Finding("caution", f"{estimate.range()}, contains 0; {resolving_size(facts, estimate)}.")


def near_noise_floor(facts: Facts, suffix: str) -> Finding | None:
    """A measurement of which rounding is a visible part."""
    value = facts.estimate("deltaH_true", suffix).value
    floor = number(facts.found, f"noise_floor{suffix}")
    if value is None or floor is None or floor <= MATERIAL * abs(value):
        return None
    return Finding(
        "caution",
        f"The noise floor of the arithmetic, {floor:.3g} {UNITS[suffix]}, is {share_text(floor, value)} of deltaH_true "
        f"(limit {percent(MATERIAL)}); raise probe_rework.learning_rate, or set {more_digits(facts)}.",
    )
