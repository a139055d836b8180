"""Figures of a result and of a training."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from probe.errors.exceptions import DataError
from probe.report.drawing import pixels, showable
from probe.report.figures import (
    changes_figure,
    coupling_figure,
    league_figure,
    parts_figure,
    result_figures,
    what_if_figure,
)
from probe.report.token_figure import ShadedResponse, shaded_responses, tokens_figure
from probe.report.training_figures import forecast_figure, training_figure, training_figures


def with_interval(key, value, se):
    return {key: value, f"{key}_se": se, f"{key}_ci95": [value - 2 * se, value + 2 * se]}


def part(value, se=1e-4):
    return with_interval("deltaH1_tok", value, se)


def share(value):
    return {"value": value, "value_se": 0.01, "value_ci95": [value - 0.02, value + 0.02]}


def intervention(name, change, exact=None):
    found = {"name": name, "difference": part(change)}
    measured = {} if exact is None else {"exact": with_interval("difference_true_tok", exact, 1e-4)}
    return {**found, **measured}


@pytest.fixture
def values():
    shares = {"own": share(0.05), "response": share(0.02), "group": share(0.3), "others": share(0.63)}
    ranked = {"ranked": "contributions", "spearman_ci95": [0.3, 0.5]}
    return {
        "verdict": "trustworthy",
        "H_orig_tok": 0.5,
        **part(-0.004),
        **with_interval("deltaH1", -0.06, 0.002),
        **with_interval("deltaH_true_tok", -0.005, 1e-4),
        **with_interval("deltaH_true", -0.07, 0.002),
        **with_interval("residual_tok", 0.001, 2e-5),
        **with_interval("residual", 0.01, 2e-4),
        "attribution": {
            "momentum": part(-0.003),
            "decay": part(0.0),
            "tokens": part(-0.0015),
            "kl": part(0.0002),
            "total": part(-0.0043),
            "control_variates": {"deltaH1_tok": 0.0003},
            "by_outcome": [part(-0.001) | {"name": "right"}, part(-0.0005) | {"name": "wrong"}],
            "coupling": {"states": {"size_share": shares, "mean_share": shares}},
            "league": [
                {"predictor": "a perfect predictor", "target": "deltaH1", "spearman": 0.9, **ranked},
                {"predictor": "steer", "target": "deltaH1", "spearman": 0.4, **ranked},
            ],
        },
        "what_if": {
            "interventions": [
                intervention("clip_cov", 0.001, exact=0.0011),
                intervention("idle", 0.0),
                intervention("drop", -0.0005),
                intervention("learning_rate(factor=0.01)", 0.4),
            ]
        },
    }


def texts(figure):
    canvas = [text for axis in figure.axes for text in axis.texts]
    ticks = [label for axis in figure.axes for label in axis.get_yticklabels()]
    return [one.get_text() for one in (*canvas, *ticks)]


def test_numbers_keep_their_signs_in_small_cards(values):
    """A hyphen, or a minus that the zero line crosses, is lost there."""
    figure = changes_figure(values)
    labels = [text for axis in figure.axes for text in axis.texts if "\u00b1" in text.get_text()]
    assert labels
    assert any("\u2212" in label.get_text() for label in labels)
    lines = [
        line.get_zorder() for axis in figure.axes for line in axis.lines if set(line.get_xdata()) == {0.0}
    ]
    for label in labels:
        assert "-" not in label.get_text()
        assert label.get_bbox_patch().get_facecolor() == (1.0, 1.0, 1.0, 1.0)
        assert label.get_zorder() > min(lines)


def test_every_figure_of_a_whole_result_is_drawn(values):
    figures = result_figures(values)
    assert list(figures) == sorted(figures)
    assert next(iter(figures)) == "1_prediction_and_measurement"
    assert len(figures) == 5
    for figure in figures.values():
        image = pixels(figure)
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.min() < 100 < image.max()
        # no more white than a figure needs, and letters of a size to survive in a small card
        assert image.shape[1] <= 1200


def test_the_changes_stand_at_their_numbers_with_their_intervals(values):
    figure = changes_figure(values)
    assert figure.get_suptitle() == "trustworthy: the update lowers the entropy by 1 %"
    for axis, ending in zip(figure.axes, ("_tok", ""), strict=True):
        dots, bars = [], []
        for container in axis.containers:
            dots.append(container.lines[0].get_xdata()[0])
            ((start, end),) = [segment[:, 0] for segment in container.lines[2][0].get_segments()]
            bars.append([start, end])
        keys = [f"{name}{ending}" for name in ("deltaH1", "deltaH_true", "residual")]
        assert dots == [values[key] for key in keys]
        assert bars == [pytest.approx(values[f"{key}_ci95"]) for key in keys]
        low, high = axis.get_xlim()
        assert low < min(map(min, bars)) < 0 < high


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"verdict": "invalid"}, "invalid: do not believe these numbers"),
        ({"deltaH_true_tok_ci95": [-1.0, 1.0]}, "trustworthy: no change of the entropy is resolved"),
        ({"deltaH_true_tok": None}, "trustworthy: no change of the entropy is resolved"),
        (
            {"deltaH_true_tok": 0.01, "deltaH_true_tok_ci95": [0.009, 0.011]},
            "trustworthy: the update raises the entropy by 2 %",
        ),
    ],
)
def test_the_verdict_in_words(values, changed, title):
    assert changes_figure(values | changed).get_suptitle() == title


def test_a_prediction_alone_has_one_row(values):
    figure = changes_figure({key: x for key, x in values.items() if key.startswith("deltaH1")})
    assert [len(axis.containers) for axis in figure.axes] == [1, 1]
    assert figure.get_suptitle() == "the update lowers the entropy"


def test_what_is_not_resolved_says_so(values):
    unresolved = values | {"deltaH_true_tok": None, "deltaH_true_tok_ci95": None}
    assert " not resolved" in texts(changes_figure(unresolved))


def test_the_parts_add_up_to_deltaH1(values):  # noqa: N802
    (axis,) = parts_figure(values).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axis.patches]
    at = 0.0
    for start, width in bars[:-1]:
        assert start == pytest.approx(at)
        at += width
    assert bars[-1] == (0.0, values["deltaH1_tok"])
    assert at == pytest.approx(values["deltaH1_tok"])
    names = texts(parts_figure(values))
    assert any(name.startswith("tokens: wrong responses") for name in names)
    assert not any("decay" in name for name in names)  # exactly 0


def test_without_rewards_tokens_go_by_the_sign_of_the_advantage(values):
    del values["attribution"]["by_outcome"]
    values["attribution"]["by_advantage"] = [part(-0.0015) | {"name": "negative advantage"}]
    assert any(name.startswith("tokens: negative advantage") for name in texts(parts_figure(values)))


def test_interventions_with_what_was_measured(values):
    figure = what_if_figure(values)
    names = [name for name in texts(figure) if name]
    assert "idle" not in names
    assert "+0.4" in names  # beyond the frame, which it does not set
    (axis,) = figure.axes
    assert axis.get_xlim()[1] < 0.01
    drawn = sorted(container.lines[0].get_xdata()[0] for container in axis.containers)
    assert drawn == [-0.0005, 0.001, 0.0011]


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (changes_figure, ()),
        (parts_figure, ()),
        (what_if_figure, ()),
        (coupling_figure, ()),
        (coupling_figure, ("attribution",)),
        (league_figure, ("attribution",)),
    ],
)
def test_without_its_data_a_figure_is_refused(make, without):
    with pytest.raises(DataError, match=rf"{make.__name__}: expected .*found n"):
        make({name: {"momentum": part(1.0)} for name in without})
    assert result_figures({}) == {}


def test_figures_leave_matplotlib_alone(values):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.color": "red", "font.size": 3.0}):
        inside = dict(matplotlib.rcParams)
        reddish = pixels(changes_figure(values))
        assert dict(matplotlib.rcParams) == inside
    assert dict(matplotlib.rcParams) == before
    assert (reddish == pixels(changes_figure(values))).all()  # the user's style is not the report's


def test_figures_import_no_pyplot_and_reports_no_matplotlib():
    code = (
        "import sys, probe.report.figures, probe.report.training_figures, probe.report.token_figure, probe.live\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from probe.report.drawing import pixels\n"
        "pixels(probe.report.figures.changes_figure({'deltaH1': -1.0}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_names_of_others_are_no_formulas(values):
    values["what_if"]["interventions"][0]["name"] = r"drop($\frac{1$)"
    assert pixels(what_if_figure(values)).size


# ---------------------------------------------------------------- tokens


def test_tokens_are_shaded_by_what_they_add():
    response = ShadedResponse("response 3", [" The", " sum", "$x_1$\n", "\u4f60"], [-2e-5, 1e-5, 0.0, 1e-6])
    (axis,) = tokens_figure([response]).axes
    alphas = [patch.get_alpha() for patch in axis.patches]
    assert alphas[0] > alphas[1] > alphas[3] > alphas[2] == 0.0
    assert [patch.get_x() for patch in axis.patches] == [0, 4, 8, 14]
    colors = [patch.get_facecolor()[:3] for patch in axis.patches]
    assert colors[0] != colors[1] == colors[3]


def test_long_responses_end_with_what_is_left_out():
    response = ShadedResponse("long", ["word "] * 1000, [1e-5] * 1000)
    (axis,) = tokens_figure([response]).axes
    assert len(axis.patches) < 80
    assert axis.texts[-1].get_text().startswith(" +9")


def test_characters_that_no_font_has_are_boxes():
    assert showable("a\u4f60\x1b") == "a\ufffd\ufffd"


def test_without_an_attribution_no_token_is_shaded(state):
    assert shaded_responses(state, None) == []


# ---------------------------------------------------------------- trainings


def history(steps=12, collapse=0.2, infinite_until=4):
    rows = []
    for i in range(steps):
        level = 0.5 - 0.04 * i
        left = max((level - collapse) / 0.04, 0.0)
        entry = {"step": i + 1, "H_orig_tok": level, "H_orig_tok_se": 0.01, "collapse_entropy": collapse}
        entry |= {"explosion_entropy": 1.5, "H_predicted_tok": level - 0.01, "H_predicted_tok_se": 0.005}
        entry |= {"H_tracked_tok": level, "H_tracked_tok_se": 0.005, "outlook": "collapse in about 3 steps"}
        far = i < infinite_until
        entry |= {
            "steps_to_collapse": None if i < 2 else math.inf if far else left,
            "steps_to_collapse_low": None if i < 2 else 0.5 * left,
            "steps_to_collapse_high": None if i < 2 or far else 2 * left,
        }
        rows.append(entry)
    rows[6]["alarms"] = [7]
    return rows


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_the_entropy_of_a_training():
    figure = training_figure(history())
    (axis,) = figure.axes
    assert "alarm, step 7" in legend(figure)
    assert "collapse, 0.2" in legend(figure)
    assert not any("explosion" in name for name in legend(figure))  # far above the frame
    assert axis.get_title() == "Entropy 0.5 to 0.06 nats per token\ncollapse in about 3 steps"
    (levels,) = axis.containers
    assert list(levels.lines[0].get_ydata()) == [entry["H_orig_tok"] for entry in history()]
    segment = levels.lines[2][0].get_segments()[0][:, 1]
    assert segment == pytest.approx([0.5 - 0.0196, 0.5 + 0.0196])
    assert len(axis.collections) == 3  # the bars, and the bands of both curves
    assert pixels(figure).size


def test_a_near_explosion_is_in_the_frame():
    rows = [entry | {"explosion_entropy": 0.55} for entry in history()]
    assert "explosion, 0.55" in legend(training_figure(rows))


def test_the_forecast_against_what_came():
    figure = forecast_figure(history())
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    came = next(entry["step"] for entry in history() if entry["steps_to_collapse"] == 0)
    left = lines["what was left"]
    assert all(x + y == came for x, y in zip(left.get_xdata(), left.get_ydata(), strict=True))
    top = axis.get_ylim()[1]
    assert list(lines["beyond, or no collapse"].get_xdata()) == [3, 4]
    assert all(y > top for y in lines["forecast"].get_ydata()[:2])  # and its band is open at the top
    assert axis.get_title() == f"Forecast: collapse came at step {came}"


def test_without_a_collapse_nothing_came():
    rows = history(collapse=0.01)
    figure = forecast_figure(rows)
    assert figure.axes[0].get_title() == "Forecast: collapse not reached yet"
    assert "what was left" not in legend(figure)


def test_figures_of_trainings_need_their_data():
    assert training_figures([]) == {}
    assert list(training_figures(history()[:2])) == ["1_entropy"]
    assert list(training_figures(history())) == ["1_entropy", "2_forecast"]
    for make in (training_figure, forecast_figure):
        with pytest.raises(DataError, match=rf"{make.__name__}: expected entries with"):
            make([{"step": 1}])


def test_drawing_changes_no_history():
    rows = history()
    before = copy.deepcopy(rows)
    for figure in training_figures(rows).values():
        pixels(figure)
    assert rows == before
