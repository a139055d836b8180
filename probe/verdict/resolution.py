"""Whether the change is told from zero."""

from __future__ import annotations

from probe.config.numbers import is_finite
from probe.errors.remedies import Remedy
from probe.estimand import Estimand
from probe.text import percent
from probe.verdict.facts import Facts
from probe.verdict.sentences import count_text, more_digits, resolving_size, share_text
from probe.verdict.words import MATERIAL, Finding, caution, invalid, unresolved


def has_no_error_bar(facts: Facts, estimand: Estimand) -> Finding | None:
    """A value that is no number, or of which nothing says how far it may be off."""
    for name in dict.fromkeys((facts.quantity, "deltaH1")):
        given, key = facts.number(name, estimand), estimand.key(name)
        if given is None or given.value is None:
            continue
        if not is_finite(given.value):
            return invalid(f"{key} is {given.value}, not a finite number.")
        what, error = f"{key} = {given.value:.3g} {estimand.unit}", given.se
        if given.null_error or (error is not None and not _is_error(error, given.value)):
            return invalid(
                f"{what} has the standard error {error}: its interval says nothing; E needs several prompts with "
                "different responses (",
                Remedy.B_E,
                f", now {count_text(facts.size)}).",
            )
        if facts.change(name, estimand).interval is None and name == facts.quantity:
            return caution(f"{what} comes without an error bar.")
    return None


def is_null(facts: Facts, estimand: Estimand) -> Finding | None:
    """A value that the run left open, as the measurement is where it drowns in rounding."""
    given = facts.number(facts.quantity, estimand)
    if given is None or given.value is not None:
        return None
    floor = facts.noise_floor(estimand)
    if facts.quantity != "deltaH_true" or floor is None:
        return unresolved(f"{estimand.key(facts.quantity)} could not be resolved and is null.")
    predicted = facts.change("deltaH1", estimand).value
    expected = "" if predicted is None else f" (deltaH1 predicts {predicted:.3g})"
    return unresolved(
        f"{facts.quantity} is below the noise floor of the arithmetic, {floor:.3g} {estimand.unit}{expected}; ",
        Remedy.LARGER_STEP_OR,
        "set ",
        more_digits(facts),
        ".",
    )


def contains_zero(facts: Facts, estimand: Estimand) -> Finding | None:
    """A change whose sign is not known."""
    change = facts.primary(estimand)
    if not change.contains_zero:
        return None
    resolved = [e for e in facts.estimands if e is not estimand and facts.primary(e).excludes_zero]
    but = f" ({resolved[0].per} it excludes 0)" if resolved else ""
    return unresolved(f"{change.range()}, contains 0{but}; ", *resolving_size(facts, change), ".")


def prediction_contains_zero(facts: Facts, estimand: Estimand) -> Finding | None:
    """A prediction of unknown sign beside a measurement whose sign is known."""
    if facts.quantity == "deltaH1" or facts.primary(estimand).contains_zero:
        return None
    given, change = facts.number("deltaH1", estimand), facts.change("deltaH1", estimand)
    if given is not None and given.value is None:
        return caution(f"deltaH1 {estimand.per} could not be resolved and is null.")
    if not change.contains_zero:
        return None
    return caution(f"{change.range()}, contains 0; ", *resolving_size(facts, change), ".")


def near_noise_floor(facts: Facts, estimand: Estimand) -> Finding | None:
    """A measurement of which rounding is a visible part."""
    value, floor = facts.change("deltaH_true", estimand).value, facts.noise_floor(estimand)
    if value is None or floor is None or floor <= MATERIAL * abs(value):
        return None
    return caution(
        f"The noise floor of the arithmetic, {floor:.3g} {estimand.unit}, is {share_text(floor, value)} of deltaH_true "
        f"(limit {percent(MATERIAL)}); ",
        Remedy.LARGER_STEP_OR,
        "set ",
        more_digits(facts),
        ".",
    )


def _is_error(error: float, value: float) -> bool:
    """Whether a standard error says something: it is finite, and 0 only beside a value of exactly 0."""
    return is_finite(error) and (error > 0 or value == 0)
