"""Every estimator on one E: what tests and benchmarks of coverage and variance repeat."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.estimators.control_variates import EstimateOn, control_variates
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import change_by, reweighted_change
from probe.estimators.prediction import token_first_order
from probe.results.changes import reported
from probe.results.diagnostics import ground_truth_diagnostics
from probe.scoring import TokenScores
from probe.scoring.scores import TokenTangents
from probe.verdict.facts import Facts
from probe.verdict.verdict import judge
from probe.verdict.words import Verdict
from tests.support.exact import take_scores, take_tangents
from tests.support.intervals import Interval

PREDICTIONS = ("causal", "matched", "causal+cv")
MEASUREMENTS = ("snis", "per_decision", "per_decision+cv")


@dataclass(frozen=True)
class Scored:
    """Responses with everything that the estimators need: a whole sample space, or a pool, that E's are rows of.

    Attributes:
        old: scores, with features of states.
        new: scores after the update.
        first: derivatives along the update, with those of expected features.
        sampled_features: `psi(y)`, `(n, T, K)`.
    """

    old: TokenScores
    new: TokenScores
    first: TokenTangents
    sampled_features: Tensor

    def taken(self, rows: Tensor) -> Scored:
        """Some responses, repetitions allowed."""
        return Scored(
            take_scores(self.old, rows),
            take_scores(self.new, rows),
            take_tangents(self.first, rows),
            self.sampled_features[rows],
        )


@dataclass(frozen=True)
class Drawn:
    """What the probe makes of one E.

    Attributes:
        estimates: by name, see `estimates_of`.
        verdict: of a step whose estimates are the reported ones.
    """

    estimates: dict[str, Estimates]
    verdict: Verdict

    def covers(self, name: str, exact: list[float]) -> list[bool]:
        """Whether the intervals of an estimate hold the exact values, `[sequence, token]`."""
        return [one.holds for one in self.intervals(name, exact)]

    def intervals(self, name: str, exact: list[float]) -> list[Interval]:
        """An estimate beside the exact values, `[sequence, token]`."""
        return [Interval.of(one, truth) for one, truth in zip(self.estimates[name], exact, strict=True)]

    @property
    def reported(self) -> tuple[str, str]:
        """The names of the reported prediction and measurement."""
        ending = "+cv" if "causal+cv" in self.estimates else ""
        return f"causal{ending}", f"per_decision{ending}"


def judged(E: Scored, controls: bool) -> Drawn:
    """Estimate everything on one E, a prompt for each response, and judge.

    Args:
        E: the responses.
        controls: whether there are control variates, which the reported estimates then have.
    """
    size = len(E.old.mask)
    group = torch.arange(size)
    truth = reweighted_change(E.old, E.new, group)
    found = estimates_of(E.old, E.new, E.first, E.sampled_features, group, controls)
    ending = "+cv" if controls else ""
    names = {"deltaH1": f"causal{ending}", "deltaH_true": f"per_decision{ending}", "residual": "residual"}
    numbers = {key: found[name].map(reported) for key, name in names.items()}
    diagnostics = {**ground_truth_diagnostics(truth), "prompts_E": size}
    return Drawn(found, judge(Facts(numbers, diagnostics, size, 1e-5, len(numbers))))


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
