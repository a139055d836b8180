"""Errors pooled over several samples: exact cases, and coverage where single samples lack what carries the error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probe.estimators.estimate import mean_by_prompt
from probe.estimators.pooled_error import POOLED_SAMPLES, ErrorSize, pooled_error
from probe.estimators.student import student_quantile


def test_equal_sizes_keep_the_variance_and_add_their_degrees_of_freedom():
    sizes = [ErrorSize(2.0, 7.0)] * 4
    found = pooled_error(sizes[-1], sizes[:-1])
    assert found.variance == pytest.approx(2.0)
    assert found.df == pytest.approx(28.0)


def test_only_the_last_samples_count():
    old, recent = [ErrorSize(1e6, 50.0)] * 5, [ErrorSize(1.0, 50.0)] * (POOLED_SAMPLES - 1)
    assert pooled_error(ErrorSize(1.0, 50.0), old + recent).variance == pytest.approx(1.0)


@pytest.mark.parametrize(("factor", "alone"), [(1.5, False), (4.0, True)])
def test_a_larger_error_counts_alone_where_noise_does_not_explain_it(factor, alone):
    own = ErrorSize(factor, 40.0)
    found = pooled_error(own, [ErrorSize(1.0, 40.0)] * 9)
    assert (found == own) is alone
    assert found.variance == factor  # never less than its own sample says
    assert alone or found.df > 300


def test_a_smaller_error_never_counts_alone():
    found = pooled_error(ErrorSize(0.0, 63.0), [ErrorSize(1.0, 5.0)] * 9)
    assert found.variance == pytest.approx(0.9)
    assert found.df == pytest.approx(45.0)


def test_samples_without_any_error():
    found = pooled_error(ErrorSize(0.0, 3.0), [ErrorSize(0.0, 3.0)])
    assert found == ErrorSize(0.0, 6.0)


def test_an_error_that_is_not_known_stays_so():
    own = ErrorSize(math.inf, 1.0)
    assert pooled_error(own, [ErrorSize(1.0, 5.0)]) == own


def coverage(draw, exact, samples=3000):
    """Share of samples whose interval holds the exact mean: with the error of each alone, and pooled."""
    rng, earlier = np.random.default_rng(5), []
    own_hits = pooled_hits = 0
    for k in range(samples + POOLED_SAMPLES):
        own = mean_by_prompt(*draw(rng))
        size = ErrorSize(own.se**2, own.df)
        pooled = pooled_error(size, earlier)
        earlier = [*earlier, size][-POOLED_SAMPLES:]
        if k < POOLED_SAMPLES:
            continue
        miss = abs(own.value - exact)
        own_hits += miss <= student_quantile(own.df) * own.se
        pooled_hits += miss <= student_quantile(pooled.df) * math.sqrt(pooled.variance)
    return own_hits / samples, pooled_hits / samples


def sample_of(values):
    return torch.as_tensor(values), torch.arange(len(values))


@pytest.mark.parametrize("rare", [1 / 50, 1 / 200])
def test_it_covers_where_single_samples_lack_what_carries_the_error(rare):
    """One in 50 (or 200) contributes twenty times the spread of the others."""
    own, pooled = coverage(
        lambda rng: sample_of(rng.standard_normal(64) + 20 * (rng.random(64) < rare)), 20 * rare
    )
    # a sample of 64 has none of them in 27 % (73 %) of the draws
    assert own < 0.93
    assert pooled > 0.92
    assert pooled > own + 0.02


def test_light_tails_are_covered_as_before():
    own, pooled = coverage(lambda rng: sample_of(rng.standard_normal(64)), 0.0)
    assert own == pytest.approx(0.95, abs=0.015)
    assert pooled == pytest.approx(0.955, abs=0.015)
