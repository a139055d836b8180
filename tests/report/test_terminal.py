"""The report as a table."""

from __future__ import annotations

from probe.report.terminal import report
from tests.support.synthetic_run import (
    make_result,
)


def test_columns_are_aligned(state):
    parts = report(make_result(state)).split("\n\n")
    for part, head in ((parts[2], "nats per response"), (parts[3], "variance ratio")):
        lines = part.splitlines()
        column = lines[0].index(head)
        assert all(line[column - 1] == " " and line[column] != " " for line in lines if column < len(line))
    assert len(parts[2].splitlines()) == 12


def test_the_verdict_comes_first(state):
    long = "The interval contains 0; " + "this is a long reason " * 10
    result = make_result(state, verdict="unresolved", verdict_reasons=["the interval contains 0", long])
    lines = report(result).split("\n\n")[1].splitlines()
    assert lines[:2] == ["Verdict: unresolved", "  - the interval contains 0"]
    assert lines[2].startswith("  - The interval contains 0; this")
    assert lines[3].startswith("    ")
    assert " ".join(" ".join(lines[2:]).split()) == f"- {long.strip()}"
