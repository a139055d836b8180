"""Whether prediction, measurement, curvature and derivatives agree."""

from __future__ import annotations

import math

from probe.digits import interval_text
from probe.errors.remedies import Remedy
from probe.estimand import ESTIMANDS, Estimand
from probe.estimators.step_check import HALF_ROUNDING, OWN_ERRORS, ROUNDING
from probe.text import percent
from probe.verdict.facts import Change, Facts, number
from probe.verdict.sentences import more_digits, share_text
from probe.verdict.words import MATERIAL, Finding, caution, invalid

DERIVATIVE_LIMITS = (0.01, 0.05)
"""Relative difference of `deltaH1` by two methods: caution above the first, which float32 does not explain; invalid
above the second, at which the derivative check stops a run as well."""
DERIVATIVE_LIMITS_HALF = (0.05, 0.25)
"""The same where forwards run in 16 bits, whose rounding finite differences magnify."""


def bends(facts: Facts, estimand: Estimand) -> Finding | None:
    """A step so large that the first order is not enough."""
    first, second = facts.change("deltaH1", estimand), facts.change("deltaH2", estimand)
    if first.value is None or second.value is None or second.contains_zero:
        return None
    if abs(second.value) <= MATERIAL * abs(first.value):
        return None
    eta, used = facts.change("eta_10", estimand).value, facts.learning_rate
    now = "" if used is None else f" (now {used:.3g})"
    up_to = "" if eta is None else f"; it holds up to a learning rate of eta_10 = {eta:.3g}"
    return caution(
        f"The second-order term deltaH2, {second.value:.3g} {estimand.unit}, is "
        f"{share_text(second.value, first.value)} of "
        f"deltaH1 (limit {percent(MATERIAL)}): the first order alone is no good prediction of this step{up_to}; ",
        Remedy.SMALLER_STEP,
        f"{now}.",
    )


def may_bend(facts: Facts, estimand: Estimand) -> Finding | None:
    """A second order, or a same-E difference, that is noise, and of which nothing shows that it is small.

    What is not known is not good: without this a small E, which cannot see the curvature, would be judged better than a
    large one, which does.
    """
    first, truth = facts.change("deltaH1", estimand), facts.change("deltaH_true", estimand)
    second, residual = facts.change("deltaH2", estimand), facts.change("residual", estimand)
    if _OTHER_STEP & set(facts.flags):
        return None
    for what, change, whole in (
        ("second-order term deltaH2", second, first),
        ("same-E difference of prediction and measurement", residual, truth),
    ):
        if change.largest is None or not change.contains_zero or whole.value is None or whole.contains_zero:
            continue
        if change.largest > MATERIAL * abs(whole.value):
            return caution(
                f"The {what} {estimand.per} is not shown to be small: it may be "
                f"{share_text(change.largest, whole.value)} of {whole.key} (limit {percent(MATERIAL)}); raise ",
                Remedy.B_E,
                ".",
            )
    return None


def _material_residual(facts: Facts, estimand: Estimand) -> Change | None:
    """The same-E difference of prediction and measurement, where it is neither noise nor small."""
    residual, truth = facts.change("residual", estimand), facts.change("deltaH_true", estimand)
    if residual.value is None or truth.value is None or _OTHER_STEP & set(facts.flags):
        return None
    significant = residual.excludes_zero
    return residual if significant and abs(residual.value) > MATERIAL * abs(truth.value) else None


def residual_stands_out(facts: Facts, estimand: Estimand) -> Finding | None:
    """A same-E difference that `bends` has not said already: `deltaH1 - deltaH_true = -deltaH2 + O(eta^3)`."""
    residual = _material_residual(facts, estimand)
    if residual is None or residual.value is None:
        return None
    second = facts.change("deltaH2", estimand)
    left = residual.value + (second.value or 0.0)
    allowed = math.hypot(residual.half_width or 0.0, second.half_width or 0.0)
    if second.value is None:
        cause = "more than sampling explains"
    elif abs(left) > max(allowed, MATERIAL * abs(residual.value)):
        cause = f"of which deltaH2 = {second.value:.3g} leaves {left:.3g} unexplained"
    elif bends(facts, estimand) is not None:
        return None
    elif second.interval is not None and abs(left) > MATERIAL * abs(residual.value):
        cause = f"which curvature may explain or not (deltaH2 is within {interval_text(second.interval)})"
    else:
        cause = f"which is curvature (deltaH2 = {second.value:.3g})"
    truth = facts.change("deltaH_true", estimand).value or 0.0
    return caution(
        f"On the same E, prediction and measurement differ by {residual.value:.3g} {estimand.unit}, "
        f"{share_text(residual.value, truth)} of deltaH_true (limit {percent(MATERIAL)}), {cause}; ",
        Remedy.SMALLER_STEP_SHOWS,
        "curvature shrinks like its square, an error in the derivatives does not.",
    )


