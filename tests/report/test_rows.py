"""What a report says."""

from __future__ import annotations

from dataclasses import replace

from probe.report.rows import entropy_rows, estimator_rows, time_rows, trust_rows
from probe.report.terminal import report
from tests.support.synthetic_run import (
    estimate_rows,
    make_result,
    make_values,
)


def test_nulls_are_not_resolved():
    names = ("deltaH_true", "deltaH2", "eta_10", "H_upd")
    changes = {f"{name}{suffix}": None for name in names for suffix in ("", "_tok")}
    rows = {row.label: row for row in entropy_rows(make_values(**changes, deltaH_true_tok_ci95=[None, None]))}
    for label in ("H after", "deltaH_true", "deltaH2", "eta_10"):
        assert rows[label].cells == ("not resolved", "not resolved")
    rows = {row.label: row for row in trust_rows(make_values(pareto_k=None, second_order_mode=None))}
    assert rows["Pareto k"].cells == ("not fitted (limit 0.67)",)
    assert rows["second order"].cells == ("none",)


def test_every_estimator_is_shown_where_there_are_several():
    values = make_values()
    rows = estimator_rows({**values, "estimates": estimate_rows(values)})
    assert [row.label for row in rows] == [
        *("deltaH1 causal", "deltaH1 matched"),
        *("deltaH_true per_decision", "deltaH_true snis", "deltaH_true resample"),
    ]
    assert rows[1].cells == ("-0.00100 +/- 0.00040", "-0.100 +/- 0.040", "1 / 1")
    assert rows[0].meaning == "reported: by the entropy ahead"
    reported = [entry for entry in estimate_rows(values) if entry["reported"]]
    assert estimator_rows({"estimates": reported}) == []
    assert estimator_rows({}) == []
    odd = {"quantity": "deltaH1", "estimand": "token", "estimator": "new", "value": None, "se": None}
    (row,) = estimator_rows({"estimates": [odd | {"variance_ratio": None, "reported": False}]})
    assert row.cells == ("not resolved", "-", "? / -")


def test_only_what_ran_is_shown(state):
    values = {"H_orig": 1.25, "H_upd": None, "deltaH_true": None, "diagnostics": {}, "timing": {}}
    (before, after, change) = entropy_rows(values)
    assert before.cells == ("-", "1.2500")
    assert after.cells == ("-", "not resolved")
    assert change.cells == ("-", "not resolved")
    assert trust_rows({}) == []
    assert time_rows({"timing": {"total": 3.0, "load": 1.0, "sample": None}})[-1].label == "total"
    bare = replace(make_result(state), values={})
    assert report(bare) == "Entropy probe of step_60\n"
    assert "U = 3 prompts," in report(make_result(state, G=None))


def test_values_come_with_errors_and_intervals():
    rows = {row.label.strip(): row for row in entropy_rows(make_values())}
    assert rows["deltaH1"].cells == (
        "-0.00100 +/- 0.00020\n[-0.00139, -0.00061]",
        "-0.100 +/- 0.020\n[-0.139, -0.061]",
    )
    assert rows["difference"].cells[0] == "(-2.00 +/- 0.50)e-05\n[-2.98, -1.02]e-05"
    assert "same E" in rows["difference"].meaning
    assert rows["deltaH2"].cells[1] == "0.00200 +/- 0.00040"
    assert rows["spread over U"].cells == ("0.0003", "0.03")
    assert rows["eta_10"].cells == ("5e-06", "5e-06")
    old = {"deltaH1": 1.0, "deltaH_true": 0.5, "residual": 0.5}
    assert entropy_rows(old)[-1].meaning == "predicted minus measured"
