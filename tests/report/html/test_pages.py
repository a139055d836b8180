"""The pages of a run and of a training, as text."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from probe import load_log
from probe.estimand import TOKEN
from probe.report.html.charts import change_chart, parts_chart, what_if_chart
from probe.report.html.run import run_page
from probe.report.html.training import training_page
from probe.report.rows import entropy_rows, estimator_rows, settings_rows, trust_rows
from probe.report.words import answer
from probe.text import printable
from tests.support.synthetic_training import made_up_history

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 2">',
    "</script><script>window.hacked = 3</script><!--",
    "' onmouseover='window.hacked = 4",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe\u2066",
    "half \ud83d of a character",
    "javascript:window.hacked=5",
)
"""Texts of strangers that a page must show as they are."""


class Outline(HTMLParser):
    """The elements of a page, and its text.

    Attributes:
        elements: names and attributes, in order.
        text: what is shown, and what stands in scripts and styles.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def shape(page):
    """The elements of a page without their texts and places."""
    return [(tag, sorted(attrs)) for tag, attrs in Outline(page).elements]


@pytest.fixture(scope="module")
def page(logged):
    return logged.page.read_text(encoding="utf-8")


def test_the_page_of_a_run_is_that_of_its_log(logged, page):
    """What a run writes itself and what is made of its log are the same page."""
    document, config = logged.document, yaml.safe_load(logged.config.read_text(encoding="utf-8"))
    assert run_page(document, config) == page


def test_every_number_of_the_report_is_there(logged, page):
    text = Outline(page).text.replace("\u00a0\u00b1\u00a0", " +/- ")
    values = logged.results
    rows = [
        *entropy_rows(values),
        *estimator_rows(values),
        *trust_rows(values),
        *settings_rows(values),
    ]
    assert len(rows) > 30
    for row in rows:
        for cell in (*row.cells, row.meaning):
            assert printable(cell).strip() in text, row
    for sentence in (*answer(values), *values["verdict_reasons"]):
        assert sentence in text


def test_the_answer_comes_first(logged, page):
    text = Outline(page).text
    places = [
        text.index(words) for words in (f"Verdict: {logged.results['verdict']}", "Predicted and measured\n")
    ]
    assert places == sorted(places)


def test_a_page_loads_nothing(page):
    outline = Outline(page)
    for tag, attrs in outline.elements:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form") or tag == "form"
        for name in ("src", "href", "action", "srcset", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page.replace("http-equiv", ""))


def test_only_the_page_s_own_script_may_run(page):
    (policy,) = (attrs["content"] for tag, attrs in Outline(page).elements if attrs.get("http-equiv"))
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def poisoned(value, texts):
    """A document whose texts are a stranger's, but for those that the page understands."""
    if isinstance(value, dict):
        return {key: x if key in KEPT else poisoned(x, texts) for key, x in value.items()}
    if isinstance(value, list):
        return [poisoned(x, texts) for x in value]
    if isinstance(value, str):
        texts.append(value)
        return HOSTILE[len(texts) % len(HOSTILE)]
    return value


KEPT = ("verdict", "quantity", "estimand", "estimator", "target", "ranked", "predictor", "solver", "schema")


def test_texts_of_strangers_are_shown_as_texts(logged, page):
    """A document full of hostile texts gives the page the same elements as one full of harmless ones."""
    document, config = logged.document, {"checkpoint": {"path": HOSTILE[2]}}
    texts: list[str] = []
    hostile = run_page(poisoned(document, texts), config)
    harmless = run_page(poisoned_with(document, "harmless"), {"checkpoint": {"path": "harmless"}})
    assert len(texts) > 200
    assert shape(hostile) == shape(harmless)
    assert "window.hacked" in html.unescape(hostile)
    assert not re.search("[\x1b\u202e\u2066\ud83d]", hostile)
    hostile.encode("utf-8")


def poisoned_with(value, text):
    if isinstance(value, dict):
        return {key: x if key in KEPT else poisoned_with(x, text) for key, x in value.items()}
    if isinstance(value, list):
        return [poisoned_with(x, text) for x in value]
    return text if isinstance(value, str) else value


def test_the_waterfall_ends_at_what_is_reported(logged):
    lines = parts_chart(logged.results).lines
    ends = [mark.value for line in lines for mark in line.marks]
    starts = [mark.start for line in lines for mark in line.marks]
    assert starts[:-1] == [0.0, *ends[:-2]]
    size = max(abs(end - start) for end, start in zip(ends, starts, strict=True))
    assert ends[-2] == pytest.approx(ends[-1], abs=1e-3 * size)
    assert ends[-1] == logged.results["deltaH1_tok"]
    assert starts[-1] == 0.0


def test_charts_hold_the_result_s_numbers(logged):
    values = logged.results
    (predicted, measured, difference) = (line.marks[0] for line in change_chart(values, TOKEN).lines)
    for mark, key in (
        (predicted, "deltaH1_tok"),
        (measured, "deltaH_true_tok"),
        (difference, "residual_tok"),
    ):
        assert mark.value == values[key]
        assert [mark.low, mark.high] == values[f"{key}_ci95"]
    by_name = {line.label: line for line in what_if_chart(values).lines}
    for one in values["what_if"]["interventions"]:
        if one["name"] in by_name:
            assert by_name[one["name"]].marks[0].value == one["difference"]["deltaH1_tok"]
    measured_ones = [line for line in by_name.values() if len(line.marks) == 2]
    assert [line.label for line in measured_ones] == [
        one["name"] for one in values["what_if"]["interventions"] if "exact" in one
    ]


