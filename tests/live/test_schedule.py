"""Which steps are probed, and what is counted as their cost."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest

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
    assert schedule.expected_cost == 2.0
    assert schedule.share_ahead == pytest.approx(1 / 3)
    assert Schedule(None, 0.05).interval is None


def test_one_watch_with_a_budget_probes_the_first_step_and_few_others():
    with seeded():
        loop = small_loop(steps=12)
        watch = attach(loop.model, loop.optimizers[0], every=None, budget=1e-6)
        loop.run()
    assert [entry["step"] for entry in watch.history] == [1]
    assert watch.step == 12
    assert watch.schedule.train_seconds > 0
    assert watch.schedule.probes == 1


def test_the_probes_time_is_no_training_time(monkeypatch):
    import time

    from probe.live.step import UpdateProbe

    own = UpdateProbe.before

    def slow(self: Any, number: int, B_E: int | None = None) -> Any:
        time.sleep(0.2)
        return own(self, number, B_E)

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
