"""Whether the change is told from zero."""

from __future__ import annotations

from probe.config.numbers import is_finite
from probe.errors.remedies import Remedy
from probe.estimand import Estimand
from probe.text import percent
from probe.verdict.facts import Facts
from probe.verdict.sentences import count_text, larger_size, more_digits, resolving_size, share_text
from probe.verdict.words import MATERIAL, Finding, caution, invalid, unresolved

PRECISE = 4.0
"""How many times its standard error a change has to be to be called trustworthy. What merely excludes 0 was often
overestimated, and its interval misses more often than one time in twenty; see the table in `docs/verdict.md`."""
ROUNDING = 1e-12
"""Standard errors below this share of their value are what sums in float64 round."""
LEAST_FREEDOM = 20.0
"""Degrees of freedom below which the standard error is carried by a few responses. Twenty light-tailed prompts have as
many; of a policy whose rare responses derail, some hundred to some thousand."""


def has_no_error_bar(facts: Facts, estimand: Estimand) -> Finding | None:
    """A value that is no number, or of which nothing says how far it may be off."""
    for name in facts.judged_quantities:
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


def imprecise(facts: Facts, estimand: Estimand) -> Finding | None:
    """A change that is told from 0, and not known to a quarter: such stand out by luck more often than others."""
    for name in facts.judged_quantities:
        change = facts.change(name, estimand)
        if change.value is None or not change.excludes_zero or change.se is None:
            continue
        if PRECISE * change.se <= abs(change.value):
            continue
        size = facts.draws
        enough: tuple[str | Remedy, ...] = ()
        if size is not None:
            needed = larger_size(size, (PRECISE * change.se / change.value) ** 2)
            enough = ("; ", Remedy.B_E, f" of about {needed} (now {size:g}) would do")
        return caution(
            f"{change.key} = {change.value:.3g} {estimand.unit} is {abs(change.value) / change.se:.2g} times its "
            f"standard error: the sign is known, its size is not (limit {PRECISE:g} times)",
            *enough,
            ".",
        )
    return None


def few_carry_the_error(facts: Facts, estimand: Estimand) -> Finding | None:
    """An error that a few responses make: how many more such there are, and how large they are, is not known."""
    for name in facts.judged_quantities:
        given, change = facts.number(name, estimand), facts.change(name, estimand)
        df = None if given is None else given.df
        if change.value is None or df is None or not is_finite(df) or df >= LEAST_FREEDOM:
            continue
        return caution(
            f"A few responses carry the standard error of {change.key} ({df:.2g} degrees of freedom, limit "
            f"{LEAST_FREEDOM:g}): others like them may not have been drawn, and those are in no error bar; raise ",
            Remedy.B_E,
            ".",
        )
    return None


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
    """Whether a standard error says something: it is finite, and 0 only beside a value of exactly 0.

    One that is rounding alone counts as 0: contributions of equal responses are equal up to that.
    """
    return is_finite(error) and (error > ROUNDING * abs(value) or value == 0)
