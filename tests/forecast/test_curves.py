"""Cumulative sums of changes of which only some are known: exact where they can be, and right in distribution."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from probe.forecast.curves import Anchor, CumulativeSum, scatter


def test_sums_are_exact_where_every_step_is_probed():
    g = random.Random(0)
    changes = [g.gauss(0, 1) for _ in range(30)]
    sums, errors = CumulativeSum(), [g.random() for _ in range(30)]
    for k, (change, se) in enumerate(zip(changes, errors, strict=True)):
        total, found = sums.advance(k + 5, change, se)
        assert total == pytest.approx(sum(changes[:k]), abs=1e-12)
        assert found == pytest.approx(math.sqrt(sum(e**2 for e in errors[:k])), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_changes_that_are_linear_in_the_step_are_exact_at_any_spacing(seed):
    g = random.Random(seed)
    a, b, sums, steps = g.gauss(0, 1), g.gauss(0, 1), CumulativeSum(), [1]
    while steps[-1] < 60:
        steps.append(steps[-1] + g.randint(1, 9))
    for step in steps:
        total, _ = sums.advance(step, a + b * step, 0.0)
        assert total == pytest.approx(sum(a + b * k for k in range(1, step)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_the_variance_of_a_sum_is_that_of_its_weights(seed, phi):
    """Brute force: the total is linear in the changes, so its weights are its differences by them."""
    g = random.Random(seed)
    steps = [1]
    while len(steps) < 9:
        steps.append(steps[-1] + g.randint(1, 6))
    changes, errors = [g.gauss(0, 9) for _ in steps], [g.random() for _ in steps]

    def total(values: list[float]) -> float:
        sums = CumulativeSum()
        return [sums.advance(s, x, 0.0)[0] for s, x in zip(steps, values, strict=True)][-1]

    weights = [total([float(i == k) for i in range(len(steps))]) for k in range(len(steps))]
    assert sum(weights) == pytest.approx(steps[-1] - steps[0])
    between = 0.0
    for (s, a, x), (t, b, y) in pairwise(zip(steps, changes, errors, strict=True)):
        between += scatter(t - s, phi) * ((b - a) ** 2 - x**2 - y**2) / (2 * (1 - phi ** (t - s)))
    sampling = sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))
    sums = CumulativeSum()
    for s, x, e in zip(steps, changes, errors, strict=True):
        value, se = sums.advance(s, x, e, phi)
    assert between > 0
    assert value == pytest.approx(total(changes), rel=1e-12)
    assert se == pytest.approx(math.sqrt(sampling + between), rel=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("gap", [2, 3, 10])
def test_scatter_is_the_variance_of_the_interpolation_over_many_gaps(gap, phi):
    """Every weight and covariance written out."""
    gaps = 400
    steps = np.arange(gap * gaps + 1)
    weights = np.full(len(steps), -1.0)
    weights[::gap] = gap - 1
    weights[[0, -1]] = (gap - 1) / 2
    reach = int(math.log(1e-12) / math.log(phi)) if phi else 0
    total = weights @ weights
    for k in range(1, reach + 1):
        total += 2 * phi**k * (weights[k:] @ weights[:-k])
    assert scatter(gap, phi) == pytest.approx(total / gaps, rel=0.02)


def z_scores(every: int, spread: float, noise: float, phi: float = 0.0, probes: int = 40, runs: int = 400):
    """Errors of sums over their standard errors: changes scatter from step to step, and are read with noise."""
    g = np.random.default_rng(every)
    e = g.standard_normal((runs, every * probes))
    for k in range(1, e.shape[1]):
        e[:, k] = phi * e[:, k - 1] + math.sqrt(1 - phi**2) * e[:, k]
    true = 0.3 + spread * e
    read = true + noise * g.standard_normal(true.shape)
    found = []
    for row, given in zip(true, read, strict=True):
        sums = CumulativeSum()
        for k in range(0, every * probes, every):
            total, se = sums.advance(k + 1, float(given[k]), noise, phi)
        found.append((total - row[:k].sum()) / se)
    return np.array(found)


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize(
    ("every", "spread", "noise"), [(1, 1.0, 1.0), (5, 1.0, 0.0), (5, 1.0, 0.3), (20, 1.0, 0.5), (5, 0.0, 1.0)]
)
def test_errors_of_sums_in_distribution(every, spread, noise, phi):
    z = z_scores(every, spread, noise, phi)
    assert abs(z.mean()) < 3 * z.std() / math.sqrt(len(z))
    assert 0.88 < z.std() < 1.12


# ---------------------------------------------------------------- where a curve starts


@pytest.mark.parametrize("seed", range(3))
def test_the_anchor_is_the_generalised_least_squares_estimate_with_every_covariance_written_out(seed):
    """Levels minus sums have the levels' errors and those of a random walk: covariance min(V_i, V_j)."""
    rng = np.random.default_rng(seed)
    n = 12
    level_se, walked = rng.uniform(0.5, 2, n), np.concatenate([[0], rng.uniform(0, 0.5, n - 1).cumsum()])
    totals, levels = rng.normal(0, 3, n), rng.normal(0, 3, n)
    anchor = Anchor()
    for j in range(n):
        curve, se = anchor.take(levels[j], level_se[j], totals[j], math.sqrt(walked[j]))
        upto = slice(j + 1)
        V = np.minimum.outer(walked[upto], walked[upto]) + np.diag(level_se[upto] ** 2)
        weight = np.linalg.solve(V, np.ones(j + 1))
        weight /= weight.sum()
        assert anchor.value == pytest.approx(weight @ (levels - totals)[upto], rel=1e-9)
        assert curve == pytest.approx(anchor.value + totals[j], rel=1e-9)
        # the curve's error: weights times (level errors - walk), plus the walk's own to here
        joint = np.block(
            [
                [np.diag(level_se[upto] ** 2), np.zeros((j + 1, j + 1))],
                [np.zeros((j + 1, j + 1)), np.minimum.outer(walked[upto], walked[upto])],
            ]
        )
        of = np.concatenate([weight, -weight])
        of[-1] += 1
        assert se == pytest.approx(math.sqrt(of @ joint @ of), rel=1e-9)


