"""The Kalman filter against the joint normal distribution with every step written out, and arrivals by simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from probe.forecast.arrival import AHEAD, FARTHEST, Arrival, arrival
from probe.forecast.hypotheses import Hypotheses, hypotheses
from probe.forecast.trend import (
    FIRST_DRIFT,
    FIRST_LEVEL,
    LEAST_CHANGE_ERROR,
    LEAST_LEVEL_ERROR,
    OFFSET,
    ReadingArrays,
    Trend,
    added_variance,
    fit_trend,
    split_places,
)


def one(power: float, persistence: float, wander: float, noise: float) -> Hypotheses:
    return Hypotheses(*(np.array([x]) for x in (power, persistence, wander, noise, 0.0)))


def some_readings(steps: list[int], logged: list[int], seed: int = 0) -> ReadingArrays:
    """Levels about 2, falling by 0.02 a step; `logged` are the places of levels from the training's own log."""
    rng = np.random.default_rng(seed)
    N = len(steps)
    is_logged = np.array([place in logged for place in range(N)])
    level = 2 - 0.02 * np.array(steps) + 0.05 * rng.standard_normal(N) + 0.3 * is_logged
    return ReadingArrays(
        step=np.array(steps),
        logged=is_logged,
        has_change=~is_logged,
        level=level[None],
        level_se=rng.uniform(0.02, 0.06, (1, N)),
        change=-0.02 + 0.005 * rng.standard_normal((1, N)),
        change_se=rng.uniform(0.002, 0.006, (1, N)),
    )


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize(
    "given", [one(1.0, 1.0, 0.1, 0.3), one(1.0, 0.9, 0.3, 1.5), one(1.0, 0.98, 0.0, 0.1)]
)
@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [5, 9, 9, 20, 21], [0, 3, 6, 6, 12]])
def test_the_filter_is_the_conditional_distribution_of_the_joint_normal(given, phi, steps):
    """In the coordinate `H` everything is linear: mean, covariance and likelihood have an exact answer."""
    logged = [place for place in range(1, len(steps)) if steps[place] == steps[place - 1]]
    data = some_readings(steps, logged)
    trend = fit_trend(data, given, phi)

    unit = float(data.level[0, 0])
    changes = data.change[0, data.has_change] / unit
    error = data.change_se[0, data.has_change] / unit
    size = np.sqrt(max((changes**2).mean() - 0.5 * (error**2).mean(), 0.1 * (changes**2).mean())) + 1e-9
    assert data.logged.sum() < 3  # so that they have no part in the usual step
    wander, noise = float(given.wander[0] * size) ** 2, float(given.noise[0] * size) ** 2
    rho, n = float(given.persistence[0]), steps[-1] - steps[0] + 1
    # causes: first level, first drift, changes of the drift, first noise, new noise, offset
    parts = 3 + 2 * n
    variance = np.array(
        [
            FIRST_LEVEL**2,
            (FIRST_DRIFT * size) ** 2,
            *[wander] * n,
            noise,
            *[noise * (1 - phi**2)] * n,
            OFFSET**2,
        ][: parts + 1]
    )
    level, drift, rough = (np.zeros((n + 1, parts + 1)) for _ in range(3))
    level[0, 0], drift[0, 1], rough[0, 2 + n] = 1, 1, 1
    for k in range(n):
        level[k + 1] = level[k] + drift[k] + rough[k]
        drift[k + 1] = rho * drift[k]
        drift[k + 1, 2 + k] += 1
        rough[k + 1] = phi * rough[k]
        rough[k + 1, 3 + n + k] += 1
    offset = np.zeros(parts + 1)
    offset[-1] = 1
    rows, values, errors = [], [], []
    for place, step in enumerate(steps):
        k = step - steps[0]
        rows.append(level[k] + (offset * data.level[0, place] / unit if data.logged[place] else 0))
        values.append(data.level[0, place] / unit - 1)
        errors.append((data.level_se[0, place] / unit) ** 2 + LEAST_LEVEL_ERROR**2)
        if data.has_change[place]:
            rows.append(drift[k] + rough[k])
            values.append(data.change[0, place] / unit)
            errors.append((data.change_se[0, place] / unit) ** 2 + (LEAST_CHANGE_ERROR * size) ** 2)
    design, reading = np.array(rows), np.array(values)
    state = np.array([level[n], drift[n], rough[n], offset])
    of_reading = design @ (variance[:, None] * design.T) + np.diag(errors)
    both = state @ (variance[:, None] * design.T)
    mean = both @ np.linalg.solve(of_reading, reading)
    covariance = state @ (variance[:, None] * state.T) - both @ np.linalg.solve(of_reading, both.T)
    assert trend.mean[:, 0, 0] == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert trend.covariance[:, :, 0, 0] == pytest.approx(covariance, rel=1e-4, abs=1e-9)


