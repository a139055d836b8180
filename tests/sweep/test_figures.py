"""What a person sees of a sweep: nothing overprints, every point has its error, in figures of many shapes."""

from __future__ import annotations

import base64
import re

import matplotlib
import numpy as np
import pytest

from probe.errors.exceptions import LogError
from probe.sweep import Sweep, load_sweep
from probe.sweep.plots.style import make_panels, plot_style, short_names
from probe.sweep.plots.write import figures
from probe.sweep.table import build_table, write_table
from tests.support.figures import panels, unreadable, without_error
from tests.support.sweep_fakes import failed, record, table_of

LONG = "qwen2.5-1.5b-instruct-grpo-gsm8k-lora-r64-alpha128-lr1e-5-seed{}-$\\sum"
HIDDEN = {f"deltaH_true{s}{e}": None for s in ("", "_tok") for e in ("", "_se", "_ci95")}


def rates(n, low=1e-2, high=1e2):
    return [float(x) for x in np.geomspace(low, high, n)]


def named(n, **axes):
    """Checkpoints with long names and no steps."""
    return build_table(
        [
            record(eta, path=f"/runs/{LONG.format(i)}", name=LONG.format(i), step=10 * i, training_step=None)
            for i in range(n)
            for eta in axes.get("eta", [1])
        ]
    )


def some_hidden():
    return build_table(
        [
            record(eta, verdict="invalid" if i == 0 else "caution", **(HIDDEN if i % 2 else {}))
            for i, eta in enumerate(rates(8, 0.1, 10))
        ]
    )


