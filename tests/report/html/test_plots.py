"""Where things stand in charts."""

from __future__ import annotations

import math

import pytest
import torch

from probe.report.html.plots import Axis, Chart, Curve, CurveChart, Line, Mark, Rule


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1e-9, 3e-9),
        (0.0, 1.0),
        (-2.5, -2.4999),
        (-1e6, 1e-6),
        (0.13, 0.49),
        (-1, 1e12),
        (-1e-17, 1e-17),
        (0.43419901, 0.43419905),
    ],
)
def test_ticks_are_few_round_and_inside(low, high):
    axis = Axis(low, high)
    assert 2 <= len(axis.ticks) <= 6
    assert all(
        low <= tick <= high or math.isclose(tick, low) or math.isclose(tick, high) for tick in axis.ticks
    )
    steps = {round((b - a) / (high - low), 6) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert len(steps) == 1
    assert [at for at, _ in axis.labels] == sorted({at for at, _ in axis.labels})
    assert len({label for _, label in axis.labels}) == len(axis.ticks)
    for tick, (_, label) in zip(axis.ticks, axis.labels, strict=True):
        assert math.isclose(float(label), tick, rel_tol=1e-9, abs_tol=1e-3 * (high - low))


def test_ticks_of_any_axis():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        x = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        low, span = x[0] * 10 ** (4 * x[1]), 10 ** (5 * x[2])
        axis = Axis(low, low + span)
        if axis.high - axis.low > 1e-9 * abs(low):  # else the ticks cannot be told apart
            assert 1 <= len(axis.ticks) <= 6, axis


def test_an_axis_has_room_for_its_values():
    axis = Axis.over([-0.2, None, math.inf, math.nan, 0.5])
    assert axis.low < -0.2
    assert axis.high > 0.5
    assert Axis.over([]).at(0.0) == 50.0
    one = Axis.over([3.0])
    assert one.low < 3.0 < one.high
    assert Axis.over([3.0], with_zero=True).low < 0.0


def test_what_is_beyond_an_end_stands_at_it():
    axis = Axis(0.0, 1.0)
    assert [axis.at(x) for x in (-5.0, -math.inf, 0.25, 7.0, math.inf)] == [0.0, 0.0, 25.0, 100.0, 100.0]


def test_the_axis_of_a_chart_has_room_for_every_mark():
    chart = Chart("", ("",), [Line("a", (Mark(1.0, 0.5, 1.5), Mark(-2.0, start=-3.0)), ())])
    for x in (1.0, 0.5, 1.5, -2.0, -3.0, 0.0):
        assert 0 < chart.axis.at(x) < 100


def points(path):
    return path.count("M") + path.count("L")


def test_curves_have_gaps_where_values_are_missing():
    curve = Curve("H", "measured", [1, 2, 3, 4, 5], [0.5, 0.4, None, math.nan, 0.2])
    chart = CurveChart("", [curve])
    assert chart.path(curve).count("M") == 2
    assert points(chart.path(curve)) == 3
    assert chart.band(curve) == chart.bars(curve) == ""
    assert chart.points(curve).count("M") == 1  # the last value stands alone


def test_open_intervals_end_at_the_edge():
    low, high = [0.4, 0.3, None], [math.inf, 0.5, None]
    dots = Curve("H", "measured", [1, 2, 3], [0.45, 0.4, 0.3], low, high, dots=True)
    chart = CurveChart("", [dots])
    assert chart.up.high < 1.0
    assert chart.bars(dots).count("M") == 2
    assert chart.bars(dots).split()[1] == "V0.0"
    assert chart.points(dots).count("M") == 3
    band = Curve("H", "measured", [1, 2, 3], [0.45, 0.4, 0.3], low, high)
    assert CurveChart("", [band]).band(band).endswith("Z")


def test_thresholds_and_steps_are_on_the_chart():
    curve = Curve("H", "measured", [10, 20], [0.5, 0.4])
    chart = CurveChart("", [curve], [Rule(0.1, "collapse"), Rule(40, "alarm", upright=True)])
    assert chart.up.low < 0.1
    assert chart.across.high > 40


def test_readings_say_every_value_of_a_step():
    one = Curve("measured", "measured", [1, 3], [0.5, 0.25], [0.4, None], [0.6, None])
    other = Curve("predicted", "predicted", [1, 2], [0.125, None])
    readings = CurveChart("", [one, other]).readings
    assert [(step, words) for _, step, words in readings] == [
        (1, "step 1; measured 0.5 [0.4, 0.6]; predicted 0.125"),
        (2, "step 2"),
        (3, "step 3; measured 0.25"),
    ]


def test_of_very_many_steps_some_can_be_read():
    steps = list(range(5001))
    curve = Curve("H", "measured", steps, [0.5] * 5001)
    readings = CurveChart("", [curve]).readings
    assert 500 < len(readings) <= 1001
    assert readings[0][1] == 0
    assert readings[-1][1] == 5000


@pytest.mark.parametrize("steps", [[1], [1, 2], [5, 9], [1, 1000]])
def test_steps_are_whole_numbers(steps):
    across = CurveChart("", [Curve("H", "measured", steps, [0.5] * len(steps))]).across
    assert across.low < steps[0]
    assert steps[-1] < across.high
    assert across.ticks
    assert all(tick == round(tick) for tick in across.ticks)


def test_what_is_beyond_the_limit_is_marked():
    marks = [Mark(x) for x in (1e-4, 2e-4, -1e-4, 5e-3)]
    chart = Chart("", ("",), [Line(str(k), (mark,), ()) for k, mark in enumerate(marks)], limit=3e-4)
    assert [chart.beyond(mark) for mark in marks] == [False, False, False, True]
    assert chart.axis.at(5e-3) == 100.0
    assert chart.axis.high < 4e-4
    assert not any(Chart("", ("",), chart.lines).beyond(mark) for mark in marks)
