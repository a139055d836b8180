"""Control variates on policies of known tails: never more variance than without, and intervals that cover as well."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import probe.estimators.control_variates as module
from probe.estimators.control_variates import SMALLEST_SAMPLE, control_variates
from tests.support.exact import take_scores, take_tangents
from tests.support.experiment import Drawn, variance_ratio
from tests.support.tabular import CAP, FAMILIES, Tabular, draw, tabular

NAMES = ("causal", "per_decision")
REPETITIONS = 400
"""Of an E of `SMALLEST_SAMPLE` prompts: 10 to 20 seconds for a family."""


@functools.lru_cache
def repeated(family: str) -> tuple[Tabular, list[Drawn]]:
    """A policy, and what is made of repeated draws of the smallest E that has control variates."""
    space, g = tabular(*FAMILIES[family]), torch.Generator().manual_seed(2)
    return space, [draw(space, SMALLEST_SAMPLE, g, controls=True) for _ in range(REPETITIONS)]


def paired(
    runs: list[Drawn], number: Callable[[Drawn, str, int], float]
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """A number of every run with and without control variates, for both estimates and estimands."""
    for name, which in itertools.product(NAMES, (0, 1)):
        with_, without = (torch.tensor([number(run, n, which) for run in runs]) for n in (f"{name}+cv", name))
        yield (name, which), with_, without


@pytest.mark.parametrize("family", ["light", "low", "branch 1/50"])
def test_the_leverage_is_below_the_number_of_features_on_the_tokens_that_count_in_the_fit(
    family, monkeypatch
):
    """Equal to it without the penalty; in the fit's own weights, and not over all tokens alike."""
    space, g = tabular(*FAMILIES[family]), torch.Generator().manual_seed(3)
    rows = torch.multinomial(space.probability, 256, replacement=True, generator=g)
    old, first, psi = (
        take_scores(space.old, rows),
        take_tangents(space.first, rows),
        space.sampled_features[rows],
    )
    states, everything = module._state_features(old, torch.arange(256)), old.mask
    sums = module._FoldSums(everything.shape[1])
    sums.add(states, psi, first.logprob, module._targets(old, torch.arange(256)), everything)
    weight = (first.logprob.square() * psi.square().sum(-1))[everything]
    F, mean, own = states.shape[-1], {}, module.PENALTY
    for penalty in (own, 1e-9):
        monkeypatch.setattr(module, "PENALTY", penalty)
        precision = module._solve([sums], [], F, psi.shape[-1]).precision
        leverage = torch.einsum("bti,ij,btj->bt", states, precision, states)[everything]
        mean[penalty] = float((weight * leverage).sum() / weight.sum())
    # where few states have a weight their span is smaller than the number of features
    assert mean[1e-9] == pytest.approx(F if family != "low" else 8, rel=0.02)
    assert 2 < mean[own] < 10 < F


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_never_more_variance_than_without(family):
    """A ratio of at most 1, within four of its standard errors, for both estimates and estimands."""
    _, runs = repeated(family)
    for what, with_, without in paired(runs, lambda run, n, which: list(run.estimates[n])[which].value):
        ratio, error = variance_ratio(with_, without)
        assert ratio <= 1.0 + 4 * error, (what, ratio, error)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_intervals_cover_as_well_as_without(family):
    """At most 2 points less than without, within four standard errors of the paired difference."""
    space, runs = repeated(family)
    for what, with_, without in paired(
        runs, lambda run, n, which: float(run.covers(n, space.exact[n])[which])
    ):
        lost = without - with_
        error = float(lost.std()) / math.sqrt(len(runs))
        assert float(lost.mean()) <= 0.02 + 4 * error, (what, float(lost.mean()), error)
        if float(without.mean()) >= 0.94:
            assert float(with_.mean()) >= 0.94 - 4 * math.sqrt(0.95 * 0.05 / len(runs)), what


def test_one_response_unlike_the_others_gets_no_large_control(monkeypatch):
    """63 responses of one or two decided tokens, and one through states where no other was.

    Its control for the length, in tokens, must stay below what its scores could do with the longest response that there
    is. Without the cap on leverage it is several times that: `Q` is extrapolated.
    """
    space = tabular("low")
    usual, other = space.probability.argsort(descending=True)[:2].tolist()
    of_three = space.old.mask.sum(1) == 3
    rare = int((of_three * space.probability * space.first.logprob.square().sum(1)).argmax())
    rows = torch.tensor([usual] * 58 + [other] * 5 + [rare])
    old, first = take_scores(space.old, rows), take_tangents(space.first, rows)

    def control() -> float:
        found = control_variates(old, first, space.sampled_features[rows], torch.arange(64))
        return abs(float(found.own[-1, 1]))

    bound = float(first.logprob[-1].abs().sum()) * CAP
    assert control() < bound
    monkeypatch.setattr(module, "LARGEST_LEVERAGE", math.inf)
    assert control() > 2 * bound
