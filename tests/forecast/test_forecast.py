"""The forecast of the steps to collapse: exact on noise-free decay, the right coverage on walks, and the alarm."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from probe.forecast.forecast import Forecast, forecast
from probe.forecast.line import fit_line
from probe.forecast.noise import Noise, student_quantile
from probe.forecast.readings import EntropyReading

RATE = -0.004


def decay(rate: float, steps: list[int], H0: float = 2.0, H_se: float = 0.0) -> list[EntropyReading]:
    """Noise-free `H0 exp(rate k)`."""
    levels = [H0 * math.exp(rate * k) for k in steps]
    return [EntropyReading(k, H, H_se, H * math.expm1(rate), 0.0) for k, H in zip(steps, levels, strict=True)]


def noisy(rates: list[float], H: float = 1.0, H_se: float = 0.0) -> list[EntropyReading]:
    """Readings at every step with these increments of log H."""
    log_levels = math.log(H) + np.cumsum([0.0, *rates[:-1]])
    return [
        EntropyReading(k, math.exp(y), H_se, math.exp(y) * math.expm1(r), 0.0)
        for k, (y, r) in enumerate(zip(log_levels, rates, strict=True))
    ]


def found(readings: list[EntropyReading], threshold: float, **settings: float | None) -> Forecast:
    """The forecast for exponential decay, unless another shape is asked for."""
    result = forecast(readings, threshold, **{"shape": 0.0, **settings})  # type: ignore[arg-type]
    assert result is not None
    return result


@pytest.mark.parametrize("steps", [[0, 1, 2], list(range(100, 110)), [0, 10, 20, 30], [3, 4, 9, 30, 31]])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exponential_decay_is_forecast_exactly(steps, momentum):
    left = 57.25
    result = found(decay(-0.01, steps), 2.0 * math.exp(-0.01 * (steps[-1] + 1 + left)), momentum=momentum)
    assert result.steps == pytest.approx(left, rel=1e-9)
    assert result.low == pytest.approx(left, rel=1e-5)
    assert result.high == pytest.approx(left, rel=1e-5)
    assert result.low <= result.steps <= result.high
    assert result.rate == pytest.approx(-0.01)
    assert result.rate_se == pytest.approx(0.0, abs=1e-12)
    level = result.H
    assert level == pytest.approx(2.0 * math.exp(-0.01 * (steps[-1] + 1)))
    assert result.expected
    assert result.readings_used == len(steps)


def test_error_of_the_level_alone():
    """Read too high by a share, `H` gives a distance too long and a relative change too small: 1 + 1 at distance 1."""
    steps = list(range(10))
    readings = [dataclasses.replace(x, H_se=0.03 * x.H) for x in decay(-0.01, steps)]
    result = found(readings, 2.0 * math.exp(-0.01 * 110))
    half_width = 2 * stats.t.ppf(0.975, 9) * 0.03 / math.sqrt(10) / 0.01
    # a little more, since ten readings with errors leave room for some noise of the steps
    assert 1 <= (result.high - result.steps) / half_width < 1.15
    assert 0.9 <= (result.steps - result.low) / half_width < 1.15


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [0, 7, 9, 30], [5, 15, 25]])
def test_line_is_the_generalised_least_squares_fit_with_every_step_written_out(phi, steps):
    """Covariances in closed form against those of the steps' own matrix."""
    rng = np.random.default_rng(len(steps))
    step, n = np.array(steps), len(steps)
    now = steps[-1] + 1
    change_variance, level_variance = rng.uniform(0.1, 1, n) * 1e-6, rng.uniform(0.1, 1, n) * 1e-4
    by_level = rng.uniform(-0.02, 0.02, n)
    increments, level = rng.normal(-0.01, 0.003, n), rng.normal(0.0, 0.01, n) - 0.01 * step
    increment_variance = change_variance + by_level**2 * level_variance
    noise = Noise(variance=4e-6, phi=phi, quantile=2.0)
    line = fit_line(step, increments, level, increment_variance, level_variance, by_level, noise)

    e = 4e-6 * phi ** np.abs(np.subtract.outer(np.arange(now), np.arange(now)))
    of = np.zeros((2 * n, now))
    design = np.zeros((2 * n, 2))
    for j, k in enumerate(steps):
        of[j, k], of[n + j, k:] = 1, -1
        design[j], design[n + j] = (1, 0), (-(now - k), 1)
    V = of @ e @ of.T + np.diag(np.concatenate([increment_variance, level_variance]))
    for j in range(n):
        V[j, n + j] = V[n + j, j] = V[j, n + j] + by_level[j] * level_variance[j]
    inverse = np.linalg.inv(V)
    covariance = np.linalg.inv(design.T @ inverse @ design)
    rate, now_level = covariance @ design.T @ inverse @ np.concatenate([increments, level])
    assert (line.rate, line.level) == (pytest.approx(rate, rel=1e-6), pytest.approx(now_level, rel=1e-6))
    found_covariance = [line.rate_variance, line.covariance, line.level_variance]
    assert found_covariance == pytest.approx([covariance[0, 0], covariance[0, 1], covariance[1, 1]], rel=1e-6)


