"""The forecast of the steps to a threshold: exact where there is an exact answer, and calibrated on random walks."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from probe.forecast.forecast import ALARM_CHANCE, Forecast, forecast
from probe.forecast.readings import EntropyReading, logged_readings

RATE = -0.004


def decay(rate: float, steps: list[int], H0: float = 2.0, H_se: float = 0.0) -> list[EntropyReading]:
    """Noise-free `H0 exp(rate k)`."""
    levels = [H0 * math.exp(rate * k) for k in steps]
    return [EntropyReading(k, H, H_se, H * math.expm1(rate), 0.0) for k, H in zip(steps, levels, strict=True)]


def along(curve: list[float], reading: float = 0.0, seed: int = 0) -> list[EntropyReading]:
    """Readings at every step of a curve, with an error of the levels of `reading` and a tenth of it in the changes."""
    rng = np.random.default_rng(seed)
    return [
        EntropyReading(
            k,
            H * (1 + reading * rng.standard_normal()),
            reading * H,
            after - H + 0.1 * reading * abs(after - H) * rng.standard_normal(),
            0.1 * reading * abs(after - H),
        )
        for k, (H, after) in enumerate(itertools.pairwise(curve))
    ]


def found(readings: list[EntropyReading], threshold: float, **settings: float | None) -> Forecast:
    result = forecast(readings, threshold, **settings)  # type: ignore[arg-type]
    assert result is not None
    return result


@pytest.mark.parametrize("steps", [list(range(10)), list(range(100, 120)), list(range(0, 100, 10))])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [0.0, None])
def test_exponential_decay(steps, momentum, shape):
    left = 57.25
    result = found(
        decay(-0.01, steps), 2.0 * math.exp(-0.01 * (steps[-1] + 1 + left)), momentum=momentum, shape=shape
    )
    # a drift of 10 readings that may wander by a thirtieth of its size per step is known to some percent
    assert result.steps == pytest.approx(left, rel=0.06)
    assert 0.6 * left < result.low < left < result.high
    assert result.low <= result.steps <= result.high
    assert result.rate == pytest.approx(-0.01, rel=0.01)
    assert pytest.approx(2.0 * math.exp(-0.01 * (steps[-1] + 1)), rel=1e-3) == result.H
    assert result.readings_used == len(steps)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_straight_decay(momentum):
    curve = [1 - 0.006 * k for k in range(40)]
    result = found(along(curve), 0.1, momentum=momentum)
    assert result.steps == pytest.approx((curve[-1] - 0.1) / 0.006, rel=0.05)
    assert math.isfinite(result.high)


def test_a_fall_that_flattens_is_not_taken_for_a_collapse():
    """`0.4 + 0.6 exp(-k / 20)` with a threshold of 0.1; an exponential to 0 would be there after 46 steps."""
    curve = [0.4 + 0.6 * math.exp(-k / 20) for k in range(60)]
    for n in range(15, 55, 5):
        result = found(along(curve[:n], reading=0.02), 0.1, momentum=0.9)
        assert not result.expected, n
        assert result.high == math.inf
    result = found(along(curve[:25], reading=0.02), 0.1, momentum=0.9)
    assert result.flattening
    assert result.steps == math.inf
    assert not found(along([1.0] * 25, reading=0.02), 0.1).flattening


def test_a_fall_that_is_merely_slow_does_not_flatten():
    """0.0002 a step, 7,800 steps from the threshold."""
    curve = [2 - 0.0002 * k for k in range(60)]
    assert not found(along(curve), 0.4).flattening


def test_a_horizon_counts_to_the_farthest_step():
    """1,941 steps to the threshold of a straight line."""
    curve = [2 - 0.0008 * k for k in range(60)]
    far = found(along(curve), 0.4, horizon=3000)
    assert far.chance == far.ever > found(along(curve), 0.4, horizon=1900).chance


def test_a_fall_that_speeds_up_is_seen_in_time():
    curve = [1 - 0.9 * (k / 100) ** 2 for k in range(100)]
    at = next(n for n in range(5, 100) if found(along(curve[:n], reading=0.02), 0.1, momentum=0.9).expected)
    assert at <= 80


def test_growth_never_collapses_but_may_explode():
    growing = decay(0.01, list(range(20)))
    result = found(growing, 0.5)
    assert (result.steps, result.low, result.high) == (math.inf, math.inf, math.inf)
    assert not result.expected
    up = found(growing, 2.0 * math.exp(0.01 * 50), rising=True)
    assert up.steps == pytest.approx(30, rel=0.1)
    assert up.expected
    assert not found(growing, 2.0 * math.exp(0.01 * 200), rising=True).expected


def test_constant_entropy_never_collapses():
    for change in (0.0, -0.0):
        readings = [EntropyReading(k, 1.0, 0.0, change, 0.0) for k in range(5)]
        result = found(readings, 0.5)
        assert (result.steps, result.low, result.high) == (math.inf, math.inf, math.inf)


def test_an_entropy_that_goes_up_and_down_gives_no_upper_end():
    wave = [1 + 0.2 * math.sin(2 * math.pi * k / 30) for k in range(90)]
    for n in range(10, 90, 8):
        assert found(along(wave[:n], reading=0.02), 0.1, momentum=0.9).high == math.inf


@pytest.mark.parametrize("rate", [-0.01, 0.01])
def test_below_the_threshold_no_steps_are_left(rate):
    result = found(decay(rate, list(range(5)), H0=0.1), 0.5)
    assert (result.steps, result.low, result.high) == (0, 0, 0)
    assert result.reached
    assert result.expected
    assert found(decay(rate, list(range(5)), H0=2.0), 0.5, rising=True).reached


def test_level_not_resolved_from_the_threshold():
    above = found(decay(-0.01, list(range(10)), H0=1.0, H_se=0.1), 0.89)
    assert (above.low, above.steps > 0, above.high > above.steps) == (0, True, True)


def test_only_the_window_counts():
    old, new = decay(0.05, list(range(20))), decay(-0.01, list(range(20, 30)))
    assert forecast(old + new, 0.5, window=10) == forecast(new, 0.5, window=10)
    assert found(old + new, 0.5, window=4).readings_used == 4
    assert found(old + new, 0.5).readings_used == 30


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_after_a_remedy_the_alarm_is_calmed(momentum):
    """A fall of 0.008 per step that is a tenth of it from step 20 on; the threshold is 250 steps away then."""
    curve = [0.5 - 0.008 * min(k, 20) - 0.0008 * max(k - 20, 0) for k in range(60)]
    assert found(along(curve[:21], reading=0.02), 0.1, momentum=momentum).expected
    later = found(along(curve, reading=0.02), 0.1, momentum=momentum)
    assert later.chance < ALARM_CHANCE / 2
    assert later.low < (curve[-1] - 0.1) / 0.0008 < later.high


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_a_fall_that_has_stopped_is_found_within_ten_readings(momentum, seed):
    """By 0.012 a step for 60 steps, then by a 270th of that: a learning rate that went to next to nothing."""
    rng = np.random.default_rng(seed)
    changes = np.concatenate(
        [-0.012 + 0.003 * rng.standard_normal(60), -4.5e-5 + 1e-5 * rng.standard_normal(60)]
    )
    curve = list(1.8 + np.concatenate([[0], changes.cumsum()]))
    read = along(curve, reading=0.02, seed=seed)
    assert found(read[:60], 0.18, momentum=momentum).steps < 200
    for n in range(70, 120, 7):
        result = found(read[:n], 0.18, momentum=momentum)
        assert (result.steps, result.chance < 0.01) == (math.inf, True), n
        assert result.rate == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_fall_that_starts_is_found_within_ten_readings(momentum):
    """40 steps of nothing but noise, then 0.015 a step."""
    rng = np.random.default_rng(0)
    curve = list(1 + np.concatenate([0.003 * rng.standard_normal(40), np.full(12, -0.015)]).cumsum())
    result = found(along(curve, reading=0.02)[:50], 0.1, momentum=momentum)
    assert result.steps == pytest.approx((curve[50] - 0.1) / 0.015, rel=0.2)
    assert result.expected


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_count_from_the_current_one_whatever_the_last_reading_is_of(momentum):
    """Read up to step 29; the training is at step 45, and the threshold 60 steps after the last reading."""
    readings, threshold = decay(-0.01, list(range(30))), 2.0 * math.exp(-0.01 * 90)
    settings = {"momentum": momentum, "shape": 0.0, "horizon": 50}
    then = found(readings, threshold, **settings)
    now = found(readings, threshold, now=45, **settings)
    assert (then.step, now.step) == (29, 45)
    # rising chances to be there as time goes by: 16 steps fewer from here, the same step in the end
    assert now.steps == pytest.approx(then.steps - 16, rel=0.01)
    assert now.low == pytest.approx(then.low - 16, rel=0.02)
    assert now.chance == pytest.approx(found(readings, threshold, **{**settings, "horizon": 66}).chance)
    assert pytest.approx(2.0 * math.exp(-0.01 * 46), rel=0.01) == now.H
    assert found(readings, threshold, now=29, **settings) == then
    with pytest.raises(ValueError, match="now must not be before the last reading's step 29, but is 28"):
        forecast(readings, threshold, now=28)


def test_too_few_readings():
    readings = decay(-0.01, [0, 1, 2])
    assert forecast([], 0.5) is None
    assert forecast(readings[:2], 0.5) is None
    assert forecast(readings, 0.5) is not None
    level_only = [dataclasses.replace(x, change=None, change_se=None) for x in readings]
    assert forecast([*readings[:2], level_only[2]], 0.5) is None


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


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_entropy_does_not_matter(unit):
    rng = np.random.default_rng(3)
    curve = np.exp(np.cumsum(-0.01 + 0.005 * rng.standard_normal(30)))
    one = found(along(list(curve), reading=0.03), 0.1)
    scaled = [
        EntropyReading(x.step, unit * x.H, unit * x.H_se, unit * x.change, unit * x.change_se)
        for x in along(list(curve), reading=0.03)
    ]
    other = found(scaled, unit * 0.1)
    for name in ("steps", "low", "chance", "ever", "rate", "rate_se"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), name


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
    for shape in (-0.1, 1.1):
        with pytest.raises(ValueError, match="shape"):
            forecast(readings, 0.5, shape=shape)
    for horizon in (0, -1, math.nan, 3001, math.inf):
        with pytest.raises(ValueError, match="horizon"):
            forecast(readings, 0.5, horizon=horizon)
    with pytest.raises(ValueError, match="increasing"):
        forecast(readings[::-1], 0.5)
    with pytest.raises(ValueError, match="increasing"):
        forecast([readings[0], *readings], 0.5)
    for H in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            forecast([*readings, EntropyReading(3, H, 0.1, 0.1, 0.1)], 0.5)
    with pytest.raises(ValueError, match="negative"):
        forecast([*readings, EntropyReading(3, 1.0, -0.1, 0.1, 0.1)], 0.5)


# ---------------------------------------------------------------- levels that a training logs


def logs_of(curve: np.ndarray, factor: float, error: float, seed: int) -> list[tuple[int, float]]:
    noise = np.random.default_rng(seed).standard_normal(len(curve))
    return [
        (k, float(factor * H * (1 + error * z))) for k, (H, z) in enumerate(zip(curve, noise, strict=True))
    ]


def merged(readings: list[EntropyReading], logs: list[tuple[int, float]]) -> list[EntropyReading]:
    return sorted([*readings, *logged_readings(logs)], key=lambda one: (one.step, one.logged))


def test_the_error_of_logged_levels_is_what_they_scatter_by():
    curve = np.exp(-0.005 * np.arange(400.0))
    read = logged_readings(logs_of(curve, 1.0, 0.04, seed=1))
    # 400 differences: the median absolute deviation is known to 6 %, and neighbours share a reading
    assert read[0].H_se / read[0].H == pytest.approx(0.04, rel=0.25)
    assert logged_readings([(k, 1.0) for k in range(4)]) == []
    assert [one.step for one in logged_readings([(k, math.nan if k == 2 else 1.0) for k in range(6)])] == [
        0,
        1,
        3,
        4,
        5,
    ]


def test_logged_levels_tell_of_a_fall_between_probes_whatever_they_differ_by():
    """Probes at steps 0, 5, ... 20 while entropy is still; it falls after that, and the log alone shows it."""
    curve = np.concatenate([np.ones(21), np.exp(-0.04 * np.arange(1, 25.0))])
    rng = np.random.default_rng(0)
    probes = [
        EntropyReading(
            k,
            float(curve[k] * (1 + 0.03 * rng.standard_normal())),
            0.03,
            0.0005 * rng.standard_normal(),
            5e-4,
        )
        for k in range(0, 21, 5)
    ]
    silent = found(probes, 0.1, momentum=0.9)
    assert not silent.expected
    for factor in (0.8, 1.0, 1.25):
        told = found(merged(probes, logs_of(curve, factor, 0.02, seed=2)), 0.1, momentum=0.9)
        assert told.chance > silent.chance
        assert pytest.approx(curve[-1], rel=0.12) == told.H  # whatever the constant difference
        assert told.rate == pytest.approx(-0.04, abs=0.025)


# ---------------------------------------------------------------- in distribution


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
    correlation: float = 0.0,
) -> tuple[list[list[EntropyReading]], np.ndarray]:
    """Random walks of `(H^shape - 1) / shape` (log for 0) to a threshold of 1 from 1 above it, and their times.

    `noise` is the step noise in units of the drift, `phi` its autocorrelation. Levels are read with 3 % error, changes
    with an error of `reading` times the mean change, correlated by `correlation` with that of the level. A walk that
    does not get there within `horizon` has an infinite time.
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
    of_change, of_level = rng.standard_normal(H.shape), rng.standard_normal(H.shape)
    of_level = correlation * of_change + math.sqrt(1 - correlation**2) * of_level
    change = inverse(level[:, step + 1]) - H + change_se * of_change
    read = H * np.exp(0.03 * of_level)
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


