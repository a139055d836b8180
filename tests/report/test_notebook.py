"""What a notebook shows of results."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re

import matplotlib
import pytest

from probe.report.notebook import Figures, Results, ShownResult, card, html_table, result_card
from probe.report.words import answer
from probe.results.result import ProbeResult
from tests.report.html.test_pages import HOSTILE, shape
from tests.support.synthetic_run import make_result


@pytest.fixture
def values(state):
    return make_result(state).values


def test_results_are_a_dictionary(values):
    results = Results(values)
    assert results == dict(values)
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(dict(values)))
    assert pickle.loads(pickle.dumps(results)) == results
    assert copy.deepcopy(results) == results


def test_a_prompt_shows_the_answer_not_every_number(values):
    lines = repr(Results(values)).splitlines()
    assert lines[0].startswith(f"Verdict: {values['verdict']}: ")
    assert lines[1:-1] == answer(values)
    assert lines[-1] == f"{len(values)} keys, see dict(results) and .plot()"
    assert repr(Results()) == "No verdict\n0 keys, see dict(results) and .plot()"


def test_a_notebook_shows_verdict_answer_and_changes(values):
    page = Results(values)._repr_html_()
    assert f"Verdict: {values['verdict']}" in page
    for key in ("deltaH1", "deltaH_true", "residual"):
        for estimand in ("", "_tok"):
            assert (values.get(key + estimand) is not None) == (f"<td>{key}</td>" in page)
    assert "<script" not in page
    assert "style" not in page


def settings():
    """matplotlib's, but for the backend, which it chooses when somebody asks for it."""
    return {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}


def test_figures_are_images_and_leave_matplotlib_alone(values):
    before = settings()
    figures = Results(values).plot()
    assert isinstance(figures, Figures)
    assert list(figures) == ["1_prediction_and_measurement"]
    page = figures._repr_html_()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert settings() == before


def test_a_typed_result_is_shown_as_well(state):
    result = make_result(state)
    shown = ShownResult.of(result)
    assert shown.values == result.values
    assert (
        ProbeResult.__repr__(result) == f"<MadeResult of {result.checkpoint_name!r}: {result.verdict.word}>"
    )
    assert repr(shown).splitlines()[0] == f"Result of {result.checkpoint_name}"
    assert result_card(result.values) in shown._repr_html_()
    assert list(shown.plot()) == list(Results(result.values).plot())


def test_texts_of_strangers_are_escaped(values):
    def page(texts):
        own = {**values, "verdict": texts[0], "verdict_reasons": list(texts)}
        table = html_table(texts[1], list(texts), [list(texts)])
        return "\n".join([result_card(own, texts[2]), card(texts[3], texts, texts, [texts]), table])

    hostile = page(HOSTILE)
    assert shape(hostile) == shape(page([f"harmless {k}" for k in range(len(HOSTILE))]))
    assert not re.search("[\x1b\u202e\u2066\ud83d]", hostile)