def test_levels_tell_the_drift_where_changes_are_read_badly():
    """Errors of the rate, relative to it: of the changes alone 3 / sqrt(20) = 0.67."""
    readings, _ = walks(150, 20, 10, 0.0, noise=0.2, reading=3.0)
    errors = [found(x, 1.0, window=20).rate / RATE - 1 for x in readings]
    assert np.sqrt(np.mean(np.square(errors))) < 0.2


def test_growth_never_collapses():
    result = found(decay(0.01, list(range(10))), 0.5)
    assert (result.steps, result.low, result.high) == (math.inf, math.inf, math.inf)
    assert not result.expected


def test_constant_entropy_never_collapses():
    for change in (0.0, -0.0):
        readings = [EntropyReading(k, 1.0, 0.0, change, 0.0) for k in range(5)]
        result = found(readings, 0.5)
        assert (result.steps, result.high) == (math.inf, math.inf)
        assert result.low > 1e9


def test_unresolved_drift_has_a_lower_end_only():
    for sign in (1, -1):
        result = found(noisy([0.01 + 0.002 * sign, -0.01 + 0.002 * sign] * 5), 0.5)
        assert result.steps == (math.inf if sign > 0 else pytest.approx(math.log(2) / 0.002, rel=0.05))
        assert 0 < result.low < math.inf
        assert result.high == math.inf
        assert not result.expected  # 0.6 standard errors


def test_resolved_growth_with_large_noise_can_still_touch_a_close_threshold():
    growing = noisy([0.02, 0.05, 0.03, 0.06, 0.02, 0.05, 0.04, 0.03, 0.05, 0.02])
    H = found(growing, 0.1).H
    assert found(growing, 0.1).low == math.inf
    close = found(growing, H * 0.999)
    assert 0 < close.low < math.inf
    assert close.steps == close.high == math.inf


def test_interval_fulfils_its_definition():
    """The ends are where the distance is the quantile times the prediction error, found by search."""
    readings = noisy([-0.02, -0.01, -0.015, -0.03, -0.01, -0.02], H_se=0.02)
    result = found(readings, 0.3)
    r = np.array([-0.02, -0.01, -0.015, -0.03, -0.01, -0.02])
    e = r - r.mean()
    rho = (6 * (e[1:] @ e[:-1]) / (e @ e) + 1) / 3
    assert rho < 0  # so the noise counts as white
    level_variance = 1 / sum(x.H**2 / 0.02**2 for x in readings)
    t = np.linspace(0, 200, 400_001)
    error = stats.t.ppf(0.975, 5) * np.sqrt((t**2 / 6 + t) * e.var(ddof=1) * 1.0 + level_variance)
    # the drift's measurement error is that of H alone, of relative order 1e-3 of the increment
    inside = t[np.abs(math.log(result.H / 0.3) + r.mean() * t) <= error]
    assert result.low == pytest.approx(inside[0], rel=2e-3)
    assert result.high == pytest.approx(inside[-1], rel=2e-3)