def test_hypotheses_are_weighed_by_the_likelihood_of_the_readings():
    """Of two alike but in their noise, by the ratio of the joint normal densities."""
    data = some_readings([0, 1, 2, 5], [])
    two = Hypotheses(*(np.array(x) for x in ([1.0, 1.0], [1.0, 1.0], [0.1, 0.1], [0.1, 1.5], [0.0, 0.0])))
    weight = fit_trend(data, two, 0.0).weight[0]

    def density(noise: float) -> float:
        unit = float(data.level[0, 0])
        changes, error = data.change[0] / unit, data.change_se[0] / unit
        size = np.sqrt((changes**2).mean() - 0.5 * (error**2).mean()) + 1e-9
        n = 6
        variance = np.array(
            [FIRST_LEVEL**2, (FIRST_DRIFT * size) ** 2, *[(0.1 * size) ** 2] * n, *[(noise * size) ** 2] * n]
        )
        level, drift = np.zeros((n + 1, 2 + 2 * n)), np.zeros((n + 1, 2 + 2 * n))
        level[0, 0], drift[0, 1] = 1, 1
        rough = np.eye(2 + 2 * n)[2 + n :]
        for k in range(n):
            level[k + 1] = level[k] + drift[k] + rough[k]
            drift[k + 1] = drift[k]
            drift[k + 1, 2 + k] += 1
        rows = [x for k in (0, 1, 2, 5) for x in (level[k], drift[k] + rough[k])]
        values = [x for j in range(4) for x in (data.level[0, j] / unit - 1, changes[j])]
        errors = [x**2 for j in range(4) for x in (data.level_se[0, j] / unit, error[j])]
        V = np.array(rows) @ (variance[:, None] * np.array(rows).T) + np.diag(errors)
        return float(-0.5 * (np.linalg.slogdet(V)[1] + np.array(values) @ np.linalg.solve(V, values)))

    ratio = np.exp(density(1.5) - density(0.1))
    assert weight[1] / weight[0] == pytest.approx(ratio, rel=1e-4)


def usual_step(data: ReadingArrays, unit: float) -> float:
    """In the coordinate `H`, where no more than two levels are logged."""
    changes = data.change[0, data.has_change] / unit
    error = data.change_se[0, data.has_change] / unit
    return float(
        np.sqrt(max((changes**2).mean() - 0.5 * (error**2).mean(), 0.1 * (changes**2).mean())) + 1e-9
    )


