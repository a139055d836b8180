"""What the passes of a run cost, and what that grows with."""

from __future__ import annotations

import pytest

from probe.plan import passes
from probe.plan.passes import Cost, Pass, PassClock, cost_of


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time is set by hand: `(clock, at)`."""
    now = [0.0]
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    made = PassClock()

    def at(seconds, done, total, what, phase="prediction"):
        now[0] = seconds
        made.on_progress(None, phase, done, total, what)

    made.on_prediction_start(None, None)
    return made, at


def test_a_pass_of_one_microbatch_takes_the_time_since_the_last_one(clock):
    made, at = clock
    at(3.0, 8, 8, "forward mode on E")
    at(4.0, 8, 8, "forward mode on U")
    assert made.passes == [
        Pass("forward mode on E", "prediction", 3.0, 8),
        Pass("forward mode on U", "prediction", 1.0, 8),
    ]


def test_what_runs_before_a_pass_is_not_its_own(clock):
    """Four microbatches, one second each, after a check of ten seconds."""
    made, at = clock
    for k in range(4):
        at(11.0 + k, 2 * (k + 1), 8, "curvature on E")
    assert made.passes == [Pass("curvature on E", "prediction", 4.0, 8)]


def test_every_second_is_counted_once():
    found = cost_of(
        [
            Pass("sample E", "sample", 4.0, 24),
            Pass("sample U", "sample", 2.0, 16),
            Pass("gradient on U", "update", 3.0, 16),
            Pass("score E after the step", "ground_truth", 1.0, 24),
        ],
        {
            "demo_policy": 99.0,
            "load": 5.0,
            "sample": 6.5,
            "update": 3.5,
            "prediction": 2.0,
            "ground_truth": 1.0,
            "total": 18,
        },
    )
    assert found == Cost(passes_E=2, passes_U=2, E=7.0, U=5.5, fixed=5.5)
    assert found.seconds(1, 1) == 18.0
    assert found.seconds(3, 2) == 5.5 + 21.0 + 11.0


def test_a_pass_over_a_part_of_the_batch_does_not_grow_with_it():
    found = cost_of(
        [
            Pass("score E", "sample", 4.0, 240),
            Pass("gradient on E", "entropy_gradient", 2.0, 64),
            Pass("score E for the noise floor", "ground_truth", 1.0, 32),
            Pass("gradient on U", "update", 3.0, 16),
        ],
        {"sample": 4.0, "entropy_gradient": 2.0, "ground_truth": 1.0, "update": 3.0, "total": 10.0},
    )
    assert found == Cost(passes_E=1, passes_U=1, E=4.0, U=5.0, fixed=1.0)