@pytest.mark.parametrize("rate", [-0.01, 0.01])
def test_below_the_threshold_no_steps_are_left(rate):
    result = found(decay(rate, list(range(5)), H0=0.1), 0.5)
    assert (result.steps, result.low, result.high) == (0, 0, 0)


def test_level_not_resolved_from_the_threshold():
    above = found(decay(-0.01, list(range(10)), H0=1.0, H_se=0.1), 0.89)
    assert (above.low, above.steps > 0, above.high > above.steps) == (0, True, True)
    below = found(decay(-0.01, list(range(10)), H0=1.0, H_se=0.1), 0.91)
    assert (below.low, below.steps) == (0, 0)
    assert 0 < below.high < math.inf
    growing_below = found(decay(0.01, list(range(10)), H0=1.0, H_se=0.1), 1.12)
    assert (growing_below.low, growing_below.steps, growing_below.high) == (0, 0, math.inf)


def test_only_the_window_counts():
    old, new = decay(0.05, list(range(20))), decay(-0.01, list(range(20, 30)))
    assert forecast(old + new, 0.5) == forecast(new, 0.5)
    assert forecast(old + new, 0.5, window=4) == forecast(new[-4:], 0.5)
    assert found(old + new, 0.5, window=4).readings_used == 4
    assert found(old + new, 0.5, window=100).readings_used == 10  # the drift has turned
    assert found(decay(-0.01, list(range(30))), 0.5, window=100).readings_used == 30


def remedied(at: int, steps: int, noise: float = 0.1) -> list[EntropyReading]:
    """A fall of 0.008 per step that is a tenth of it from a step on."""
    rng, H, readings = np.random.default_rng(0), 0.5, []
    for k in range(steps):
        change = (-0.008 if k < at else -0.0008) * (1 + noise * rng.standard_normal())
        readings.append(EntropyReading(k, H, 0.01 * H, change, 0.02 * abs(change)))
        H += change
    return readings


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_readings_before_a_clear_change_of_the_drift_are_left_out(momentum):
    before = found(remedied(14, 14), 0.1, momentum=momentum)
    after = found(remedied(14, 18), 0.1, window=20, momentum=momentum)
    assert before.readings_used == 10
    assert after.readings_used == 4
    assert after.low > before.steps
    assert after.steps == pytest.approx(math.log(after.H / 0.1) / (0.0008 / after.H), rel=0.25)
    assert found(remedied(14, 30), 0.1, window=20, momentum=momentum).readings_used == 16


def test_noise_is_seldom_taken_for_a_change():
    readings, _ = walks(300, 20, 5, 0.5)
    kept = [found(x, 1.0, window=20, momentum=0.5).readings_used for x in readings]
    assert np.mean([n < 20 for n in kept]) < 0.03


def test_too_few_readings():
    readings = decay(-0.01, [0, 1, 2])
    assert forecast([], 0.5) is None
    assert forecast(readings[:2], 0.5) is None
    assert forecast(readings, 0.5) is not None


