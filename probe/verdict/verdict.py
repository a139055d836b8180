"""The verdict on a result: one word, and the reasons for it in sentences.

    invalid      a number is wrong, or nothing is known about how wrong it is
    unresolved   the numbers are right, but too noisy to tell the entropy change from zero
    caution      the change is resolved; something limits what may be concluded from it
    trustworthy  none of these

Every check looks at one thing and finds nothing or one word with a sentence; the worst word is the verdict. Checks of
an estimand are made per token and per response. The *headline* estimand (per token, where it was measured) decides
whether the change is resolved; that the other one is not is then a reason for caution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from probe.errors.remedies import Message
from probe.estimand import Estimand
from probe.verdict.agreement import (
    bends,
    derivatives_disagree,
    forwards_disagree,
    intervals_disagree,
    may_bend,
    residual_stands_out,
)
from probe.verdict.facts import Facts
from probe.verdict.flags import flag_finding
from probe.verdict.resolution import (
    contains_zero,
    few_carry_the_error,
    has_no_error_bar,
    imprecise,
    is_null,
    near_noise_floor,
    prediction_contains_zero,
)
from probe.verdict.sample import cut_off, effective_sample_size, few_responses, heavy_tail
from probe.verdict.sentences import praise
from probe.verdict.words import Finding, Verdict


def verdict(values: Mapping[str, Any]) -> Verdict:
    """Judge a result mapping (`probe.results.RESULT_KEYS`; `verdict` and `verdict_reasons` are not read).

    A key that is absent (a phase that did not run, a result of an older version) gives no reason; one that is
    null was computed and could not be resolved.

    Args:
        values: the result mapping, with `diagnostics`.

    Raises:
        ValueError: there is neither a prediction nor a measurement.

    Example:
        >>> found = verdict({"deltaH1": -0.08, "deltaH1_ci95": [-0.12, -0.04]})
        >>> found.word
        'trustworthy'
        >>> print(found.reasons[0])
        The 95 % interval of deltaH1, [-0.120, -0.040] nats per response, excludes 0.
        >>> found = verdict({"deltaH1": -0.08, "deltaH1_ci95": [-0.18, 0.02], "B_E": 64})
        >>> found.word
        'unresolved'
        >>> print(found.reasons[0])  # doctest: +NORMALIZE_WHITESPACE
        The 95 % interval of deltaH1, [-0.180, 0.020] nats per response, contains 0; if the change is as large as it
        seems, batch_config.B_E of about 100 (now 64) excludes 0, or raise probe_rework.learning_rate.
    """
    return judge(Facts.of(values))


def judge(facts: Facts) -> Verdict:
    """Judge what is known of a result."""
    findings = [found for check in _PER_ESTIMAND if (found := _worst_estimand(check, facts)) is not None]
    findings += [found for check in _OVERALL if (found := check(facts)) is not None]
    findings += [found for flag in facts.flags if (found := flag_finding(flag, facts)) is not None]
    if not findings:
        return Verdict("trustworthy", (Message((praise(facts),)),))
    # stable: equally bad ones stay in the order of the checks
    findings.sort(key=lambda found: (-found.rank, found.minor))
    return Verdict(findings[0].word, tuple(found.message for found in findings))


def _worst_estimand(check: Callable[[Facts, Estimand], Finding | None], facts: Facts) -> Finding | None:
    """The worst a check finds in any estimand, the headline one's where they are equally bad.

    An estimand beside the headline one that is not resolved is a reason for caution only.
    """
    findings: list[Finding] = []
    for estimand in facts.estimands:
        finding = check(facts, estimand)
        if finding is not None and finding.word == "unresolved" and estimand != facts.estimands[0]:
            finding = Finding("caution", finding.message, minor=True)
        if finding is not None:
            findings.append(finding)
    return max(findings, key=lambda finding: finding.rank, default=None)


_PER_ESTIMAND: tuple[Callable[[Facts, Estimand], Finding | None], ...] = (
    has_no_error_bar,
    is_null,
    contains_zero,
    prediction_contains_zero,
    # what is seen goes before what is not known well enough
    residual_stands_out,
    intervals_disagree,
    bends,
    near_noise_floor,
    imprecise,
    few_carry_the_error,
    may_bend,
)
_OVERALL: tuple[Callable[[Facts], Finding | None], ...] = (
    heavy_tail,
    effective_sample_size,
    derivatives_disagree,
    forwards_disagree,
    few_responses,
    cut_off,
)