def test_a_summary_gives_a_page(logged):
    (summary,) = logged.folder.glob("logs/*/*_summary.json")
    text = Outline(run_page(load_log(summary))).text
    assert f"Verdict: {logged.results['verdict']}" in text
    assert "95 % interval" in text
    assert "NAME_config.yaml" in text


@pytest.mark.parametrize(
    "key", ["deltaH1", "deltaH_true", "attribution", "what_if", "diagnostics", "verdict", "timing"]
)
def test_what_did_not_run_is_left_out(logged, key):
    document = logged.document
    document["results"] = {
        name: value
        for name, value in document["results"].items()
        if name != key and not name.startswith(f"{key}_")
    }
    page = run_page(document)
    linked = {
        attrs["href"][1:] for tag, attrs in Outline(page).elements if attrs.get("href", "").startswith("#")
    }
    there = {attrs["id"] for tag, attrs in Outline(page).elements if "id" in attrs}
    assert linked <= there


def test_the_answers_follow_the_verdict():
    values = {
        "verdict": "trustworthy",
        "H_orig_tok": 0.5,
        "deltaH1_tok": -0.01,
        "deltaH1_tok_se": 0.001,
        "deltaH_true_tok": -0.011,
        "deltaH_true_tok_se": 0.001,
        "deltaH_true_tok_ci95": [-0.013, -0.009],
    }
    said = answer(values)[0]
    assert said.startswith(
        "This update lowers the policy's entropy by 2.2 % of its 0.5 nats per token: measured -0.0110 +/- 0.0010; "
        "predicted -0.0100 +/- 0.0010. About 31 updates like it would halve it; "
    )
    assert pytest.approx(0.25, rel=0.02) == 0.5 * (1 - 0.011 / 0.5) ** 31
    raised = answer({**values, "deltaH_true_tok": 0.011, "deltaH_true_tok_ci95": [0.009, 0.013]})[0]
    assert raised.startswith("This update raises the policy's entropy by 2.2 %")
    assert "About 32 updates like it would double it" in raised
    tiny = {**values, "deltaH_true_tok": -1e-5, "deltaH_true_tok_ci95": [-2e-5, -1e-6]}
    assert "updates like it" not in answer(tiny)[0]
    whole = {**values, "deltaH_true_tok": -0.5, "deltaH_true_tok_ci95": [-0.6, -0.4]}
    assert "updates like it" not in answer(whole)[0]
    assert "is not resolved: measured" in answer({**values, "deltaH_true_tok_ci95": [-0.03, 0.01]})[0]
    assert "is not resolved: measured" in answer({**values, "verdict": "unresolved"})[0]
    assert "is not known: measured" in answer({**values, "verdict": "invalid"})[0]
    assert "leaves the entropy as it is" in answer({**values, "deltaH_true_tok": 0.0})[0]
    assert answer({"verdict": "invalid", "deltaH_true_tok": None}) == []
    alone = {"deltaH1": -2.0, "deltaH1_se": 0.1, "verdict": "caution"}
    said = "This update lowers the policy's entropy: predicted -2.00 +/- 0.10 nats per response."
    assert answer(alone) == [said]


# ---------------------------------------------------------------- trainings


def test_the_page_of_a_training_says_how_it_stands():
    history = made_up_history()
    for upto, words in (
        (60, "The policy's entropy has collapsed"),
        (25, "Forecast: collapse in about"),
        (2, "No forecast yet"),
    ):
        text = Outline(training_page(history[:upto], steps=120)).text
        assert words in text
    text = Outline(training_page(history, steps=120)).text
    assert "Alarm after step 61." in text
    assert "The entropy came to the threshold between steps 79 and 81." in text
    assert "20 probes trustworthy" in text


def test_every_probe_of_a_training_is_there():
    history = made_up_history(probes=10, alarm=4)
    outline = Outline(training_page(history, steps=20))
    rows = [attrs for tag, attrs in outline.elements if tag == "tr" and "data-verdict" in attrs]
    assert [row["data-verdict"] for row in rows] == [entry["verdict"] for entry in history]
    assert ["data-alarm" in row for row in rows] == [k == 4 for k in range(10)]


@pytest.mark.parametrize(
    "left_out", [(), ("outlook",), ("verdict", "verdict_reasons"), ("steps_to_collapse",), ("deltaH1",)]
)
def test_a_history_from_a_log_has_fewer_names(left_out):
    history = [
        {name: x for name, x in entry.items() if not name.startswith(left_out)} if left_out else entry
        for entry in made_up_history()
    ]
    assert "Entropy before the step" in training_page(history, steps=120)