@pytest.mark.parametrize("field", ["H", "H_se", "change", "change_se"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_readings_that_are_not_finite_are_left_out(field, value):
    readings = decay(-0.01, list(range(6)))
    broken = dataclasses.replace(readings[3], **{field: value})
    assert forecast([*readings[:3], broken, *readings[4:]], 0.5) == forecast(readings[:3] + readings[4:], 0.5)
    assert forecast([*readings[:2], broken], 0.5) is None


def test_a_change_of_more_than_the_entropy_gives_a_finite_forecast():
    readings = [*decay(-0.01, [0, 1, 2, 3]), EntropyReading(4, 0.01, 0.001, -0.02, 0.02)]
    result = found(readings, 0.001)
    assert math.isfinite(result.rate)
    assert math.isfinite(result.rate_se)


def test_momentum_widens_the_interval():
    readings = noisy(list(-0.01 + 0.001 * np.random.default_rng(1).standard_normal(10)))
    widths = [(x := found(readings, 0.3, momentum=m)).high - x.low for m in (0.0, 0.5, 0.9)]
    assert widths[0] < widths[1] < widths[2]


def test_measurement_error_bounds_the_error_of_the_rate_from_below():
    fall = decay(-0.01, list(range(10)))
    readings = [dataclasses.replace(x, change_se=0.001 * x.H, H_se=0.05 * x.H) for x in fall]
    result = found(readings, 0.5)
    # the error of H is one of the relative change too, and ten readings leave room for some noise of the steps
    assert 1.0 <= result.rate_se / (0.001 / 0.99 / math.sqrt(10)) < 1.35


def test_invalid_input():
    readings = decay(-0.01, [0, 1, 2])
    for threshold in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold"):
            forecast(readings, threshold)
    with pytest.raises(ValueError, match="window"):
        forecast(readings, 0.5, window=2)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="momentum"):
            forecast(readings, 0.5, momentum=momentum)
    with pytest.raises(ValueError, match="increasing"):
        forecast(readings[::-1], 0.5)
    with pytest.raises(ValueError, match="increasing"):
        forecast([readings[0], *readings], 0.5)
    for H in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            forecast([*readings, EntropyReading(3, H, 0.1, 0.1, 0.1)], 0.5)
    with pytest.raises(ValueError, match="negative"):
        forecast([*readings, EntropyReading(3, 1.0, -0.1, 0.1, 0.1)], 0.5)


def test_student_quantile():
    for freedom in (2, 2.5, 3, 5.3, 9, 29, 57.6, 58, 200, 5000):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)
    for freedom in (1, 1.01, 1.1, 1.5, 1.9):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    assert student_quantile(9, 0.5) == pytest.approx(stats.t.ppf(0.75, 9), rel=1e-4)


def walks(
    repetitions: int,
    n: int,
    every: int,
    phi: float,
    noise: float = 0.5,
    horizon: int = 1200,
    seed: int = 3,
    shape: float = 0.0,
    reading: float = 0.1,
) -> tuple[list[list[EntropyReading]], np.ndarray]:
    """Random walks of `(H^shape - 1) / shape` (log for 0) to a threshold of 1 from 1 above it, and their times.

    `noise` is the step noise in units of the drift, `phi` its autocorrelation. Levels are read with 3 % error, changes
    with an error of `reading` times the mean change. A walk that does not get there within `horizon` has an
    infinite time.
    """
    rng = np.random.default_rng(seed)
    past = (n - 1) * every + 1
    e = rng.standard_normal((repetitions, past + horizon))
    for k in range(1, e.shape[1]):
        e[:, k] = phi * e[:, k - 1] + math.sqrt(1 - phi**2) * e[:, k]
    increments = RATE + noise * abs(RATE) * e
    level = np.concatenate([np.zeros((repetitions, 1)), increments.cumsum(1)], 1)
    level += 1 - level[:, [past]]
    step = np.arange(n) * every
    inverse = np.exp if shape == 0 else lambda y: (1 + shape * y) ** (1 / shape)
    H = inverse(level[:, step])
    change_se = reading * abs(RATE) * H ** (1 - shape)
    change = inverse(level[:, step + 1]) - H + change_se * rng.standard_normal(H.shape)
    read = H * np.exp(0.03 * rng.standard_normal(H.shape))
    future = level[:, past:]
    after = (future <= 0).argmax(1)
    row = np.arange(repetitions)
    crossing = after - future[row, after] / (future[row, after] - future[row, after - 1])
    time = np.where(after > 0, crossing, math.inf)
    readings = [
        [
            EntropyReading(int(k), float(x), 0.03 * float(x), float(c), float(s))
            for k, x, c, s in zip(step, read[i], change[i], change_se[i], strict=True)
        ]
        for i in range(repetitions)
    ]
    return readings, time


