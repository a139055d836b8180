"""`target_se`: probes that choose how many responses they draw."""

from __future__ import annotations

import pytest

from probe.live import WatchSettings
from probe.live.batch_size import LEAST, MOST, next_size, size_line
from probe.live.schedule import Schedule
from tests.support.helpers import said
from tests.support.live_loops import attach, seeded, small_loop


def entries(*errors, B_E=64):
    return [{"B_E": B_E, "deltaH_true_tok_se": se} for se in errors]


def test_the_size_follows_the_square_of_the_error():
    settings = WatchSettings(target_se=0.001)
    assert next_size(settings, []) == 64
    assert next_size(settings, entries(0.0015)) == 150  # 144, rounded up
    assert next_size(settings, entries(0.0015, B_E=200)) == 450  # what counts is the error of one response
    assert next_size(WatchSettings(), entries(0.0015)) == 64


def test_one_probe_of_many_does_not_decide():
    """The median of the last five that have an error."""
    settings = WatchSettings(target_se=0.001)
    usual = entries(0.0015, 0.0015, 0.0015)
    assert next_size(settings, [*usual, *entries(0.004)]) == 150
    assert next_size(settings, [*entries(*[0.004] * 9), *entries(*[0.0015] * 5)]) == 150
    unknown = [
        {"B_E": 64},
        {"B_E": 64, "deltaH_true_tok_se": 0.0},
        {"B_E": 64, "deltaH_true_tok_se": float("nan")},
    ]
    assert next_size(settings, [*usual, *unknown, *unknown]) == 150


@pytest.mark.parametrize(("se", "expected"), [(1e-9, LEAST), (1e3, MOST * 64)])
def test_the_size_has_limits(se, expected):
    assert next_size(WatchSettings(target_se=0.001), entries(se)) == expected


def test_only_another_size_is_said():
    settings = WatchSettings(target_se=0.001)
    assert size_line(settings, 64, 80) is None
    assert size_line(WatchSettings(), 64, 640) is None
    assert "B_E 16 from here on (64 before)" in size_line(settings, 64, 16)
    assert size_line(settings, 64, MOST * 64).endswith(", the most there is")


def test_the_budget_knows_what_a_larger_probe_costs():
    schedule = Schedule(every=None, budget=0.05)
    schedule.add_probe(1.0)
    schedule.add_step(45.0)
    assert schedule.due(2)
    assert not schedule.due(2, responses=256)


def test_probes_of_a_training_come_to_the_target(caplog):
    """The first probe has `B_E`; the error is brought near a target below that of the first one."""
    caplog.set_level("INFO", logger="probe")

    def run(**settings):
        with seeded():
            loop = small_loop(steps=6)
            watch = attach(loop.model, loop.optimizers[0], every=1, B_E=8, **settings)
            loop.run()
        return watch.history

    fixed = run()
    target = fixed[0]["deltaH_true_tok_se"] / 3
    found = run(target_se=target)
    assert found[0]["B_E"] == 8
    assert found[0]["deltaH_true_tok"] == fixed[0]["deltaH_true_tok"]
    assert all(16 <= entry["B_E"] <= 128 for entry in found[1:])
    errors = [entry["deltaH_true_tok_se"] for entry in found[2:]]
    assert sum(errors) / len(errors) < 2 * target
    assert {entry["B_E"] for entry in fixed} == {8}
    assert "(8 before), for a standard error of" in said(caplog)
