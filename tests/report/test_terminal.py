"""The report as a table, as a terminal shows it."""

from __future__ import annotations

import re

import pytest

from probe.report.attribution import attribution_tables
from probe.report.rows import ERRORS, entropy_rows, estimator_rows, settings_rows, time_rows, trust_rows
from probe.report.terminal import closing, report, styled_report
from tests.support.synthetic_run import as_result, make_result
from tests.support.terminal import seen

NUMBER = r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?"
WHOLE = re.compile(
    rf"\(?{NUMBER} \+/- {NUMBER}\)?(?:e[-+]?\d+)?|\[{NUMBER}, {NUMBER}\](?:e[-+]?\d+)?|{NUMBER}"
)
WIDTHS = (80, 100, 120, 200)


def test_columns_are_aligned(state):
    parts = report(make_result(state), 120).split("\n\n")
    for part, head in ((parts[2], "nats per response"), (parts[3], "variance ratio")):
        lines = [line for line in part.splitlines() if line.strip() != ERRORS]
        column = lines[0].index(head)
        assert all(line[column - 1] == " " and line[column] != " " for line in lines if column < len(line))
    assert len(parts[2].splitlines()) == 13


@pytest.mark.parametrize("width", [80, 120])
def test_how_to_read_the_numbers_stands_over_the_numbers(state, width):
    """And not over the explanations beside them."""
    head, reading, first, *_ = report(make_result(state), width).split("\n\n")[2].splitlines()
    assert reading.strip() == ERRORS
    assert ERRORS not in head
    assert reading.index(ERRORS) == head.index("nats per token") == first.index(first.split()[2])


def test_the_verdict_comes_first(state):
    long = "The interval contains 0; " + "this is a long reason " * 10
    result = make_result(state, verdict="unresolved", verdict_reasons=["the interval contains 0", long])
    lines = report(result).split("\n\n")[1].splitlines()
    assert lines[:2] == ["Verdict: unresolved", "  - the interval contains 0"]
    assert lines[2].startswith("  - The interval contains 0; this")
    assert lines[3].startswith("    ")
    assert " ".join(" ".join(lines[2:]).split()) == f"- {long.strip()}"


def test_the_last_lines_have_the_verdict_and_the_files():
    long = "The interval, -0.0017 to -0.0005 nats per token, " + "contains much " * 10
    values = {"verdict": "caution", "verdict_reasons": [long, "another"]}
    path = "/a/" + "long/" * 30 + "log.json"
    first, *further, last = closing(values, {"log": path}, 80).plain.splitlines()
    assert first.startswith("Verdict: caution. The interval, -0.0017 to -0.0005")
    assert max(map(len, (first, *further))) <= 80
    assert "another" not in "".join(further)
    assert last == f"log: {path}"  # whole, to be copied
    assert closing({}, {}, 80).plain == ""


def shown_cells(values) -> list[str]:
    """Every line of every cell that a report has."""
    tables = [entropy_rows(values), estimator_rows(values), trust_rows(values), time_rows(values)]
    tables += [settings_rows(values), *(table.rows for table in attribution_tables(values))]
    return [line for rows in tables for row in rows for cell in row.cells for line in cell.split("\n")]


def with_hostile_texts(values):
    """The same with texts that a terminal, or a library for terminals, would obey; and with very long ones."""
    top = [dict(one) for one in values["attribution"]["top_tokens"]]
    texts = ["\x1b[2J\x1b[31m", "[bold red]x[/]", "[/]", "数" * 60, "a" * 300, "\r\x08\x07"]
    for one, text in zip(top, texts, strict=False):
        one["text"] = text
    names = [dict(one) for one in values["what_if"]["interventions"]]
    names[0]["name"] = "stare(weight=1.05)+entropy_bonus(coef=0.0123456789)+clip_cov(share=0.123456)"
    return {
        **values,
        "verdict_reasons": ["\x1b]0;title\x07[link=file:///etc]x[/link] " + "long " * 40],
        "attribution": {**values["attribution"], "top_tokens": top},
        "what_if": {**values["what_if"], "interventions": names},
    }


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_is_wrapped_and_every_number_is_whole(with_attribution, columns, hostile):
    values = with_hostile_texts(with_attribution) if hostile else dict(with_attribution)
    name = "step_60\x1b[31m" + "\n" * 3 + "x" * 200 if hostile else "step_60"
    width = min(columns, 120)
    text = report(as_result(values, name), width)
    assert "\x1b" not in text
    lines = seen(text, columns)
    assert lines == [line.rstrip() for line in text.rstrip("\n").splitlines()]
    numbers = {number for cell in shown_cells(values) for number in WHOLE.findall(cell)}
    assert len(numbers) > 100
    assert any("+/-" in number for number in numbers)
    together = "\n".join(lines)
    assert [number for number in sorted(numbers) if number not in together] == []
    assert re.search(r"(\+/-|\[[^\]\n]*,)$", together, re.MULTILINE) is None  # none goes on in the next line
    for table in attribution_tables(values):
        labels = [row.label for row in table.rows]
        for label in labels if not hostile else ():
            assert any(line.strip().startswith(label.strip()) for line in lines), label


def test_colours_are_additions_to_the_text(state):
    result = make_result(state, verdict="invalid", verdict_reasons=["[red]no[/red]"])
    text = styled_report(result)
    assert text.plain == report(result)
    assert "[red]no[/red]" in text.plain
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled["bold red"] == "Verdict: invalid"


def test_an_encoding_that_has_not_every_letter_changes_no_column(state):
    result = make_result(state, verdict_reasons=["grün " * 40])
    lines = report(result, 80, "ascii").splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() for line in lines)