def coverage(
    readings: list[list[EntropyReading]], time: np.ndarray, momentum: float = 0.0
) -> tuple[float, float]:
    """Share of the intervals that hold the time, and of those that end."""
    forecasts = [found(x, 1.0, momentum=momentum) for x in readings]
    held = [x.low <= t <= x.high for x, t in zip(forecasts, time, strict=True)]
    return float(np.mean(held)), float(np.mean([math.isfinite(x.high) for x in forecasts]))


@pytest.mark.parametrize(("n", "every", "phi"), [(10, 5, 0.0), (30, 5, 0.0), (30, 1, 0.9), (30, 5, 0.9)])
@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_interval_covers_the_time_of_collapse(n, every, phi, noise, shape):
    """Walks about a steady drift, in `log H` and in `H`: the simplest of what the hypotheses allow for."""
    readings, time = walks(200, n, every, phi, noise, shape=shape)
    held, _ = coverage(readings, time, momentum=phi)
    # 95 % with a standard error of 1.5 points; a steady drift is less than what the interval allows for
    assert held >= 0.95 - 3 * 0.0154


@pytest.mark.parametrize("correlation", [-0.9, 0.9])
@pytest.mark.parametrize("every", [1, 5])
def test_errors_that_level_and_change_share_leave_the_interval_covering(correlation, every):
    """Both are measured on one E; the filter takes their errors as independent."""
    readings, time = walks(200, 30, every, 0.9, 0.3, reading=1.0, correlation=correlation)
    held, _ = coverage(readings, time, momentum=0.9)
    assert held >= 0.95 - 3 * 0.0154


def test_intervals_end_where_a_fall_has_been_seen_for_long():
    readings, time = walks(100, 40, 5, 0.0, noise=0.3)
    _, ends = coverage(readings, time)
    assert ends > 0.5


def test_the_median_is_not_biased():
    readings, time = walks(200, 40, 5, 0.0, noise=0.3)
    ratio = [found(x, 1.0).steps / t for x, t in zip(readings, time, strict=True)]
    assert np.median(ratio) == pytest.approx(1, abs=0.12)


def test_noise_about_a_still_level_raises_no_alarm():
    """Less than one alarm in 100 steps was asked for; a still policy should have none in 200."""
    rng = np.random.default_rng(5)
    for seed in range(40):
        H = np.exp(0.003 * np.cumsum(rng.standard_normal(201)))
        readings = along(list(H), reading=0.05, seed=seed)[::5]
        assert not any(found(readings[:n], 0.1).expected for n in range(3, len(readings) + 1, 6))