def intervals_disagree(facts: Facts, estimand: Estimand) -> Finding | None:
    """Prediction and measurement further apart than their errors allow, where no same-E residual says it already."""
    first, truth = facts.change("deltaH1", estimand), facts.change("deltaH_true", estimand)
    if first.value is None or truth.value is None or _OTHER_STEP & set(facts.flags):
        return None
    if first.half_width is None or truth.half_width is None or _material_residual(facts, estimand):
        return None
    difference = first.value - truth.value
    # They share E, which makes the true error of the difference the smaller one: this errs on the silent side.
    allowed = math.hypot(first.half_width, truth.half_width)
    if abs(difference) <= max(allowed, MATERIAL * abs(truth.value)):
        return None
    return caution(
        f"deltaH1 = {first.value:.3g} and deltaH_true = {truth.value:.3g} {estimand.unit} differ by {difference:.3g}, "
        f"more than their errors allow ({allowed:.3g}); ",
        Remedy.SMALLER_STEP_SHOWS,
        "what is curvature shrinks like its square.",
    )


def derivatives_disagree(facts: Facts) -> Finding | None:
    """Two ways to differentiate that do not give the same number.

    Their *relative* difference says nothing where `deltaH1` itself is 0 within its error, so that is never invalid.
    """
    found = number(facts.diagnostics, "derivative_agreement")
    half = "half_precision" in facts.flags
    low, high = DERIVATIVE_LIMITS_HALF if half else DERIVATIVE_LIMITS
    if found is None or found <= low:
        return None
    vague = any(facts.change("deltaH1", estimand).contains_zero for estimand in ESTIMANDS)
    mode = facts.diagnostics.get("derivative_mode")
    by = f" ({mode} is reported)" if mode else ""
    judged = invalid if found > high and not vague else caution
    return judged(
        f"Two ways to differentiate give values of deltaH1 that differ by {percent(found)}{by}; up to {percent(low)} "
        f"is rounding{' in 16 bits' if half else ''}, more than {percent(high)} a layer that drops derivatives; set ",
        more_digits(facts),
        ", or try another ",
        Remedy.ATTENTION,
        ".",
    )


def forwards_disagree(facts: Facts) -> Finding | None:
    """Derivatives that forwards along the step contradict or cannot confirm, or that are made of coarse differences."""
    half = "half_precision" in facts.flags
    high = (DERIVATIVE_LIMITS_HALF if half else DERIVATIVE_LIMITS)[1]
    off, known = (
        number(facts.diagnostics, "step_difference"),
        number(facts.diagnostics, "step_difference_error") or 0.0,
    )
    what = (
        ""
        if off is None
        else f"The derivatives along the step differ by {percent(off)} from those of forwards"
    )
    if off is not None and off > (HALF_ROUNDING if half else ROUNDING) and off > OWN_ERRORS * known:
        judged = invalid if off > high else caution
        return judged(
            f"{what} (invalid above {percent(high)}), which are known to {percent(known)}: a layer takes a part of "
            "what it computes as a constant; set ",
            Remedy.DIFFERENCES,
            ".",
        )
    if off is not None and off > high:
        return caution(
            f"{what}, which are themselves known to {percent(known)} only, so that nothing confirms the derivatives "
            "(rounding, or experts that the router chooses anew); set ",
            more_digits(facts),
            ".",
        )
    coarse = number(facts.diagnostics, "difference_error")
    if (
        facts.diagnostics.get("derivative_mode") == "finite_difference"
        and coarse is not None
        and coarse > high
    ):
        return caution(
            f"The derivatives are differences of forwards that are known to {percent(coarse)} only (limit "
            f"{percent(high)}; rounding, or experts that the router chooses anew); set ",
            more_digits(facts),
            ".",
        )
    return None


# Flags of runs whose prediction and measurement are of different steps, so that their difference says nothing.
_OTHER_STEP = {"preconditioned_step", "rounded_step"}
