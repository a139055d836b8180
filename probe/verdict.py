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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from probe.estimators.derivative_check import HALF_ROUNDING, OWN_ERRORS, ROUNDING
from probe.estimators.estimate import NORMAL_975
from probe.estimators.importance_weights import PARETO_K_LIMIT, pareto_k_limit

Word = Literal["trustworthy", "caution", "unresolved", "invalid"]
WORDS: tuple[Word, ...] = ("trustworthy", "caution", "unresolved", "invalid")
"""From best to worst. The position is the code under which loggers that take only numbers get the verdict."""

EVEN_WEIGHTS = 1.5
"""Below this largest weight (their mean being 1) Pareto k gives no reason: k does not know the scale of the weights,
and the tail of such even ones is that of rounding and chance."""
PARETO_K_NO_MEAN = 1.0
"""From here on the fitted tail of the weights has no finite mean: there is nothing the estimate converges to."""
ESS_COLLAPSE = 0.1
"""Share of E that is left as effective sample size below which a few responses decide the result."""
ESS_LEAST = 3.0
"""Effective responses below which one or two decide the result, however small E is: a tenth of eight is less than the
one that is always left. Leaving out one response at a time then says nothing about the error."""
ESS_LOW = 0.5
"""Below this share the measurement costs half of E: the step is large for importance sampling, and the weights of E
say less about the responses that were not drawn."""
FEW_RESPONSES = 30
"""Below this many (effective, or different) responses a normal 95 % interval, whose error is itself estimated, covers
visibly less than 95 %: with Student's t at 30 it is 4 % wider, at 10 it is 15 %."""
MATERIAL = 0.1
"""What changes a result by more than a tenth is reported: curvature (as in the definition of `eta_10`), the
difference between prediction and measurement, the noise floor, responses cut off by the token limit."""
DERIVATIVE_LIMITS = (0.01, 0.05)
"""Relative difference of `deltaH1` by two methods: caution above the first, which float32 does not explain; invalid
above the second, at which the derivative check stops a run as well."""
DERIVATIVE_LIMITS_HALF = (0.05, 0.25)
"""The same where forwards run in 16 bits, whose rounding finite differences magnify."""
OUT_OF_REACH = 1000
"""Where more than so many times `B_E` would be needed, a larger batch is not the remedy."""

UNITS = {"_tok": "nats per token", "": "nats per response"}
PER = {"_tok": "per token", "": "per response"}

REMEDY_STEP = "lower probe_rework.learning_rate or raise batch_config.B_E"


@dataclass(frozen=True)
class Verdict:
    """How far a result can be believed.

    Attributes:
        word: one of `WORDS`.
        reasons: sentences with the numbers found and, where there is one, the remedy; those of the worst word
            first. Never empty.
    """

    word: Word
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        word: how bad it is.
        sentence: what was found, against which limit, and what to do.
        minor: whether it is about the estimand beside the headline one, and stands behind others of its word.
    """

    word: Word
    sentence: str
    minor: bool = False

    @property
    def rank(self) -> int:
        """Position of the word in `WORDS`."""
        return WORDS.index(self.word)


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
        The 95 % interval of deltaH1, -0.12 to -0.04 nats per response, excludes 0.
        >>> found = verdict({"deltaH1": -0.08, "deltaH1_ci95": [-0.18, 0.02], "B_E": 64})
        >>> found.word
        'unresolved'
        >>> print(found.reasons[0])  # doctest: +NORMALIZE_WHITESPACE
        The 95 % interval of deltaH1, -0.18 to 0.02 nats per response, contains 0; if the change is as large as it
        seems, batch_config.B_E of about 100 (now 64) excludes 0, or raise probe_rework.learning_rate.
    """
    facts = _Facts.of(values)
    findings = [found for check in _PER_ESTIMAND if (found := _worst_estimand(check, facts)) is not None]
    findings += [found for check in _OVERALL if (found := check(facts)) is not None]
    findings += [found for flag in facts.flags if (found := _flag(flag, facts)) is not None]
    if not findings:
        return Verdict("trustworthy", (_praise(facts),))
    # stable: equally bad ones stay in the order of the checks
    findings.sort(key=lambda found: (-found.rank, found.minor))
    return Verdict(findings[0].word, tuple(found.sentence for found in findings))


