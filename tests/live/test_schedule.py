"""Which steps are probed, and what is counted as their cost."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest

from probe.live.lines import cost_line
from probe.live.schedule import Schedule
from tests.support.live_loops import attach, seeded, small_loop


@pytest.mark.parametrize(("budget", "cost", "step"), [(0.05, 3.0, 1.0), (0.5, 0.1, 1.0), (0.01, 2.0, 0.3)])
def test_probes_stay_within_the_budget(budget, cost, step):
    """With costs that vary as little as the expected one knows; the first probe is the exception."""
    schedule, probed = Schedule(None, budget), []
    for k in range(1, 20001):
        if k > 1:
            schedule.add_step(step)
        if schedule.due(k):
            schedule.add_probe(cost)
            probed.append(k)
            if len(probed) > 1:
                assert schedule.probe_seconds <= budget * schedule.train_seconds * (1 + 1e-12)
                assert schedule.share <= budget * (1 + 1e-12)
    assert probed[0] == 1
    expected = cost / (budget * step)
    assert len(probed) == pytest.approx(20000 / max(expected, 1.0), abs=2.0)  # and the budget is used
    assert schedule.interval == math.ceil(round(expected, 9)) or schedule.interval == math.ceil(expected)
    assert schedule.share_ahead <= budget * (1 + 1e-12)
    assert schedule.share_ahead == pytest.approx(cost / (schedule.interval * step))
    gaps = [b - a for a, b in pairwise(probed[2:])]
    assert max(gaps) - min(gaps) <= 1


def test_a_budget_adapts_to_costs_that_grow():
    g, schedule = random.Random(1), Schedule(None, 0.1)
    last = 0.0
    for k in range(1, 5001):
        if k > 1:
            schedule.add_step(0.5 + g.random())
        if schedule.due(k):
            last = (1.0 if k < 2500 else 4.0) * (0.8 + 0.4 * g.random())
            schedule.add_probe(last)
    # a probe can cost more than the median of the last three: by no more than one probe's worth
    assert schedule.probe_seconds <= 0.1 * schedule.train_seconds + last
    assert schedule.share == pytest.approx(0.1, abs=0.005)


def test_a_fixed_interval_and_what_is_not_known_yet():
    schedule = Schedule(3, 0.05)
    assert [k for k in range(1, 12) if schedule.due(k)] == [1, 4, 7, 10]
    assert (schedule.interval, schedule.share, schedule.share_ahead, schedule.step_seconds) == (
        3,
        None,
        None,
        None,
    )
    assert schedule.expected_cost == 0.0
    for seconds in (9.0, 1.0, 2.0):
        schedule.add_probe(seconds)
        schedule.add_step(seconds)
    assert schedule.expected_cost == 1.5  # the first one is not like the others
    assert schedule.share_ahead == pytest.approx(1.5 / (3 * 2.0))
    assert Schedule(None, 0.05).interval is None


@pytest.mark.parametrize(("bound", "probed"), [(None, [1]), (25, [1, 11]), (5, [1, 6, 11])])
def test_one_watch_with_a_budget_probes_the_first_step_and_few_others(bound, probed):
    with seeded():
        loop = small_loop(steps=12)
        watch = attach(loop.model, loop.optimizers[0], every=None, budget=1e-6, at_least_every=bound)
        loop.run()
    assert [entry["step"] for entry in watch.history] == probed
    assert watch.step == 12
    assert watch.schedule.train_seconds > 0
    assert watch.schedule.probes == len(probed)


def simulated(
    schedule: Schedule, steps: int, step: float, full: float, warm_up: float
) -> list[tuple[int, int]]:
    """Steps that are probed, each with its responses, in a training on a clock of its own."""
    probed: list[tuple[int, int]] = []
    for k in range(1, steps + 1):
        if k > 1:
            schedule.add_step(step)
        if schedule.due(k):
            size = schedule.responses
            once = 0.0 if probed else warm_up
            schedule.add_probe(once + full * (0.2 + 0.8 * size / schedule.B_E), k, size)
            probed.append((k, size))
    return probed


def test_what_happens_once_does_not_set_the_interval():
    """A first probe of 30 s, then 1 s each; a training step takes 1 s: at 5 % one in 20."""
    schedule = Schedule(None, 0.05, at_least_every=25)
    schedule.add_attaching(10.0)
    probed = [k for k, _ in simulated(schedule, 300, step=1.0, full=1.0, warm_up=29.0)]
    assert probed[1] == 11
    assert len(probed) >= 12
    assert schedule.share is not None
    assert schedule.share > 0.15  # but what it really took is reported
    late = [k for k, _ in simulated(Schedule(None, 0.05), 300, step=1.0, full=1.0, warm_up=29.0)]
    assert late == [1]


def test_e_becomes_smaller_before_probes_become_rare():
    """At full size 5 % is one probe in 40 steps."""
    schedule = Schedule(None, 0.05, B_E=64, smallest=16, at_least_every=None)
    probed = simulated(schedule, 400, step=1.0, full=2.0, warm_up=0.0)
    sizes = [size for _, size in probed]
    assert sizes[0] == 64
    assert set(sizes[1:]) == {16}
    assert len(probed) >= 400 / 20
    assert schedule.share == pytest.approx(0.05, abs=0.01)
    slow = simulated(Schedule(None, 0.05, B_E=64, smallest=16), 400, step=10.0, full=2.0, warm_up=0.0)
    assert {size for _, size in slow} == {64}  # one in four steps anyway
    fixed = simulated(Schedule(1, 0.05, B_E=64, smallest=16), 10, step=1.0, full=2.0, warm_up=0.0)
    assert {size for _, size in fixed} == {64}


def test_at_least_one_probe_in_so_many_steps_whatever_it_costs():
    schedule = Schedule(None, 0.05, B_E=64, smallest=16, at_least_every=10)
    probed = [k for k, _ in simulated(schedule, 60, step=0.1, full=2.0, warm_up=0.0)]
    assert probed == [1, 11, 21, 31, 41, 51]
    assert schedule.interval == 10
    assert schedule.share_ahead is not None
    assert schedule.share_ahead > 0.05
    assert "above the budget of 5 %, since at_least_every is 10" in cost_line(schedule, 64, 20.0, {})
    assert "one of 16 responses every 10 steps" in cost_line(schedule, 64, 20.0, {})


def test_the_probes_time_is_no_training_time(monkeypatch):
    import time

    from probe.live.step import UpdateProbe

    own = UpdateProbe.before

    def slow(self: Any, number: int) -> Any:
        time.sleep(0.2)
        return own(self, number)

    monkeypatch.setattr(UpdateProbe, "before", slow)
    with seeded():
        loop = small_loop(steps=4)
        start = time.perf_counter()
        watch = attach(loop.model, loop.optimizers[0])
        attaching = watch.schedule.probe_seconds
        assert 0 < attaching <= time.perf_counter() - start
        loop.run()
        total = time.perf_counter() - start
    probes = sum(e["seconds"] for e in watch.history)
    assert probes > 4 * 0.2
    assert watch.schedule.train_seconds + watch.schedule.probe_seconds <= total
    assert watch.schedule.probe_seconds == pytest.approx(attaching + probes)
