"""The summary of a training."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest

from probe.report.summary import summary_of
from tests.support.live_loops import attach, seeded, small_loop


def entry(step: int, change: float, se: float = 0.001, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "verdict": "caution",
        "H_orig_tok": 1.0 - 0.1 * step,
        "H_orig_tok_se": 0.01,
        "deltaH_true_tok": change,
        "deltaH_true_tok_ci95_low": change - 2 * se,
        "deltaH_true_tok_ci95_high": change + 2 * se,
        "cumulative_H_tok": -0.1 * step,
        "cumulative_H_tok_se": 0.014,
        "cumulative_deltaH1_tok": -0.09 * step,
        "cumulative_deltaH1_tok_se": 0.002,
        "cumulative_deltaH_true_tok": -0.11 * step,
        "cumulative_deltaH_true_tok_se": 0.003,
        **more,
    }


def test_what_a_history_comes_to():
    history = [
        entry(1, -0.05),
        entry(2, -0.01, se=0.02),  # not resolved
        entry(3, -0.20, verdict="invalid"),
        entry(4, -0.07, alarms=[4, 5]),
        entry(5, +0.03, verdict="trustworthy", outlook="flattening"),
        entry(6, -0.01),
        entry(7, -0.02, outlook="collapse in about 9 steps"),
    ]
    found = summary_of(history, steps=9, cost_share=0.048)
    assert found is not None
    assert found.worst == ((4, -0.07), (1, -0.05), (7, -0.02))
    assert found.rises == ((5, 0.03),)
    assert found.alarms == (4, 5)
    assert found.verdicts == {"trustworthy": 1, "caution": 5, "invalid": 1}
    assert found.measured == (pytest.approx(-0.77), 0.003)
    assert json.loads(json.dumps(found.as_mapping()))["steps"] == 9
    text = str(found)
    assert "7 of 9 steps probed" in text
    assert "0.300 +/- 0.010 (-67 %)" in text
    assert "step 4 (-0.07), step 1 (-0.05)" in text
    assert "alarms            step 4, step 5" in text
    assert "1 trustworthy, 5 caution, 1 invalid" in text
    assert "4.8 % of the training time" in text
    assert len(text.splitlines()) <= 15
    assert max(len(line) for line in text.splitlines()) <= 80


def test_nothing_to_sum_up_and_old_logs():
    assert summary_of([], 0, None) is None
    assert summary_of([entry(1, -0.1)], 1, None) is None
    old = [{"step": k, "H_orig_tok": 1.0} for k in (1, 2)]
    found = summary_of(old, 2, None)
    assert found is not None
    assert math.isnan(found.predicted[0])
    assert "not resolved" in str(found)
    assert "none resolved" in str(found)


def test_a_watch_says_it_once_at_the_end(caplog):
    caplog.set_level(logging.INFO)
    with seeded():
        loop = small_loop(steps=3)
        watch = attach(loop.model, loop.optimizers[0], every=1)
        assert watch.summary() is None
        loop.run()
        watch.detach()
        watch.detach()
    said = [r.getMessage() for r in caplog.records if "summary" in r.getMessage()]
    assert len(said) == 1
    assert str(watch.summary()) in said[0]
