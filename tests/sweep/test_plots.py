"""The plots and the summary of a sweep, from tables of known curves."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS
from probe.sweep.curves import eta_slope, reference_rows
from probe.sweep.plots.checkpoints import along
from probe.sweep.plots.write import figures, write_plots
from probe.sweep.store import SweepFolder
from probe.sweep.summary import build_summary, write_summary
from probe.sweep.table import build_table
from tests.support.figures import legend_texts, panels
from tests.support.sweep_fakes import OWN_RATE, failed, record, table_of

TOKEN, SEQUENCE = ESTIMANDS


def drawn(figure, gid):
    """The artists of that name in every panel of a figure."""
    return [[artist for artist in axis.findobj() if artist.get_gid() == gid] for axis in panels(figure)]


def test_only_axes_that_vary_have_plots():
    names = {
        "one point": (table_of(eta=[1]), []),
        "rates": (table_of(eta=[1, 2]), ["eta"]),
        "seeds": (table_of(seed=[1, 2]), []),
        "sizes": (table_of(B_E=[64, 256], G=[4, 8]), ["batch_size_B_E", "batch_size_G"]),
        "checkpoints": (table_of(step=[10, 20]), ["checkpoints"]),
        "a size per checkpoint": (
            table_of(step=[10, 20], B_U=[2, 4]),
            ["batch_size_B_U_checkpoint-10", "batch_size_B_U_checkpoint-20", "checkpoints"],
        ),
        "rates per size": (
            table_of(eta=[1, 2], B_E=[64, 256]),
            ["eta_B_E64", "eta_B_E256", "batch_size_B_E"],
        ),
        "only failures": (build_table([failed()]), []),
        "nothing": (build_table([]), []),
    }
    for what, (table, expected) in names.items():
        assert [name for name, _ in figures(table)] == expected, what


@pytest.fixture(scope="module")
def eta_table():
    """Rates over five decades: below the noise floor, in the linear range, and where curvature turns the sign."""
    return table_of(failed(3.0), eta=list(2.0 ** np.arange(-8, 7)), B_E=[1024])


def test_the_figure_of_learning_rates_has_what_it_should(eta_table):
    ((_, figure),) = figures(eta_table)
    assert len(panels(figure)) == 4
    upper, lower = panels(figure)[:2], panels(figure)[2:]
    assert [axis.get_title() for axis in upper] == ["per token", "per response"]
    for axis, unit in zip((*upper, *lower), ("token", "response") * 2, strict=True):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert f"nats per {unit}" in axis.get_ylabel()
    assert "learning rate" in lower[0].get_xlabel()
    counts = {gid: [len(found) for found in drawn(figure, gid)] for gid in
              ("deltaH1", "noise_floor", "eta_10", "fit", "deltaH_true:below_floor")}  # fmt: skip
    assert counts["deltaH1"] == [1, 1, 0, 0]
    assert counts["noise_floor"] == counts["eta_10"] == counts["fit"] == [1, 1, 1, 1]
    assert counts["deltaH_true:below_floor"] == [1, 1, 0, 0]
    assert "checkpoint-60, B_E = 1024" in figure.get_suptitle()
    texts = legend_texts(figure, 0)
    assert any("s = " in text and "\\pm" in text for text in texts)
    assert any("eta_{10}" in text for text in texts)
    assert any("(2 expected)" in text for text in legend_texts(figure, 2))


def test_signs_have_colours_and_unresolved_points_are_hollow(eta_table):
    ((_, figure),) = figures(eta_table)
    (negative,) = drawn(figure, "deltaH_true:negative:resolved")[0]
    (positive,) = drawn(figure, "deltaH_true:positive:resolved")[0]
    assert negative.get_color() != positive.get_color()
    assert negative.get_markerfacecolor() == negative.get_color()
    rows = eta_table[eta_table["deltaH_true_tok"] > 0]
    assert len(positive.get_xdata()) == len(rows) > 0
    hollow = [a for kind in ("negative", "positive") for a in drawn(figure, f"residual:{kind}:unresolved")[2]]
    assert hollow
    assert all(artist.get_markerfacecolor() == "white" for artist in hollow)


def test_error_bars_are_the_intervals():
    """Upside down for negative values; down to the bottom where 0 is in the interval."""
    table = table_of(eta=[0.5, 1, 16], B_E=[64])
    ((_, figure),) = figures(table)
    axis = panels(figure)[0]
    bars = [c for c in axis.containers if c.lines[0].get_gid().startswith("deltaH_true")]
    ends = {s[0][0]: (s[0][1], s[1][1]) for c in bars for s in c.lines[2][0].get_segments()}
    assert len(ends) == 3
    assert {"resolved", "unresolved"} == {c.lines[0].get_gid().split(":")[2] for c in bars}
    for _, row in table.iterrows():
        low, high = row["deltaH_true_tok_ci95_lo"], row["deltaH_true_tok_ci95_hi"]
        low, high = (low, high) if row["deltaH_true_tok"] > 0 else (-high, -low)
        bottom, top = ends[row["learning_rate"]]
        assert top == pytest.approx(high)
        if low > 0:
            assert bottom == pytest.approx(low)
        else:
            assert bottom < axis.get_ylim()[0]


def test_invalid_points_are_crossed_out_and_not_fitted():
    rows = [record(eta, noise=0.01) for eta in (0.1, 0.2, 0.4)]
    wrong = record(
        0.8, noise=0.01, verdict="invalid", deltaH_true_tok=-1.0, deltaH_true_tok_ci95=[-1.1, -0.9]
    )
    table = build_table([*rows, wrong])
    ((_, figure),) = figures(table)
    assert [len(found) for found in drawn(figure, "invalid")] == [1, 1, 1, 1]
    assert eta_slope(table, "deltaH_true", TOKEN).points == 3


@pytest.mark.parametrize("estimand", ESTIMANDS)
def test_slopes_of_known_curves(estimand):
    """First order 1, residual 2, up to the next order, which eta_10 bounds."""
    table = table_of(eta=list(np.geomspace(0.05, 5, 9)), seed=[1, 2], noise=[0.01])
    change = eta_slope(table, "deltaH_true", estimand)
    assert change.slope == pytest.approx(1, abs=0.06)
    assert change.x_max <= 0.01 * 4.2 / 60
    residual = eta_slope(table, "residual", estimand)
    assert residual.slope == pytest.approx(2, abs=0.1)
    assert residual.factors.keys() == {1, 2}


def test_larger_steps_are_fitted_where_there_are_no_others():
    few = table_of(eta=[0.01, 1, 2, 4, 16], noise=[0.01])
    assert eta_slope(few, "deltaH_true", TOKEN).x_max == pytest.approx(2 * OWN_RATE)
    none = table_of(eta=[8, 16, 32], noise=[0.01])
    assert eta_slope(none, "residual", TOKEN).points == 3


def test_values_below_the_noise_floor_are_not_fitted():
    table = table_of(eta=[1e-4, 1e-3, 1e-2, 1, 2, 4])
    assert eta_slope(table, "residual", TOKEN).x_min >= OWN_RATE


def test_the_reference_is_the_learning_rate_nearest_to_the_own_one():
    table = table_of(failed(), eta=[0.25, 0.9, 4], seed=[1, 2])
    assert list(reference_rows(table)["eta_factor"]) == [0.9, 0.9]


def test_the_figure_of_a_batch_size(tmp_path):
    table = table_of(B_E=[64, 256, 1024], seed=[1, 2, 3])
    ((_, figure),) = figures(table)
    for gid in ("deltaH_true_se", "deltaH1_se", "deltaH1_sd_U", "difference", "spread", "reference"):
        assert [len(found) for found in drawn(figure, gid)] == [1, 1], gid
    (line,) = drawn(figure, "reference")[0]
    x, y = np.log(line.get_xdata()), np.log(line.get_ydata())
    assert np.polyfit(x, y, 1)[0] == pytest.approx(-0.5)
    (errors,) = drawn(figure, "deltaH_true_se")[0]
    expected = np.sqrt((table[table["B_E"] == 64]["deltaH_true_tok_se"] ** 2).mean())
    assert errors.get_ydata()[0] == pytest.approx(expected)
    (slope,) = [
        entry for entry in build_summary(table)["batch_size_slopes"]
        if (entry["estimand"], entry["error"]) == ("token", "deltaH_true_se")
    ]  # fmt: skip
    assert slope["slope"] == pytest.approx(-0.5, abs=0.2)
    assert slope["axis"] == "B_E"


def test_two_sizes_make_curves_of_one_colour_each():
    table = table_of(B_E=[64, 256], B_U=[4, 16])
    figure = dict(figures(table))["batch_size_B_E"]
    assert [len(found) for found in drawn(figure, "deltaH1_se")] == [2, 2]
    assert {"B_U = 4", "B_U = 16"} <= set(legend_texts(figure, 0))


def test_the_figure_of_checkpoints():
    table = table_of(step=[10, 40, 20], seed=[1, 2])
    ((_, figure),) = figures(table)
    for gid, expected in (("H_orig", [1, 1, 0, 0]), ("deltaH1", [0, 0, 1, 1]), ("deltaH_true", [0, 0, 1, 1])):
        assert [len(found) for found in drawn(figure, gid)] == expected
    (line,) = drawn(figure, "H_orig")[0]
    assert list(line.get_xdata()) == [10, 20, 40]
    assert panels(figure)[2].get_xlabel() == "training step"
    assert "2 seeds" in figure.get_suptitle()


def test_seeds_are_averaged_with_their_errors():
    table = table_of(seed=[1, 2]).assign(position=0.0)
    _, (mean,), (half,) = along(table, "deltaH_true")
    assert mean == pytest.approx(table["deltaH_true"].mean())
    assert half == pytest.approx(1.96 * np.sqrt((table["deltaH_true_se"] ** 2).sum()) / 2)


def test_checkpoints_without_steps_stand_in_their_order():
    rows = [record(path=f"/runs/{name}", training_step=None) for name in ("a", "b")]
    ((_, figure),) = figures(
        build_table([{**r, "checkpoint_name": r["point"]["checkpoint"][-1]} for r in rows])
    )
    assert [label.get_text() for label in panels(figure)[2].get_xticklabels()] == ["a", "b"]
    assert panels(figure)[2].get_xlabel() == "checkpoint"


def test_checkpoints_of_the_same_name_have_files_of_their_own():
    rows = [record(eta, path=path) for path in ("/a/checkpoint-60", "/b/checkpoint-60") for eta in (1, 2)]
    names = [name for name, _ in figures(build_table(rows))]
    assert names == ["eta_checkpoint-60_0", "eta_checkpoint-60_1", "checkpoints"]


def test_parts_that_did_not_run_are_left_out():
    def without(*prefixes):
        rows = [record(eta, B_E=B_E) for eta in (1, 2) for B_E in (64, 256)]
        for row in rows:
            row["values"] = {k: v for k, v in row["values"].items() if not k.startswith(prefixes)}
        return dict(figures(build_table(rows)))

    predicted = without("deltaH_true", "residual")
    assert len(panels(predicted["eta_B_E64"])) == 2
    assert [len(found) for found in drawn(predicted["batch_size_B_E"], "deltaH1_se")] == [1, 1]
    measured = without("deltaH1", "residual", "eta_10")
    assert [len(found) for found in drawn(measured["eta_B_E64"], "deltaH1")] == [0, 0]
    one = without("deltaH1_tok", "deltaH_true_tok", "residual_tok")
    assert [axis.get_title() for axis in panels(one["eta_B_E64"])] == ["per response", ""]


def test_nothing_resolved_still_gives_a_plot():
    names = [f"deltaH_true{s}{e}" for s in ("", "_tok") for e in ("", "_se", "_ci95")]
    hidden = dict.fromkeys([*names, "residual", "residual_tok", "deltaH1", "deltaH1_tok"])
    table = build_table([record(eta, **hidden) for eta in (1, 2)])
    assert [name for name, _ in figures(table)] == []
    table = build_table([record(eta, **{k: v for k, v in hidden.items() if "H1" not in k}) for eta in (1, 2)])
    ((_, figure),) = figures(table)
    figure.draw_without_rendering()


def test_files_and_tensorboard(tmp_path):
    table = table_of(eta=[0.5, 1, 2], B_E=[64])
    folder = SweepFolder(tmp_path)
    (tmp_path / "eta_old.png").write_bytes(b"of an earlier grid")
    for _ in range(2):  # a second time replaces what is there
        (png,) = write_plots(table, folder)
    assert png == tmp_path / "eta.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 20_000
    assert not (tmp_path / "eta_old.png").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["sweep/eta"]


def test_the_summary_for_scripts(tmp_path, eta_table):
    write_summary(eta_table, tmp_path)
    summary = json.loads((tmp_path / "sweep_summary.json").read_text())
    assert summary["schema"] == "entropy-probe/sweep-summary"
    assert summary["points"] == {"finished": 15, "failed": 1}
    assert summary["verdicts"] == {"trustworthy": 15}
    assert [entry["error"] for entry in summary["failed"]] == ["no"]
    entries = {(e["estimand"], e["quantity"]): e for e in summary["eta_slopes"]}
    assert set(entries) == set(itertools.product(("token", "sequence"), ("deltaH_true", "residual")))
    entry = entries["token", "deltaH_true"]
    assert (entry["expected"], entry["noise_floor"], entry["B_E"]) == (1, 2e-5, 1024)
    assert entry["slope"] == pytest.approx(1, abs=0.1)
    assert 0 < entry["slope_se"] < 0.1
    assert summary["batch_size_slopes"] == []


def test_drawing_changes_no_settings_of_matplotlib(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_plots(table_of(eta=[1, 2]), SweepFolder(tmp_path))
    assert dict(matplotlib.rcParams) == before


def test_missing_results_are_missing_values():
    table = build_table([failed(), record()])
    assert pd.isna(table["deltaH1"][0])
    assert pd.isna(table["checkpoint_name"][0])
    assert table["error"][0] == "no"
    assert table["pareto_k_good"].dtype == "boolean"


def test_a_full_disk_under_the_plots_is_one_line_and_leaves_no_half_events_file(
    tmp_path, eta_table, monkeypatch, capsys
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    folder = SweepFolder(tmp_path)
    with pytest.raises(LogError, match=f"cannot write {tmp_path}: No space left on device; free some space"):
        write_plots(eta_table, folder)
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.rglob("events*")) == []