def coverage(readings: list[list[EntropyReading]], time: np.ndarray, momentum: float = 0.0) -> float:
    forecasts = [found(x, 1.0, momentum=momentum) for x in readings]
    return float(np.mean([x.low <= t <= x.high for x, t in zip(forecasts, time, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "every", "phi", "momentum", "least"),
    [
        (10, 1, 0.0, 0.0, 0.93),
        (10, 5, 0.0, 0.0, 0.93),
        (4, 5, 0.0, 0.0, 0.93),
        # readings too close together to show their dependence: about 85 to 90 %
        (10, 1, 0.5, 0.0, 0.82),
        (10, 1, 0.5, 0.5, 0.93),
        (10, 5, 0.5, 0.0, 0.93),
        # Adam's momentum, told
        (10, 1, 0.9, 0.9, 0.93),
        (10, 10, 0.9, 0.9, 0.93),
    ],
)
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_interval_covers_the_time_of_collapse(n, every, phi, momentum, least, noise):
    readings, time = walks(800, n, every, phi, noise)
    assert least <= coverage(readings, time, momentum) <= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("reading", [0.3, 1.0])
@pytest.mark.parametrize(("n", "every"), [(10, 1), (10, 5)])
def test_interval_covers_where_changes_are_read_as_badly_as_they_scatter(n, every, reading):
    """What is left of the scatter, when the errors of reading are taken off, is not taken for 0 by chance."""
    readings, time = walks(400, n, every, 0.9, reading=reading)
    assert coverage(readings, time, momentum=0.9) >= 0.93


def test_forecasts_are_not_biased_and_the_interval_is_not_vacuous():
    readings, time = walks(150, 20, 5, 0.0)
    forecasts = [found(x, 1.0, window=20) for x in readings]
    assert np.mean([x.expected for x in forecasts]) > 0.95
    assert np.median([x.steps / t for x, t in zip(forecasts, time, strict=True)]) == pytest.approx(
        1, abs=0.05
    )
    # the rate of 20 readings has a relative error of 0.5 / sqrt(20) = 11 %
    assert np.median([(x.high - x.low) / x.steps for x in forecasts]) < 0.9


@pytest.mark.parametrize("shape", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_of_any_shape_is_forecast_exactly(shape, momentum):
    """`H^p` falls along a straight line: the level and the time are exact, and the interval is tight."""
    slope, left = -0.002, 61.5
    levels = [(1 + slope * k) ** (1 / shape) for k in range(11)]
    readings = [EntropyReading(k, levels[k], 0.0, levels[k + 1] - levels[k], 0.0) for k in range(10)]
    threshold = (1 + slope * (10 + left)) ** (1 / shape)
    result = found(readings, threshold, shape=shape, momentum=momentum)
    assert result.steps == pytest.approx(left, rel=1e-8)
    assert (result.low, result.high) == (pytest.approx(left, rel=1e-4), pytest.approx(left, rel=1e-4))
    assert pytest.approx(levels[10]) == result.H
    used = np.diff(np.log(levels))[
        -result.readings_used :
    ]  # without noise the slightest change is a clear one
    assert result.rate == pytest.approx(used.mean(), rel=1e-3)


def test_without_a_shape_the_interval_holds_all_of_them():
    readings = noisy([-0.02, -0.01, -0.015, -0.03, -0.01, -0.02], H_se=0.02)
    result = found(readings, 0.3, shape=None)
    of = [found(readings, 0.3, shape=shape) for shape in (0.0, 0.5, 1.0)]
    assert result.low == min(x.low for x in of) == of[2].low
    assert result.high == max(x.high for x in of) == of[0].high
    assert result.steps == of[1].steps
    assert (result.rate, result.rate_se) == (of[0].rate, of[0].rate_se)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_without_a_shape_the_interval_covers_exponential_and_straight_decay(shape):
    readings, time = walks(400, 20, 5, 0.5, shape=shape)
    covered = [
        x.low <= t <= x.high
        for x, t in ((found(r, 1.0, shape=None, window=20), t) for r, t in zip(readings, time, strict=True))
    ]
    assert np.mean(covered) >= 0.93


def test_linear_decay_is_forecast_too_late_far_from_the_threshold_and_in_time_close_to_it():
    c = 1e-3
    for ratio in (1.05, 1.2, 2.0, 10.0):
        readings = [EntropyReading(k, ratio + c * (3 - k), 0.0, -c, 0.0) for k in range(3)]
        expected = ratio * math.log(ratio) / (ratio - 1)
        # the levels of the three readings, slightly bent for an exponential, have a say too
        assert found(readings, 1.0).steps / ((ratio - 1) / c) == pytest.approx(expected, rel=0.05)
