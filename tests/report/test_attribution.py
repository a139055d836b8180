"""Tables of an attribution and of interventions."""

from __future__ import annotations

import copy

import pytest

from probe.digits import with_error
from probe.report.attribution import attribution_tables
from probe.report.terminal import report
from tests.support.synthetic_run import as_result


def table_of(values, head):
    """The table whose first head begins so."""
    (found,) = (table for table in attribution_tables(values) if table.heads[0].startswith(head))
    return found


def with_controls(values, switched_on):
    """The same with a deltaH1 that control variates have moved, or that none have."""
    values = copy.deepcopy(dict(values))
    values["estimates"] = [
        {
            "quantity": "deltaH1",
            "estimand": "token",
            "estimator": "causal+cv" if switched_on else "causal",
            "reported": True,
        }
    ]
    values |= {"deltaH1_tok": -0.00393, "deltaH1_tok_se": 0.00012}
    values["attribution"].pop("control_variates", None)
    if switched_on:
        values["attribution"]["control_variates"] = {"deltaH1": 0.0006, "deltaH1_tok": 0.00007}
    return values


def test_a_column_of_differences_has_differences_alone(with_attribution):
    table = table_of(with_attribution, "What if?")
    base = with_attribution["what_if"]["as_it_is"]
    here, *others = table.rows
    assert here.label == "as it is"
    columns = [k for k, head in enumerate(table.heads[1:]) if "difference" in head]
    assert len(columns) == 2
    assert [here.cells[k] for k in columns] == ["", ""]
    assert all(row.cells[k] for row in others for k in columns)
    assert f"expected reward {with_error(base['deltaR1'], base['deltaR1_se'])}" in here.meaning


@pytest.mark.parametrize("controls", [True, False])
def test_the_two_values_of_the_prediction_are_told_apart_where_they_stand(with_attribution, controls):
    values = with_controls(with_attribution, controls)
    rows = {row.label: row for row in table_of(values, "Which tokens").rows}
    assert "without control variates" in rows["total"].meaning
    assert ("reported" in rows) == controls
    if controls:
        assert rows["reported"].cells[0] == "-0.00393 +/- 0.00012"
    said = table_of(values, "What if?").rows[0].meaning
    assert ("without control variates" in said and "-0.00393 +/- 0.00012" in said) == controls
    text = report(as_result(values, "step_60"), 120)
    assert ("(with them" in " ".join(text.split())) == controls


def test_what_the_optimizer_makes_of_a_difference(with_attribution):
    values = copy.deepcopy(dict(with_attribution))
    (first, second, third, *others) = values["what_if"]["interventions"]
    values["what_if"]["interventions"] = [first, second, third]
    for one, step, sums in ((first, 0.02, 0.03), (second, 0.03, 0.02), (third, -0.01, 0.02)):
        one["tokens"] = 5
        one["difference"] |= {"deltaH1_tok": step, "deltaH1_tok_se": 0.001}
        one["shortcut"] = {
            "difference": {"deltaH1_tok": sums, "deltaH1_tok_se": 0.001},
            "error": {"deltaH1_tok": sums - step},
        }
    assert others
    table = table_of(values, "Where the optimizer changes it")
    assert [row.cells[-1] for row in table.rows] == ["takes back 33 %", "adds 50 %", "turns its sign"]
    assert "P held" not in " ".join(table.heads)


def test_the_league_table_says_how_many_tokens_it_ranks_and_which_scores_are_alike(with_attribution):
    values = copy.deepcopy(dict(with_attribution))
    league = values["attribution"]["league"]
    one = next(row for row in league if row["predictor"] == "steer" and row["target"] == "state_fixed")
    one |= {"spearman": None, "spearman_ci95": None, "sign_agreement": None, "captured_top_10": 1.83e-5}
    table = table_of(values, "League table")
    alike = {row.label: row.cells for row in table.rows if row.cells[0] == "all scores alike"}
    assert alike["steer"][1:] == ("-", "< 0.1 %")
    counts = {f"{row['tokens']} tokens ranked" for row in league}
    assert {row.meaning.rpartition(", ")[2] for row in table.rows} <= counts
    # a correlation that is 0 and known to be is another thing
    one |= {"spearman": 0.0, "spearman_ci95": [-0.2, 0.2], "sign_agreement": 0.5, "captured_top_10": 0.5}
    shown = {row.cells[0] for row in table_of(values, "League table").rows if row.label == "steer"}
    assert "+0.00 [-0.20, +0.20]" in shown
    assert "all scores alike" not in shown