def test_levels_without_a_finite_error_do_not_move_the_anchor():
    anchor = Anchor()
    assert anchor.take(2.0, math.inf, 0.0, 0.0) == (2.0, math.inf)
    assert anchor.take(3.0, 0.5, 0.0, 0.0) == (3.0, 0.5)
    assert anchor.take(9.0, math.inf, 1.0, 0.0) == (4.0, 0.5)


def simulated_training(
    rng: np.random.Generator, every: int, phi: float, level_se: float, change_se: float, steps: int = 100
) -> tuple[np.ndarray, list[tuple[int, float, float, float]]]:
    """Changes of all steps, and what probes read: step, level, change, its error."""
    e = rng.standard_normal(steps)
    for k in range(1, steps):
        e[k] = phi * e[k - 1] + math.sqrt(1 - phi**2) * e[k]
    changes = -0.01 + 0.01 * e
    H = 5 + np.concatenate([[0], changes.cumsum()])
    read = [
        (
            k,
            H[k] + level_se * rng.standard_normal(),
            changes[k] + change_se * rng.standard_normal(),
            change_se,
        )
        for k in range(0, steps, every)
    ]
    return changes, read


def test_curves_anchored_by_all_levels_are_nearer_to_the_truth_and_their_intervals_cover():
    rng, squares, covered = np.random.default_rng(0), [], []
    for _ in range(400):
        changes, read = simulated_training(rng, 5, 0.5, level_se=0.1, change_se=0.004)
        sums, anchor = CumulativeSum(), Anchor()
        for step, level, change, se in read:
            total, total_se = sums.advance(step, change, se, 0.5)
            curve, curve_se = anchor.take(level, 0.1, total, total_se)
        truth = 5 + changes[: read[-1][0]].sum()
        squares.append([(curve - truth) ** 2, (read[0][1] + total - truth) ** 2])
        covered.append(abs(curve - truth) <= 1.96 * curve_se)
    ours, first_alone = np.mean(squares, axis=0)
    assert ours < 0.75 * first_alone
    # 95 %, with a binomial error of 1.1 points
    assert 0.95 - 3 * 0.011 <= np.mean(covered) <= 0.95 + 3 * 0.011