def test_a_steady_training_and_a_single_probe():
    assert "No forecast yet" in training_page(made_up_history(rate=0.0, alarm=None), steps=120)
    page = training_page(made_up_history(probes=1, alarm=None), steps=1)
    assert "Entropy before step 1: 0.490" in Outline(page).text.replace("\u00a0", " ")
    assert "No single update" not in page


def test_texts_of_a_training_are_shown_as_texts():
    def page(texts):
        history = made_up_history(probes=len(texts))
        for entry, text in zip(history, texts, strict=True):
            entry |= {"outlook": text, "verdict_reasons": [text], "verdict": "caution"}
        settings = {text: text for text in texts}
        return training_page(history, 20, settings=settings, versions=settings, title=texts[0])

    hostile = page(HOSTILE)
    assert shape(hostile) == shape(page([f"harmless {k}" for k in range(len(HOSTILE))]))
    hostile.encode("utf-8")


def test_largest_updates_are_resolved_ones():
    history = made_up_history(probes=6, alarm=None)
    for entry in history[:3]:
        entry |= {"deltaH_true_tok_ci95_low": -math.inf, "deltaH_true_tok_ci95_high": math.inf}
    outline = Outline(training_page(history, steps=12))
    start = outline.text.index("Largest falls")
    listed = re.findall(r"step (\d+)", outline.text[start : outline.text.index("Every probe", start)])
    assert listed == ["7", "9", "11"]


def test_a_part_of_one_block_has_no_interval(logged):
    """Of a single prompt in E nothing is known of errors: null in a log."""
    document = logged.document
    found = document["results"]["attribution"]
    for one in (*(found[name] for name in ("momentum", "decay", "tokens", "total")), *found["by_outcome"]):
        one |= {"deltaH1_tok_se": None, "deltaH1_tok_ci95": [None, None]}
    assert "What deltaH1 is the sum of" in run_page(document)


def test_the_last_reason_of_every_verdict_is_told():
    text = Outline(training_page(made_up_history(probes=6, alarm=None), steps=12)).text
    for step, k in ((9, 4), (11, 5)):  # the last of caution and of unresolved; a good one needs no reason
        assert f"The last, step {step}: reason of probe {k}" in text
    assert "reason of probe 3" in text  # in the table of all
    assert "The last, step 7" not in text


def test_where_the_measurement_is_per_response_the_answer_is():
    values = {
        "verdict": "trustworthy",
        **{"deltaH1": -0.06, "deltaH1_tok": -0.004, "deltaH_true": -0.05, "H_orig": 7.0, "H_orig_tok": 0.4},
    }
    assert answer(values)[0].startswith(
        "This update lowers the policy's entropy by 0.7 % of its 7 nats per response: "
    )
    assert "measured -0.05" in answer(values)[0]


def test_a_preconditioned_prediction_is_no_update():
    values = {
        "deltaH1_tok": -0.004,
        "H_orig_tok": 0.4,
        "diagnostics": {"bias_flags": ["preconditioned_step"]},
    }
    (said,) = answer(values)
    assert said.endswith("It is the preconditioned gradient's: no step that an optimizer takes.")
    assert "updates like it" not in said
    (line,) = change_chart(values, TOKEN).lines
    assert "no step that an optimizer takes" in line.note


def test_large_parts_are_named():
    parts = {"momentum": -0.003, "tokens": -0.0002, "kl": 0.001, "decay": 1e-6, "control_variates": -0.0005}
    found = {name: {"deltaH1_tok": x} for name, x in parts.items()}
    said = answer({"deltaH1_tok": -0.004, "attribution": {**found, "total": {"deltaH1_tok": -0.0022}}})[1]
    assert said == (
        "Of the prediction, -0.003 is momentum of earlier updates and -0.0002 the tokens of U; the KL penalty 0.001, "
        "control variates -0.0005."
    )


def test_what_is_below_the_noise_floor_has_a_line():
    values = {"deltaH1_tok": -1e-6, "deltaH_true_tok": None, "deltaH_true_tok_ci95": [-2e-6, -1e-6]}
    predicted, measured = change_chart(values, TOKEN).lines
    assert predicted.marks
    assert (measured.marks, measured.cells[0]) == ((), "not resolved")


def test_tokens_of_a_detailed_log_are_not_said_to_be_shaded(logged):
    document = logged.document
    document["level"] = "detailed"
    del document["tokens"]
    text = Outline(run_page(document)).text
    assert "This log, of the level detailed, has no tokens" in text
    assert "Point at a token" not in text


def test_a_change_below_the_noise_floor_ends_no_page():
    history = made_up_history(probes=6, alarm=None)
    history[2] |= {
        "deltaH_true_tok": None,
        "deltaH_true_tok_ci95_low": -0.02,
        "deltaH_true_tok_ci95_high": -0.01,
    }
    assert "not resolved" in training_page(history, steps=12)


def test_a_single_low_reading_is_no_collapse():
    history = made_up_history(probes=20, alarm=None)
    history[-1] |= {"H_orig_tok": 0.09, "outlook": "", "steps_to_collapse": 12.0}
    text = Outline(training_page(history, steps=40)).text
    assert "has collapsed" not in text
    assert "The entropy has not been found at the threshold so far." in text
