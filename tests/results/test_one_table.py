"""One table of quantities: a number that is added there, and to a result, is everywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.fabric.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probe.callbacks.tensorboard import TensorBoardDiagnostics
from probe.estimand import ESTIMANDS, TOKEN, Number, PerEstimand, as_mapping, from_mapping
from probe.live.names import flat_values, scalars
from probe.logs.document import build_log, summary
from probe.report.markdown import report_markdown
from probe.report.terminal import report
from probe.results import DIAGNOSTIC_KEYS, RESULT_KEYS, ProbeResult, diagnostic_keys, keys
from probe.results.quantity import Part, Quantity, Shown
from probe.results.reference import reference_page
from probe.sweep.table import build_table, write_table
from tests.support.synthetic_run import make_module, make_runner, make_state, run_result

PAGE = Path(__file__).parents[2] / "docs" / "quantities.md"

MADE_UP = Quantity(
    "deltaH3",
    "third-order term, nats per response",
    per_token=True,
    parts=(
        Part("_se", "standard error of deltaH3, nats per response", core=True),
        Part("_ci95", "interval of deltaH3", core=True, interval=True, logged=(TOKEN,)),
    ),
    metric=9,
    core=True,
    row=Shown("deltaH3", "change", "third order: what nobody asked for"),
    live="third order of a step",
)
NUMBERS = PerEstimand(Number(0.25, 0.05, (0.1, 0.4)), Number(0.0025, 0.0005, (0.001, 0.004)))
DIAGNOSTIC = Quantity(
    "left_handed",
    "responses written with the left hand",
    core=True,
    integer=True,
    row=Shown("left hand", "count", "responses written with the left hand", of="B_E"),
)


@pytest.fixture(scope="module")
def state():
    return make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))


@pytest.fixture
def result(state, monkeypatch) -> ProbeResult:
    """Two entries in the tables, and two values in the result of a run."""
    monkeypatch.setattr(keys, "QUANTITIES", (*keys.QUANTITIES, MADE_UP))
    monkeypatch.setattr(diagnostic_keys, "DIAGNOSTICS", (*diagnostic_keys.DIAGNOSTICS, DIAGNOSTIC))
    found = run_result(state)
    changes = replace(found.changes, prediction={**found.changes.prediction, "deltaH3": NUMBERS})
    return replace(found, changes=changes, diagnostics={**found.diagnostics, "left_handed": 3})


def test_it_is_in_the_mapping(result):
    assert [result.values[key] for key in ("deltaH3", "deltaH3_tok", "deltaH3_tok_se")] == [
        0.25,
        0.0025,
        0.0005,
    ]
    assert result.values["diagnostics"]["left_handed"] == 3


def test_it_is_in_the_report(result):
    for text in (report(result), report_markdown(result)):
        assert "third order: what nobody asked for" in text.replace("&#45;", "-")
        assert "left hand" in text
    assert "deltaH3          0.00250 +/- 0.00050" in report(result)
    assert "[0.00100, 0.00400]" in report(result)
    assert re.search(r"^  left hand +3 of 6\s+responses written", report(result), re.MULTILINE)


def test_it_is_on_tensorboard(result, state, tmp_path):
    logger = TensorBoardLogger(str(tmp_path))
    runner = make_runner(state, (logger,))
    TensorBoardDiagnostics().on_report_end(runner, make_module(), result)
    assert runner.errors == []
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    prefix = "entropy_probe_prediction/deltaH3"
    tags = {f"{prefix}{ending}" for ending in ("", "_se", "_tok", "_tok_se", "_tok_ci95_low", "_ci95_high")}
    assert tags | {"entropy_probe_diagnostics/left_handed"} <= set(events.Tags()["scalars"])
    (point,) = events.Scalars(f"{prefix}_tok")
    assert point.value == pytest.approx(0.0025)


def test_it_is_in_log_and_summary(result, state):
    logs = [build_log(result, state, level) for level in ("minimal", "standard")]
    for results in (*(log["results"] for log in logs), summary(result, "standard")["results"]):
        assert results["deltaH3_tok"] == 0.0025
        assert results["deltaH3_se"] == 0.05
        assert results["deltaH3_tok_ci95"] == [0.001, 0.004]
        assert results["diagnostics"]["left_handed"] == 3


def test_it_is_in_the_table_of_a_sweep(result, tmp_path):
    point = {
        "checkpoint": "c",
        "seed": 1,
        "B_E": 6,
        "B_U": 3,
        "G": 4,
        "learning_rate": None,
        "eta_factor": 1.0,
    }
    record = {"id": "p", "status": "ok", "point": point, "G_E": 1, "values": result.values}
    table = build_table([record])
    assert table["deltaH3_tok"].tolist() == [0.0025]
    assert table[["deltaH3_tok_ci95_lo", "deltaH3_ci95_hi"]].to_numpy().tolist() == [[0.001, 0.4]]
    assert str(table["left_handed"].dtype) == "Int64"
    csv, _ = write_table(table, tmp_path)
    assert {"deltaH3", "deltaH3_tok_se", "left_handed"} <= set(csv.read_text().splitlines()[0].split(","))


def test_it_is_logged_in_a_training(result):
    logged = scalars(flat_values(result.values))
    assert logged["entropy_probe_details/deltaH3_tok"] == 0.0025
    assert logged["entropy_probe_details/deltaH3_tok_ci95_high"] == 0.004
    assert "entropy_probe_details/deltaH3_ci95_high" not in logged
    assert "entropy_probe_details/deltaH3_se" not in logged  # the main changes alone have their errors logged


def test_it_is_in_the_documentation(result):
    added = set(reference_page().splitlines()) - set(PAGE.read_text(encoding="utf-8").splitlines())
    assert added == {
        "| `deltaH3`, `deltaH3_tok` * | third-order term, nats per response |",
        "| `deltaH3_se`, `deltaH3_tok_se` * | standard error of deltaH3, nats per response |",
        "| `deltaH3_ci95`, `deltaH3_tok_ci95` * | interval of deltaH3 |",
        "| `left_handed` * | responses written with the left hand |",
    }


def test_the_reference_page_is_up_to_date():
    """To write it: python -c "from probe.results.reference import *; print(reference_page(), end='')"."""
    assert PAGE.read_text(encoding="utf-8") == reference_page()


def test_no_key_is_there_twice():
    for quantities in (keys.QUANTITIES, diagnostic_keys.DIAGNOSTICS, keys.STATISTICS):
        names = [key for one in quantities for key in one.described()]
        assert len(names) == len(set(names))
    assert len(RESULT_KEYS) == sum(len(one.described()) for one in keys.QUANTITIES)
    assert {"noise_floor", "noise_floor_tok", "ESS"} <= set(DIAGNOSTIC_KEYS)


@pytest.mark.parametrize(
    "number",
    [
        Number(0.5),
        Number(None),
        Number(0.5, 0.1),
        Number(None, 0.1, (0.3, 0.7)),
        Number(0.5, 0.1, (0.3, 0.7), 0.2),
        None,
    ],
)
def test_a_mapping_gives_the_numbers_back(number):
    both = PerEstimand(number, Number(0.1))
    assert from_mapping(as_mapping({"deltaH1": both}), "deltaH1") == both
    assert [both[estimand] for estimand in ESTIMANDS] == [Number(0.1), number]


def test_an_error_that_is_null_in_a_file_is_not_one_that_is_not_there():
    read = from_mapping({"deltaH1": 0.5, "deltaH1_se": None, "deltaH1_tok": 0.1}, "deltaH1")
    assert read.sequence is not None
    assert read.token is not None
    assert (read.sequence.null_error, read.token.null_error) == (True, False)