# ---------------------------------------------------------------- what the checks look at


@dataclass(frozen=True)
class _Estimate:
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
class _Facts:
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
    def of(cls, values: Mapping[str, Any]) -> _Facts:
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

    def estimate(self, name: str, suffix: str) -> _Estimate:
        """A result with its interval: the one it came with, else the normal one from its standard error."""
        value, interval = number(self.values, name + suffix), self.values.get(f"{name}{suffix}_ci95")
        error = number(self.values, f"{name}{suffix}_se")
        ends: tuple[float, float] | None = None
        if interval is not None and len(interval) == 2 and all(map(_is_finite, interval)):
            ends = (float(interval[0]), float(interval[1]))
        elif value is not None and error is not None:
            ends = (value - NORMAL_975 * error, value + NORMAL_975 * error)
        return _Estimate(name, suffix, value, ends)

    def primary(self, suffix: str) -> _Estimate:
        """The estimate that is judged."""
        return self.estimate(self.quantity, suffix)


def number(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`; None where it is absent, null or not finite.

    >>> number({"ESS": 5}, "ESS"), number({"ESS": None}, "ESS"), number({}, "ESS")
    (5.0, None, None)
    """
    value = mapping.get(key)
    return float(value) if value is not None and _is_finite(value) else None


def _is_finite(value: Any) -> bool:
    """Whether `value` is a number that is neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _worst_estimand(check: Callable[[_Facts, str], Finding | None], facts: _Facts) -> Finding | None:
    """The worst a check finds in any estimand, the headline one's where they are equally bad.

    An estimand beside the headline one that is not resolved is a reason for caution only.
    """
    findings: list[Finding] = []
    for suffix in facts.suffixes:
        finding = check(facts, suffix)
        if finding is not None and finding.word == "unresolved" and suffix != facts.suffixes[0]:
            finding = Finding("caution", finding.sentence, minor=True)
        if finding is not None:
            findings.append(finding)
    return max(findings, key=lambda finding: finding.rank, default=None)


# ---------------------------------------------------------------- checks of one estimand


def _has_no_error_bar(facts: _Facts, suffix: str) -> Finding | None:
    """A value that is no number, or of which nothing says how far it may be off."""
    for name in dict.fromkeys((facts.quantity, "deltaH1")):
        key = name + suffix
        raw, error = facts.values.get(key), facts.values.get(f"{key}_se", math.inf)
        if raw is None:
            continue
        if not _is_finite(raw):
            return Finding("invalid", f"{key} is {raw}, not a finite number.")
        estimate = facts.estimate(name, suffix)
        if f"{key}_se" in facts.values and (not _is_finite(error) or (error <= 0 and raw != 0)):
            return Finding(
                "invalid",
                f"{key} = {raw:.3g} {UNITS[suffix]} has the standard error {error}: its interval says nothing; "
                f"E needs several prompts with different responses (batch_config.B_E, now {_count(facts.size)}).",
            )
        if estimate.interval is None and name == facts.quantity:
            return Finding("caution", f"{key} = {raw:.3g} {UNITS[suffix]} comes without an error bar.")
    return None


def _is_null(facts: _Facts, suffix: str) -> Finding | None:
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
        f"raise probe_rework.learning_rate, or set {_more_digits(facts)}.",
    )


def _contains_zero(facts: _Facts, suffix: str) -> Finding | None:
    """A change whose sign is not known."""
    estimate = facts.primary(suffix)
    if not estimate.contains_zero:
        return None
    others = [s for s in facts.suffixes if s != suffix]
    resolved = [s for s in others if (e := facts.primary(s)).interval is not None and not e.contains_zero]
    but = f" ({PER[resolved[0]]} it excludes 0)" if resolved else ""
    return Finding("unresolved", f"{estimate.range()}, contains 0{but}; {_resolving_size(facts, estimate)}.")


def _prediction_contains_zero(facts: _Facts, suffix: str) -> Finding | None:
    """A prediction of unknown sign beside a measurement whose sign is known."""
    if facts.quantity == "deltaH1" or facts.primary(suffix).contains_zero:
        return None
    estimate = facts.estimate("deltaH1", suffix)
    if f"deltaH1{suffix}" in facts.values and facts.values[f"deltaH1{suffix}"] is None:
        return Finding("caution", f"deltaH1 {PER[suffix]} could not be resolved and is null.")
    if not estimate.contains_zero:
        return None
    return Finding("caution", f"{estimate.range()}, contains 0; {_resolving_size(facts, estimate)}.")


def _near_noise_floor(facts: _Facts, suffix: str) -> Finding | None:
    """A measurement of which rounding is a visible part."""
    value = facts.estimate("deltaH_true", suffix).value
    floor = number(facts.found, f"noise_floor{suffix}")
    if value is None or floor is None or floor <= MATERIAL * abs(value):
        return None
    return Finding(
        "caution",
        f"The noise floor of the arithmetic, {floor:.3g} {UNITS[suffix]}, is {_share(floor, value)} of deltaH_true "
        f"(limit {_percent(MATERIAL)}); raise probe_rework.learning_rate, or set {_more_digits(facts)}.",
    )


def _curvature(facts: _Facts, suffix: str) -> Finding | None:
    """A step so large that the first order is not enough."""
    first, second = facts.estimate("deltaH1", suffix), facts.estimate("deltaH2", suffix)
    if first.value is None or second.value is None or second.contains_zero:
        return None
    if abs(second.value) <= MATERIAL * abs(first.value):
        return None
    eta, used = number(facts.values, f"eta_10{suffix}"), number(facts.values, "learning_rate")
    step = "" if used is None else f" (now {used:.3g})"
    up_to = "" if eta is None else f"; it holds up to a learning rate of eta_10 = {eta:.3g}"
    return Finding(
        "caution",
        f"The second-order term deltaH2, {second.value:.3g} {UNITS[suffix]}, is {_share(second.value, first.value)} of "
        f"deltaH1 (limit {_percent(MATERIAL)}): the first order alone is no good prediction of this step{up_to}; lower "
        f"probe_rework.learning_rate{step}.",
    )


def _material_residual(facts: _Facts, suffix: str) -> _Estimate | None:
    """The same-E difference of prediction and measurement, where it is neither noise nor small."""
    residual, truth = facts.estimate("residual", suffix), facts.estimate("deltaH_true", suffix)
    if residual.value is None or truth.value is None or _OTHER_STEP & set(facts.flags):
        return None
    significant = residual.interval is not None and not residual.contains_zero
    return residual if significant and abs(residual.value) > MATERIAL * abs(truth.value) else None


def _residual(facts: _Facts, suffix: str) -> Finding | None:
    """A same-E difference that `_curvature` has not said already: `deltaH1 - deltaH_true = -deltaH2 + O(eta^3)`."""
    residual = _material_residual(facts, suffix)
    if residual is None or residual.value is None:
        return None
    second = facts.estimate("deltaH2", suffix)
    left = residual.value + (second.value or 0.0)
    allowed = math.hypot(residual.half_width or 0.0, second.half_width or 0.0)
    if second.value is None:
        cause = "more than sampling explains"
    elif abs(left) > max(allowed, MATERIAL * abs(residual.value)):
        cause = f"of which deltaH2 = {second.value:.3g} leaves {left:.3g} unexplained"
    elif _curvature(facts, suffix) is not None:
        return None
    elif second.interval is not None and abs(left) > MATERIAL * abs(residual.value):
        low, high = second.interval
        cause = f"which curvature may explain or not (deltaH2 is {low:.3g} to {high:.3g})"
    else:
        cause = f"which is curvature (deltaH2 = {second.value:.3g})"
    truth = facts.estimate("deltaH_true", suffix).value or 0.0
    return Finding(
        "caution",
        f"On the same E, prediction and measurement differ by {residual.value:.3g} {UNITS[suffix]}, "
        f"{_share(residual.value, truth)} of deltaH_true (limit {_percent(MATERIAL)}), {cause}; lower "
        "probe_rework.learning_rate: curvature shrinks like its square, an error in the derivatives does not.",
    )


def _disagreement(facts: _Facts, suffix: str) -> Finding | None:
    """Prediction and measurement further apart than their errors allow, where no same-E residual says it already."""
    first, truth = facts.estimate("deltaH1", suffix), facts.estimate("deltaH_true", suffix)
    if first.value is None or truth.value is None or _OTHER_STEP & set(facts.flags):
        return None
    if first.half_width is None or truth.half_width is None or _material_residual(facts, suffix):
        return None
    difference = first.value - truth.value
    # They share E, which makes the true error of the difference the smaller one: this errs on the silent side.
    allowed = math.hypot(first.half_width, truth.half_width)
    if abs(difference) <= max(allowed, MATERIAL * abs(truth.value)):
        return None
    return Finding(
        "caution",
        f"deltaH1 = {first.value:.3g} and deltaH_true = {truth.value:.3g} {UNITS[suffix]} differ by {difference:.3g}, "
        f"more than their errors allow ({allowed:.3g}); lower probe_rework.learning_rate: what is curvature shrinks "
        "like its square.",
    )


# ---------------------------------------------------------------- checks of the run


def _pareto_k(facts: _Facts) -> Finding | None:
    """Weights with a tail too heavy for their mean to be estimated."""
    if "pareto_k" not in facts.found or not facts.reweighted:
        return None
    k, size = number(facts.found, "pareto_k"), facts.size
    largest = number(facts.found, "w_max")
    if largest is not None and largest < EVEN_WEIGHTS:
        return None
    if k is None:
        return Finding(
            "caution",
            "Pareto k of the importance weights could not be fitted: the tail of "
            f"{_count(size)} responses is too short; raise batch_config.B_E.",
        )
    limit = _pareto_limit(facts)
    share = _ess_share(facts)
    if k >= PARETO_K_NO_MEAN:
        return Finding(
            "invalid",
            f"Pareto k of the importance weights is {k:.2f}: from {PARETO_K_NO_MEAN:g} on their mean is not finite "
            f"and deltaH_true estimates nothing; {REMEDY_STEP}.",
        )
    if k > PARETO_K_LIMIT and share is not None and share < ESS_LOW:
        return Finding(
            "invalid",
            f"Pareto k of the importance weights is {k:.2f}, above {PARETO_K_LIMIT:g}, and they leave an ESS of "
            f"{_percent(share)} of E: a few responses decide deltaH_true; {REMEDY_STEP}.",
        )
    if k > limit:
        return Finding(
            "caution",
            f"Pareto k of the importance weights is {k:.2f}, above its limit of {limit:.2f} for {_count(size)} "
            f"responses: deltaH_true and its interval may be off; {REMEDY_STEP}.",
        )
    return None


def _effective_sample_size(facts: _Facts) -> Finding | None:
    """Weights so uneven that little of E is left."""
    share = _ess_share(facts)
    if share is None or share >= ESS_LOW or not facts.reweighted:
        return None
    what = f"The effective sample size of E is {facts.found['ESS']:.3g} of {_count(facts.size)} responses"
    if share < ESS_COLLAPSE or facts.found["ESS"] < ESS_LEAST:
        least = _percent(ESS_COLLAPSE) if share < ESS_COLLAPSE else f"{ESS_LEAST:g}"
        return Finding(
            "invalid",
            f"{what}, below {least}: a few responses decide deltaH_true; lower probe_rework.learning_rate.",
        )
    return Finding("caution", f"{what}, below half: the step is large for reweighting; {REMEDY_STEP}.")


def _derivatives(facts: _Facts) -> Finding | None:
    """Two ways to differentiate that do not give the same number.

    Their *relative* difference says nothing where `deltaH1` itself is 0 within its error, so that is never invalid.
    """
    found = number(facts.found, "derivative_agreement")
    half = "half_precision" in facts.flags
    low, high = DERIVATIVE_LIMITS_HALF if half else DERIVATIVE_LIMITS
    if found is None or found <= low:
        return None
    estimates = [facts.estimate("deltaH1", suffix) for suffix in ("_tok", "")]
    vague = any(estimate.contains_zero for estimate in estimates)
    mode = facts.found.get("derivative_mode")
    by = f" ({mode} is reported)" if mode else ""
    return Finding(
        "invalid" if found > high and not vague else "caution",
        f"Two ways to differentiate give values of deltaH1 that differ by {_percent(found)}{by}; up to {_percent(low)} "
        f"is rounding{' in 16 bits' if half else ''}, more than {_percent(high)} a layer that drops derivatives; set "
        f"{_more_digits(facts)}, or try another checkpoint.attn_implementation.",
    )


def _forwards(facts: _Facts) -> Finding | None:
    """Derivatives that forwards along the step contradict or cannot confirm, or that are made of coarse differences."""
    half = "half_precision" in facts.flags
    high = (DERIVATIVE_LIMITS_HALF if half else DERIVATIVE_LIMITS)[1]
    off, known = number(facts.found, "step_difference"), number(facts.found, "step_difference_error") or 0.0
    what = (
        ""
        if off is None
        else f"The derivatives along the step differ by {_percent(off)} from those of forwards"
    )
    if off is not None and off > (HALF_ROUNDING if half else ROUNDING) and off > OWN_ERRORS * known:
        return Finding(
            "invalid" if off > high else "caution",
            f"{what} (invalid above {_percent(high)}), which are known to {_percent(known)}: a layer takes a part of "
            "what it computes as a constant; set probe_rework.derivative_mode: finite_difference.",
        )
    if off is not None and off > high:
        return Finding(
            "caution",
            f"{what}, which are themselves known to {_percent(known)} only, so that nothing confirms the derivatives "
            f"(rounding, or experts that the router chooses anew); set {_more_digits(facts)}.",
        )
    coarse = number(facts.found, "difference_error")
    if facts.found.get("derivative_mode") == "finite_difference" and coarse is not None and coarse > high:
        return Finding(
            "caution",
            f"The derivatives are differences of forwards that are known to {_percent(coarse)} only (limit "
            f"{_percent(high)}; rounding, or experts that the router chooses anew); set {_more_digits(facts)}.",
        )
    return None


def _few_responses(facts: _Facts) -> Finding | None:
    """Too few responses for an interval that relies on many."""
    drawn, different = facts.size, number(facts.found, "distinct_responses")
    prompts = number(facts.found, "prompts_E")
    effective = number(facts.found, "ESS") if facts.reweighted else None
    if drawn is not None and drawn < FEW_RESPONSES:
        what = f"E has {drawn:g} responses"
    elif prompts is not None and prompts < FEW_RESPONSES:
        what = f"E has {prompts:g} prompts, which are its independent units"
    elif different is not None and different < FEW_RESPONSES:
        return Finding(
            "caution",
            f"E has {different:g} different responses among {_count(drawn)}: what the policy can say but did not is in "
            f"no error bar (limit {FEW_RESPONSES}); raise batch_config.B_E, or take more varied prompts.",
        )
    elif effective is not None and effective < FEW_RESPONSES:
        what = f"E is worth {effective:.3g} responses after reweighting"
    else:
        return None
    return Finding(
        "caution",
        f"{what}: with fewer than {FEW_RESPONSES} the 95 % intervals are too narrow; raise batch_config.B_E.",
    )


def _truncated(facts: _Facts) -> Finding | None:
    """Many responses whose end was not seen."""
    share = number(facts.found, "truncated_fraction")
    if share is None or share <= MATERIAL:
        return None
    return Finding(
        "caution",
        f"The token limit cut off {_percent(share)} of E (limit {_percent(MATERIAL)}): the entropies are those of the "
        "capped responses; raise generation.max_new_tokens.",
    )


def _flag(flag: str, facts: _Facts) -> Finding | None:
    """What a bias flag means for the result."""
    if flag == "half_precision":
        # With a measured floor, `_near_noise_floor` knows whether 16 bits are enough.
        if any(number(facts.found, f"noise_floor{suffix}") is not None for suffix in ("", "_tok")):
            return None
        return Finding(
            "caution",
            "Forwards run in 16 bits and no noise floor was measured: changes below about 0.01 nats per response can "
            "be rounding; set checkpoint.dtype: float32.",
        )
    if flag == "dropout":
        p = number(facts.found, "dropout")
        return Finding(
            "caution",
            f"The training draws dropout{'' if p is None else f' of {p:g}'} in the update's gradient, the probe takes "
            "the update without: the training's step differs by that noise (TRL: disable_dropout=True).",
        )
    if flag == "another_base":
        return Finding(
            "caution",
            f"The adapter was trained on {facts.found.get('base_recorded', 'another base')} and is put on "
            f"{facts.found.get('base_given', 'this one')}; unless they are one model, this is not the policy that was "
            "trained: name the right base in checkpoint.backbone.",
        )
    if flag == "rounded_step":
        moved, exact = number(facts.found, "rounded_moved"), number(facts.found, "rounded_moved_exact")
        share = (
            ""
            if moved is None or exact is None
            else f": it moves {_percent(moved)} of them, not {_percent(exact)}"
        )
        return Finding(
            "caution",
            f"The training keeps weights and moments in {facts.found.get('rounded_to', '16 bits')}, where much of its "
            f"step is rounded away{share}. deltaH_true is of the rounded step, deltaH1 of the exact one; "
            "train with float32 weights for the exact step.",
        )
    if flag == "E_not_from_this_policy":
        z = number(facts.found, "on_policy_z")
        off = "" if z is None else f": the mean of sum_t (l + h) is {z:.3g} standard errors from 0"
        return Finding(
            "invalid",
            f"E was not drawn from the policy that is probed{off}; sample E (leave out batch_config.E_rollouts), or "
            "give the checkpoint and generation.temperature that E was drawn with.",
        )
    if flag in _DOUBTED:
        sentence, doubts = _DOUBTED[flag]
        counted = _doubts(facts, doubts)
        return Finding("caution", sentence.format(counted=f" ({counted})" if counted else ""))
    return _FLAGS.get(
        flag, Finding("caution", f"The run is flagged {flag}: its numbers are biased in a known way.")
    )


# Flags of runs whose prediction and measurement are of different steps, so that their difference says nothing.
_OTHER_STEP = {"preconditioned_step", "rounded_step"}

_FLAGS: dict[str, Finding] = {
    "truncated_support": Finding(
        "invalid",
        "Sampling cut the policy's support, so weights and score terms are undefined outside it; set "
        "generation.top_p: 1, top_k: 0 and min_p: 0.",
    ),
    "E_shares_U": Finding(
        "invalid",
        "The rollout file of E holds responses that the update was made from (the same prompt, group and place): "
        "prediction and measurement are biased alike; give E responses of its own (leave out batch_config.E_rollouts "
        "to sample it).",
    ),
    "unknown_cap": Finding(
        "caution",
        "Responses of a rollout file are longer than generation.max_new_tokens, so which were cut off is not known; "
        "set it to the limit they were drawn with.",
    ),
    "no_reward_signal": Finding(
        "caution",
        "Every advantage of U is 0: the step has no policy gradient, and the change is that of momentum, weight decay "
        "and the loss's KL and entropy terms; raise batch_config.B_U or G, or check the reward.",
    ),
    "rollouts_of_several_updates": Finding(
        "caution",
        "The training makes several updates from the rollouts of one generation (steps_per_generation, "
        "num_iterations): those of the next update may be older than the checkpoint, and U is drawn from the "
        "checkpoint; take U from a file (batch_config.U_rollouts).",
    ),
    "means_of_microbatches": Finding(
        "caution",
        "The training works parts of its loss out over generations, or over the microbatches of several processes, the "
        "probe over those of one process: the gradients differ as far as these do.",
    ),
    "schedule_at_zero": Finding(
        "caution",
        "The saved learning rate is 0, so that the next step of the training would be 0: this one is at an earlier "
        "rate of its schedule; set probe_rework.learning_rate.",
    ),
    "order_of_rows": Finding(
        "caution",
        "The training makes several updates from one generation, or works parts of its loss out in microbatches, and "
        "U's file does not tell which rows these are: the gradients differ as far as the rows do; record the rollouts "
        "with RolloutRecorderCallback.",
    ),
    "reward_weights": Finding(
        "caution",
        "The training weights its rewards (reward_weights) or normalises each on its own "
        "(multi_objective_aggregation), and those of the rollout file are added up: give it a column `advantage`, or "
        "one reward in batch_config.reward_columns.",
    ),
    "preconditioned_step": Finding(
        "caution",
        "deltaH1 is for the preconditioned gradient, which is not the step that deltaH_true measures: do not compare "
        "them; set probe_rework.step: optimizer.",
    ),
}
"""Bias flags whose meaning does not depend on anything else."""

_DOUBT_WORDS = {
    "tokens": "may have been sampled in other tokens",
    "text": "do not come back from their tokens",
    "end": "are given an end that their text does not show",
    "no_end": "end in a way that neither the file nor the settings tell",
    "prompt": "have prompts that may be other tokens",
}
"""What is said of the responses with a doubt, see `RolloutBatch.doubts`."""
_DOUBTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "retokenized": (
        "A rollout file gave text without token ids: the tokens may not be those that were sampled{counted}; give it "
        "completion_ids.",
        ("tokens", "text", "end"),
    ),
    "ended_without_eos": (
        "Responses of a rollout file end neither with EOS nor at the token limit nor, as far as anything says, with a "
        "stop string: their last decision is missing{counted}; keep EOS in the file, give it finish_reason or "
        "truncated, or set generation.max_new_tokens and generation.stop_strings to what they were drawn with.",
        ("no_end",),
    ),
    "prompt_uncertain": (
        "Prompts of a rollout file may not be the tokens that the responses were sampled after{counted}; give it "
        "prompt_ids, or set batch_config.chat_template_kwargs ({{}} for none) and continue_final_message to what the "
        "training had.",
        ("prompt",),
    ),
}
"""Bias flags whose sentence counts the responses that they concern, and the doubts that are counted."""


def _doubts(facts: _Facts, doubts: tuple[str, ...]) -> str:
    """How many responses of which batch have which doubt."""
    found = facts.found.get("rollout_doubts") or {}
    parts = [
        f"{counts[doubt]} of {counts['of']} in {batch} {_DOUBT_WORDS[doubt]}"
        for batch, counts in found.items()
        for doubt in doubts
        if counts.get(doubt)
    ]
    return "; ".join(parts or [f"0 of {counts['of']} in {batch} in doubt" for batch, counts in found.items()])


_PER_ESTIMAND: tuple[Callable[[_Facts, str], Finding | None], ...] = (
    _has_no_error_bar,
    _is_null,
    _contains_zero,
    _prediction_contains_zero,
    _near_noise_floor,
    _curvature,
    _residual,
    _disagreement,
)
_OVERALL: tuple[Callable[[_Facts], Finding | None], ...] = (
    _pareto_k,
    _effective_sample_size,
    _derivatives,
    _forwards,
    _few_responses,
    _truncated,
)


# ---------------------------------------------------------------- words and numbers of the sentences


def _praise(facts: _Facts) -> str:
    """Why a result is trustworthy."""
    suffix = facts.suffixes[0]
    parts = [f"{facts.primary(suffix).range()}, excludes 0"]
    ess, k = number(facts.found, "ESS"), number(facts.found, "pareto_k")
    if ess is not None and facts.size is not None and facts.reweighted:
        limit = _pareto_limit(facts)
        tail = "" if k is None or k > limit else f", Pareto k {k:.2f} below {limit:.2f}"
        parts.append(f"the weights are even (ESS {ess:.4g} of {facts.size:g}{tail})")
    first, bent = facts.estimate("deltaH1", suffix).value, facts.estimate("deltaH2", suffix)
    if first and bent.value is not None:
        resolved = bent.half_width is None or abs(bent.value) > bent.half_width
        bound = bent.value if resolved else abs(bent.value) + (bent.half_width or 0.0)
        parts.append(
            f"the second order is {'' if resolved else 'at most '}{_share(bound, first)} of the first"
        )
    return "; ".join(parts) + "."


def _resolving_size(facts: _Facts, estimate: _Estimate) -> str:
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


def _ess_share(facts: _Facts) -> float | None:
    """ESS as a share of E."""
    ess, size = number(facts.found, "ESS"), facts.size
    return None if ess is None or not size else ess / size


def _pareto_limit(facts: _Facts) -> float:
    """The limit of Pareto k: the one in the result, else `min(1 - 1 / log10(B_E), 0.7)`."""
    limit, size = number(facts.found, "pareto_k_limit"), facts.size
    if limit is not None:
        return limit
    return PARETO_K_LIMIT if size is None or size < 2 else pareto_k_limit(size)


def _more_digits(facts: _Facts) -> str:
    """The setting that makes the arithmetic finer."""
    return "checkpoint.dtype: " + ("float32" if "half_precision" in facts.flags else "float64")


def _percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.3g} %"


def _share(part: float, whole: float) -> str:
    """The size of `part` in per cent of that of `whole`."""
    ratio = 100 * abs(part / whole) if whole else math.inf
    if ratio > 1000:
        return "many times the size"
    return f"{ratio:.0f} %" if ratio >= 10 else f"{ratio:.2g} %"


def _count(value: float | None) -> str:
    """A count that may not be known."""
    return "an unknown number of" if value is None else f"{value:g}"
