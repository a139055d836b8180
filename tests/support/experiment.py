"""Every estimator on one E: what tests and benchmarks of coverage and variance repeat."""

from __future__ import annotations

import math
import operator

from torch import Tensor

from probe.estimators.control_variates import EstimateOn, control_variates
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import change_by, reweighted_change
from probe.estimators.prediction import token_first_order
from probe.scoring import TokenScores
from probe.scoring.scores import TokenTangents

PREDICTIONS = ("causal", "matched", "causal+cv")
MEASUREMENTS = ("snis", "per_decision", "per_decision+cv")


def estimates_of(
    old: TokenScores, new: TokenScores, first: TokenTangents, psi: Tensor, group: Tensor, controls: bool
) -> dict[str, Estimates]:
    """Predictions, measurements and `residual`, the same-E difference of `matched` and `snis`.

    Args:
        old: scores of E with features.
        new: scores after the update.
        first: derivatives along the update, with those of expected features.
        psi: `(B, T, K)` features of the sampled tokens.
        group: `(B,)` prompts.
        controls: whether there are control variates.
    """
    found = dict(reweighted_change(old, new, group).estimates)
    found["causal"] = token_first_order(old, first, group, "causal").total
    found["matched"] = token_first_order(old, first, group, "matched").total
    found["residual"] = found["matched"].with_other(operator.sub, found["snis"])
    if not controls:
        return found
    fitted = control_variates(old, first, psi, group)
    on: dict[str, EstimateOn] = {
        "causal": lambda r: token_first_order(old.rows(r), first.rows(r), group[r]).total,
        "per_decision": lambda r: change_by("per_decision", old.rows(r), new.rows(r), group[r]),
    }
    for name, part in on.items():
        found[f"{name}+cv"] = found[name].with_other(operator.sub, fitted.shrunk(old, group, part))
    return found


def exact_values(slope: Tensor, change: Tensor) -> dict[str, list[float]]:
    """What each estimate of `estimates_of` estimates, `[sequence, token]`."""
    return {
        **dict.fromkeys(PREDICTIONS, slope.tolist()),
        **dict.fromkeys(MEASUREMENTS, change.tolist()),
        "residual": (slope - change).tolist(),
    }


def variance_ratio(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The variance of `one` over that of `other`, from paired repetitions, with its standard error.

    By the influences of the repetitions on the ratio; it sees the tails that are in the repetitions, not those that
    are not.
    """
    squares, reference = ((x.double() - x.double().mean()).square() for x in (one, other))
    ratio = float(squares.mean() / reference.mean())
    influences = (squares - ratio * reference) / reference.mean()
    return ratio, float(influences.std()) / math.sqrt(len(influences))