def written_out(
    data: ReadingArrays, given: Hypotheses, phi: float, late: int | None
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log density of the readings, mean and covariance of level, drift, noise and offset after them, in `H`.

    Args:
        data: of one training.
        given: one hypothesis of power 1.
        phi: autocorrelation of the noise.
        late: place of the reading before which drift, noise and usual step are drawn anew; None for none.
    """
    unit, steps = float(data.level[0, 0]), data.step - data.step[0]
    n, size = int(steps[-1]) + 1, usual_step(data, unit)
    start = n + 1 if late is None else int(steps[late])
    sizes = np.full(n + 1, size)
    if late is not None:
        sizes[start:] = usual_step(data.part(slice(late, None)), unit)
    kappa, nu, rho = (float(x[0]) for x in (given.wander, given.noise, given.persistence))
    # columns are causes of variance 1: first level, drift and noise, what is new in each step, offset, late first ones
    level, drift, rough = (np.zeros((n + 1, 6 + 2 * n)) for _ in range(3))
    level[0, 0], drift[0, 1], rough[0, 2] = FIRST_LEVEL, FIRST_DRIFT * size, nu * size
    for k in range(n):
        level[k + 1] = level[k] + drift[k] + rough[k]
        drift[k + 1], rough[k + 1] = rho * drift[k], phi * rough[k]
        drift[k + 1, 3 + k] += kappa * sizes[k]
        rough[k + 1, 3 + n + k] += np.sqrt(1 - phi**2) * nu * sizes[k]
        if k + 1 == start:
            drift[k + 1], rough[k + 1] = 0, 0
            drift[k + 1, -2], rough[k + 1, -1] = FIRST_DRIFT * sizes[start], nu * sizes[start]
    offset = np.zeros(6 + 2 * n)
    offset[-3] = OFFSET
    rows, values, errors = [], [], []
    for place, k in enumerate(steps):
        H = data.level[0, place] / unit
        rows.append(level[k] + (offset * H if data.logged[place] else 0))
        values.append(H - 1)
        errors.append((data.level_se[0, place] / unit) ** 2 + LEAST_LEVEL_ERROR**2)
        if data.has_change[place]:
            rows.append(drift[k] + rough[k])
            values.append(data.change[0, place] / unit)
            errors.append((data.change_se[0, place] / unit) ** 2 + (LEAST_CHANGE_ERROR * sizes[k]) ** 2)
    design, reading = np.array(rows), np.array(values)
    V = design @ design.T + np.diag(errors)
    state = np.array([level[n], drift[n], rough[n], offset])
    both = state @ design.T
    density = -0.5 * (np.linalg.slogdet(V)[1] + reading @ np.linalg.solve(V, reading))
    return (
        float(density),
        both @ np.linalg.solve(V, reading),
        state @ state.T - both @ np.linalg.solve(V, both.T),
    )


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize("given", [one(1.0, 1.0, 0.1, 0.3), one(1.0, 0.94, 0.03, 1.5)])
@pytest.mark.parametrize(
    "steps", [list(range(9)), [0, 1, 2, 5, 6, 8, 8, 9, 12], [3, 4, 9, 11, 11, 14, 20, 21, 23]]
)
def test_a_split_is_the_joint_normal_whose_drift_and_noise_are_drawn_anew(given, phi, steps):
    """Evidence, mean and covariance, with the level going on: exact for one hypothesis."""
    logged = [place for place in range(1, len(steps)) if steps[place] == steps[place - 1]]
    data = some_readings(steps, logged)
    data.change[:, -3:] *= 0.2  # the late segment has a usual step of its own
    late = int(np.flatnonzero(data.has_change)[-3])
    trend = fit_trend(data, given, phi, splits={3: 0.25})
    whole, split = (written_out(data, given, phi, place) for place in (None, late))
    weight = trend.weight[0]
    assert np.log(weight[1] / weight[0]) == pytest.approx(np.log(0.25) + split[0] - whole[0], rel=1e-4)
    for place, (_, mean, covariance) in enumerate((whole, split)):
        assert trend.mean[:, 0, place] == pytest.approx(mean, rel=1e-4, abs=1e-7)
        assert trend.covariance[:, :, 0, place] == pytest.approx(covariance, rel=1e-3, abs=1e-8)


def test_splits_need_readings_before_them():
    for count, places in ((11, {}), (12, {4: 0.1}), (20, {12: 0.1, 4: 0.1})):
        data = some_readings(list(range(count)), [])
        assert split_places(data, {16: 0.1, 8: 0.1}) == places


def test_after_a_split_level_and_weight_are_those_of_all_hypotheses_together():
    """A reading that nothing could foretell better or worse: the split has its prior weight, the level its mean."""
    data = some_readings(list(range(12)), [])
    data.change_se[:, -8:], data.level_se[:, -8:] = 1e6, 1e6
    given = hypotheses()
    split, whole = fit_trend(data, given, 0.0, splits={8: 0.1}), fit_trend(data, given, 0.0, splits={})
    G = len(given.power)
    assert split.weight[0, G:].sum() == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert len(split.given.power) == 2 * G
    early = fit_trend(data.part(slice(0, 4)), given, 0.0, splits={})
    # a split forgets the drift, so that the level stays where the early segment ends: known to some percent, and the
    # weights of the hypotheses that it is averaged with depend on the usual step a little
    for power in (0.0, 1.0):
        of = given.power == power
        ends = (early.weight[0, of] * early.mean[0, 0, of]).sum() / early.weight[0, of].sum()
        assert split.mean[0, 0, G:][of] == pytest.approx(ends, abs=0.01)
    assert split.weight[0, :G] * 1.1 == pytest.approx(whole.weight[0], rel=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_coordinates_are_inverse_to_each_other(power):
    H = np.array([[0.01], [0.7], [3.0]])
    of = hypotheses(shape=power)
    assert of.inverse(of.transform(H), 0.0) == pytest.approx(np.broadcast_to(H, (3, 80)), rel=1e-12)
    nearby = (of.transform(H * (1 + 1e-6)) - of.transform(H * (1 - 1e-6))) / (2e-6 * H)
    assert of.slope(H) == pytest.approx(nearby, rel=1e-6)


@pytest.mark.parametrize("x", [0.0, 0.5, 0.94, 1.0])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 1000])
def test_variances_by_doubling_are_those_step_by_step(x, n):
    level = both = drift = 0.0
    for _ in range(n):
        level, both, drift = level + 2 * both + drift, x * (both + drift), x * x * drift + 1
    assert [float(v) for v in added_variance(x, n)] == pytest.approx([level, both, drift], rel=1e-10)


def test_prior_probabilities_add_up_to_one():
    for shape in (None, 0.5):
        assert np.exp(hypotheses(shape).log_prior).sum() == pytest.approx(1)


@pytest.mark.parametrize("rising", [False, True])
def test_the_chance_of_lying_beyond_the_threshold_is_that_of_simulated_trainings(rising):
    given, phi, draws = one(1.0, 0.98, 0.1, 0.5), 0.5, 20_000
    rng = np.random.default_rng(0)
    covariance = np.diag([1e-4, 4e-6, 1e-5, 0.0])
    covariance[0, 1] = covariance[1, 0] = 1e-5
    mean = np.array([0.0, 0.004 if rising else -0.004, 0.001, 0.0])
    wander, noise = 1e-7, 1e-5
    trend = Trend(
        0, given, phi, np.ones((1, 1)), mean[:, None, None], covariance[:, :, None, None],
        np.full((1, 1), wander), np.full((1, 1), noise), np.ones((1, 1)),
    )  # fmt: skip
    threshold = 1.12 if rising else 0.88
    chance = arrival(trend, np.array([threshold]), rising).chance[0]
    state = rng.multivariate_normal(mean, covariance, draws)
    level, drift, rough = state[:, 0], state[:, 1], state[:, 2]
    best, checked = 0.0, 0
    for k in range(1, 201):
        level = level + drift + rough
        drift = 0.98 * drift + np.sqrt(wander) * rng.standard_normal(draws)
        rough = phi * rough + np.sqrt((1 - phi**2) * noise) * rng.standard_normal(draws)
        if k in AHEAD:
            beyond = (1 + level >= threshold) if rising else (1 + level <= threshold)
            best = max(best, float(beyond.mean()))
            # 4 standard errors of 20,000 draws, and a little more for the largest of several
            assert chance[np.flatnonzero(k == AHEAD)[0]] == pytest.approx(best, abs=0.016), k
            checked += 1
    assert checked > 30


def every_step(found: Arrival) -> np.ndarray:
    """Probability of having arrived within 0, 1, ... steps, all of them looked at."""
    beyond = [found.crossing.beyond(np.array([k])) for k in range(FARTHEST + 1)]
    return np.maximum.accumulate(np.concatenate(beyond))


@pytest.mark.parametrize(("threshold", "rising"), [(0.2, False), (1.0, False), (1.7, False), (2.2, True)])
def test_quantiles_are_those_of_every_single_step(threshold, rising):
    """A steady fall tells the time of arrival to 1 %, much less than the first steps looked at lie apart."""
    data = some_readings(list(range(40)), [])
    exact = dataclasses.replace(
        data,
        level=2 * np.exp(-0.01 * data.step)[None],
        level_se=np.full((1, 40), 1e-3),
        change=2 * np.expm1(-0.01) * np.exp(-0.01 * data.step)[None],
        change_se=np.full((1, 40), 1e-4),
    )
    found = arrival(fit_trend(exact, hypotheses(), 0.9), np.array([threshold]), rising)
    chance = every_step(found)
    for probability in (0.025, 0.3, 0.5, 0.975):
        after = int((chance >= probability).argmax())
        got = float(found.quantile(probability)[0])
        if chance[-1] < probability:
            assert got == np.inf
        else:
            share = (probability - chance[after - 1]) / (chance[after] - chance[after - 1]) if after else 1.0
            assert got == pytest.approx(after - 1 + share if after else 0.0, rel=1e-9)
    for steps in (0, 1, 7, 50, 172, 2999, 3000):
        assert found.within(steps)[0] == pytest.approx(chance[steps], abs=1e-12)
    assert found.within(50.25)[0] == pytest.approx(0.75 * chance[50] + 0.25 * chance[51], abs=1e-12)


def test_trainings_have_quantiles_of_their_own():
    data = some_readings(list(range(12)), [])
    two = dataclasses.replace(
        data,
        level=np.concatenate([data.level, 2 - 0.06 * data.step[None]]),
        level_se=np.full((2, 12), 0.02),
        change=np.full((2, 12), -0.02) * np.array([[1.0], [3.0]]),
        change_se=np.full((2, 12), 0.004),
    )
    both = arrival(fit_trend(two, hypotheses(), 0.5), np.array([0.3, 0.3]))
    for row in range(2):
        alone = dataclasses.replace(
            two, **{x: getattr(two, x)[row : row + 1] for x in ("level", "level_se", "change", "change_se")}
        )
        one_alone = arrival(fit_trend(alone, hypotheses(), 0.5), np.array([0.3]))
        for probability in (0.025, 0.5, 0.9):
            assert both.quantile(probability)[row] == pytest.approx(one_alone.quantile(probability)[0])
        assert both.within(40)[row] == pytest.approx(one_alone.within(40)[0])
    assert both.quantile(0.5)[1] < both.quantile(0.5)[0]
