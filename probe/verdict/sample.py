"""What E is worth as a sample."""

from __future__ import annotations

from probe.errors.remedies import Remedy
from probe.estimators.importance_weights import PARETO_K_LIMIT, pareto_k_error
from probe.text import percent
from probe.verdict.facts import Facts, ess_share, number, pareto_limit
from probe.verdict.sentences import count_text
from probe.verdict.words import MATERIAL, Finding, caution, invalid

EVEN_WEIGHTS = 1.5
"""Below this largest weight (their mean being 1) Pareto k gives no reason: k does not know the scale of the weights,
and the tail of such even ones is that of rounding and chance."""
EVEN_ESS = 0.9
"""From this share of E on, as effective sample size, the weights are too even for their tail to invalidate a result."""
ONE_SIDED = 1.645
"""Standard errors that k has to be above 1 by, to be believed with 95 %."""
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
"""Below this many (effective, or different) responses a standard error is itself known to 13 % at best."""


def heavy_tail(facts: Facts) -> Finding | None:
    """Weights with a tail too heavy for their mean to be estimated."""
    if "pareto_k" not in facts.diagnostics or not facts.reweighted:
        return None
    k, size = number(facts.diagnostics, "pareto_k"), facts.size
    largest = number(facts.diagnostics, "w_max")
    if largest is not None and largest < EVEN_WEIGHTS:
        return None
    if k is None:
        return caution(
            "Pareto k of the importance weights could not be fitted: the tail of "
            f"{count_text(size)} responses is too short; raise ",
            Remedy.B_E,
            ".",
        )
    limit = pareto_limit(facts)
    if why := _invalidating(k, size, ess_share(facts)):
        return invalid(
            f"Pareto k of the importance weights is {k:.2f}{why}; ", Remedy.SMALLER_STEP_OR_LARGER_E, "."
        )
    if k > limit:
        return caution(
            f"Pareto k of the importance weights is {k:.2f}, above its limit of {limit:.2f} for {count_text(size)} "
            f"responses: deltaH_true and its interval may be off; ",
            Remedy.SMALLER_STEP_OR_LARGER_E,
            ".",
        )
    return None


def _invalidating(k: float, size: float | None, share: float | None) -> str:
    """Why a tail makes the result invalid, the end of a sentence; empty where it does not.

    `k` comes from the few largest weights, at 64 responses from a dozen, and is then often noise: it counts only with
    the lower end of its one-sided interval, and the more so the less is left of E to outweigh the tail. That end has to
    reach 1, where weights have no mean, if weights are even (never, above an ESS of `EVEN_ESS`) or half so; and to be
    above 0, so that there is a heavy tail at all, where the ESS is below `ESS_LOW` and `k` itself above the limit of
    reliable estimates.

    Args:
        k: of the weights.
        size: responses in E; where it is not known `k` is taken as it is.
        share: effective sample size over `size`; where it is not known only a tail without a mean invalidates.
    """
    least = k if size is None else k - ONE_SIDED * pareto_k_error(k, size)
    if least >= PARETO_K_NO_MEAN and (share is None or share < EVEN_ESS):
        return f": from {PARETO_K_NO_MEAN:g} on their mean is not finite and deltaH_true estimates nothing"
    if least > 0 and k > PARETO_K_LIMIT and share is not None and share < ESS_LOW:
        return (
            f", above {PARETO_K_LIMIT:g}, and they leave an ESS of {percent(share)} of E: a few responses decide "
            "deltaH_true"
        )
    return ""


def effective_sample_size(facts: Facts) -> Finding | None:
    """Weights so uneven that little of E is left."""
    share = ess_share(facts)
    if share is None or share >= ESS_LOW or not facts.reweighted:
        return None
    what = f"The effective sample size of E is {facts.diagnostics['ESS']:.3g} of {count_text(facts.size)} responses"
    if share < ESS_COLLAPSE or facts.diagnostics["ESS"] < ESS_LEAST:
        least = percent(ESS_COLLAPSE) if share < ESS_COLLAPSE else f"{ESS_LEAST:g}"
        return invalid(
            f"{what}, below {least}: a few responses decide deltaH_true; ",
            Remedy.SMALLER_STEP,
            ".",
        )
    return caution(
        f"{what}, below half: the step is large for reweighting; ", Remedy.SMALLER_STEP_OR_LARGER_E, "."
    )


def few_responses(facts: Facts) -> Finding | None:
    """Too few responses for an interval that relies on many."""
    drawn, different = facts.size, number(facts.diagnostics, "distinct_responses")
    prompts = number(facts.diagnostics, "prompts_E")
    effective = number(facts.diagnostics, "ESS") if facts.reweighted else None
    if different == 1 and drawn is not None and drawn > 1:
        return invalid(
            f"All {drawn:g} responses of E are the same one: what the policy says otherwise, and how often, is in no "
            "number here; raise ",
            Remedy.B_E,
            ".",
        )
    if drawn is not None and drawn < FEW_RESPONSES:
        what = f"E has {drawn:g} responses"
    elif prompts is not None and prompts < FEW_RESPONSES:
        what = f"E has {prompts:g} prompts, which are its independent units"
    elif different is not None and different < FEW_RESPONSES:
        return caution(
            f"E has only {different:g} different responses among {count_text(drawn)}: what the policy can say "
            f"but did not is in no error bar (limit {FEW_RESPONSES}); raise ",
            Remedy.B_E,
            ", or take more varied prompts.",
        )
    elif effective is not None and effective < FEW_RESPONSES:
        what = f"E is worth {effective:.3g} responses after reweighting"
    else:
        return None
    return caution(
        f"{what}: with fewer than {FEW_RESPONSES} the size of an error is itself hardly known; raise ",
        Remedy.B_E,
        ".",
    )


def cut_off(facts: Facts) -> Finding | None:
    """Many responses whose end was not seen."""
    share = number(facts.diagnostics, "truncated_fraction")
    if share is None or share <= MATERIAL:
        return None
    return caution(
        f"The token limit cut off {percent(share)} of E (limit {percent(MATERIAL)}): the entropies are those of the "
        "capped responses; raise ",
        Remedy.MAX_NEW_TOKENS,
        ".",
    )