SHAPES = {
    "two rates": lambda: table_of(eta=[1, 2]),
    "seven rates": lambda: table_of(eta=[0.125, 0.25, 0.5, 1, 2, 4, 8]),
    "forty rates over four decades": lambda: table_of(failed(3.0), eta=rates(40), B_E=[1024]),
    "ten seeds": lambda: table_of(eta=[0.25, 0.5, 1, 2], seed=range(10)),
    "two rates, ten seeds": lambda: table_of(eta=[1, 2], seed=range(10)),
    "rates beside each other": lambda: table_of(eta=[1, 1.1, 1.2], seed=[1, 2]),
    "within a decade": lambda: table_of(eta=rates(5, 0.4, 3.5)),
    "below the floor": lambda: table_of(eta=rates(9, 1e-5, 1e-1)),
    "some hidden": some_hidden,
    "forty sizes": lambda: table_of(B_E=np.unique(np.geomspace(16, 16384, 40).astype(int)).tolist()),
    "sizes beside each other": lambda: table_of(B_E=[1000, 1010, 1020, 1030, 1040, 1050, 1060]),
    "sizes, ten seeds": lambda: table_of(B_E=[64, 256, 1024], seed=range(10)),
    "three sizes": lambda: table_of(B_E=[64, 256, 1024], B_U=[4, 16, 64], G=[4, 8]),
    "two groups": lambda: table_of(G=[4, 8]),
    "forty checkpoints": lambda: table_of(step=range(10, 410, 10)),
    "two late checkpoints": lambda: build_table([record(step=i, training_step=i * 100000) for i in (1, 2)]),
    "three long names": lambda: named(3),
    "twenty long names": lambda: named(20),
    "long names and rates": lambda: named(2, eta=[0.5, 1, 2]),
    "checkpoints and many curves": lambda: table_of(step=[10, 20, 30], B_E=[64, 128, 256, 512], G=[4, 8, 16]),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def drawn(request):
    """The figures of a shape; they are drawn once."""
    with plot_style():
        found = dict(figures(SHAPES[request.param]()))
        assert found
        return {name: (figure, unreadable(figure)) for name, figure in found.items()}


def test_nothing_overprints_and_nothing_leaves_the_page(drawn):
    assert {name: wrong for name, (_, wrong) in drawn.items() if wrong} == {}


def test_every_point_has_its_error(drawn):
    for name, (figure, _) in drawn.items():
        for axis in panels(figure):
            assert axis.has_data(), name
            assert without_error(axis) == [], name


def test_every_logarithmic_axis_has_two_labels_at_least(drawn):
    for name, (figure, _) in drawn.items():
        for axis in panels(figure):
            for one in (axis.xaxis, axis.yaxis):
                low, high = one.get_view_interval()
                inside = [t for t in one.get_majorticklocs() if low <= t <= high]
                assert len(inside) >= 2 or len(axis.get_xticks()) == 1, name


def test_overprinting_would_be_seen():
    """Of the test itself: labels that meet, one that leaves the page, a legend on data, points without errors."""
    with plot_style():
        found = make_panels(1, 1, "title")
        (axis,) = found.axes[0]
        axis.plot([1, 2], [1, 2], "o", gid="bare")
        axis.set_xticks([1.0, 1.001], labels=["one label", "another one"])
        axis.legend(handles=[*axis.lines], labels=["on the data"])
        found.finish([[[]]])
        found.figure.suptitle("x" * 300)
        wrong = unreadable(found.figure)
    assert any("one label" in one and "another one" in one for one in wrong)
    assert any(one == "title leaves the page" for one in wrong)
    assert any(re.fullmatch(r"legend 0 on panel 0", one) for one in wrong)
    assert without_error(axis) == ["bare"]


def test_a_point_without_a_known_error_says_so():
    lacking = {f"deltaH_true{s}{e}": None for s in ("", "_tok") for e in ("_se", "_ci95")}
    table = build_table([record(0.5), record(1, **lacking), record(2)])
    ((_, figure),) = figures(table)
    gids = [c.lines[0].get_gid() for c in panels(figure)[0].containers]
    assert gids == ["deltaH_true:negative:resolved", "deltaH_true:negative:no_error"]


def test_names_are_short_and_told_apart():
    names = [f"/a/very/long/path/of/a/training/run/{'x' * 40}/{i}" for i in range(3)]
    assert short_names(names) == ["...0", "...1", "...2"]
    same_ends = [f"{'a' * 30}{i}{'b' * 30}" for i in range(2)]
    assert len(set(short_names(same_ends))) == 2
    assert short_names(["checkpoint-60", "checkpoint-60"]) == ["1: checkpoint-60", "2: checkpoint-60"]
    assert short_names([]) == []


def test_a_sweep_in_a_notebook(tmp_path):
    table = table_of(failed(3.0), eta=[0.5, 1, 2], seed=[1, 2])
    write_table(table, tmp_path)
    sweep = load_sweep(tmp_path)
    before = dict(matplotlib.rcParams)
    found = sweep.plot()
    assert list(found) == [name for name, _ in figures(table)] == ["eta"]
    assert dict(matplotlib.rcParams) == before
    (image,) = re.findall(r'base64,([^"]+)"', found._repr_html_())
    assert base64.b64decode(image).startswith(b"\x89PNG")
    page = sweep._repr_html_()
    assert page.count("<tr>") == 1 + 7
    assert "6 of 7 points finished" in page
    assert "trustworthy" in page
    assert "failed" in page
    row = table.iloc[0]
    assert f"{row['deltaH1_tok']:.4f}"[:6] in page


def test_a_notebook_shows_texts_as_texts():
    bad = "<script>alert(1)</script>"
    table = build_table([record(step=1, path="/runs/a", name=bad), record(step=2, path="/runs/b")])
    page = Sweep(table)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert Sweep(build_table([]))._repr_html_().count("<tr>") == 1


def test_a_folder_without_a_table_is_refused_in_one_line(tmp_path):
    with pytest.raises(LogError, match=r"expected the table of a sweep, found .*; give the --output_folder"):
        load_sweep(tmp_path)
    (tmp_path / "sweep.parquet").write_bytes(b"no table")
    with pytest.raises(LogError, match="expected the table of a sweep"):
        load_sweep(tmp_path)
