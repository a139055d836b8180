"""What a terminal can show."""

from __future__ import annotations

import io
import sys

import pytest
from rich.text import Text

from probe.terminal import columns, print_above, rendered, understands_escapes, wrapped
from tests.support.terminal import Terminal


@pytest.mark.parametrize(("has", "expected"), [(40, 80), (80, 80), (100, 100), (200, 120)])
def test_a_report_is_as_wide_as_the_terminal(monkeypatch, has, expected):
    with Terminal(has) as terminal:
        terminal.take_over(monkeypatch)
        assert columns(sys.stdout) == expected
        monkeypatch.setenv("COLUMNS", "110")
        assert columns(sys.stdout) == 110
        monkeypatch.setenv("COLUMNS", "wide")
        assert columns(sys.stdout) == expected


def test_a_file_has_80_columns_unless_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as file:
        assert columns(file) == columns(io.StringIO()) == 80
        monkeypatch.setenv("COLUMNS", "120")
        assert columns(file) == 120


def test_colours_are_for_terminals(monkeypatch):
    text = Text.assemble(("caution", "bold yellow"), " [red]x[/red]")
    assert rendered(text, io.StringIO()) == "caution [red]x[/red]"
    with Terminal() as terminal:
        terminal.take_over(monkeypatch)
        assert rendered(text, terminal.stream) == "\x1b[1;33mcaution\x1b[0m [red]x[/red]"
        for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
            with monkeypatch.context() as changed:
                changed.setenv(name, value)
                assert not understands_escapes(terminal.stream)
                assert rendered(text, terminal.stream) == "caution [red]x[/red]"
    assert not understands_escapes(terminal.stream)  # closed


@pytest.mark.parametrize("width", range(12, 60))
def test_numbers_are_not_broken(width):
    whole = ["-0.00393 +/- 0.00012", "[-0.00417, -0.00369]", "(-2.54 +/- 0.69)e-05", "0.59 %", "-1.2 to 3.4"]
    text = "the change is " + " and then ".join(whole)
    lines = wrapped(text, width)
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= width
    for number in whole:
        assert len(number) > width or any(number in line for line in lines)


def test_what_is_too_long_is_cut_or_stays_whole():
    assert wrapped("a " + "b" * 25, 10) == ["a", "b" * 10, "b" * 10, "b" * 5]
    assert wrapped("a " + "b" * 25, 10, chop=False) == ["a", "b" * 25]
    assert wrapped("数数数数", 4) == ["数数", "数数"]  # two columns each
    assert wrapped("", 10, "- ") == ["-"]


def test_long_lines_are_wrapped_on_a_terminal_only(monkeypatch, capsys):
    line = "word " * 30 + "/a/path/" + "long" * 30
    print_above(line)
    assert capsys.readouterr().err == f"{line}\n"
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        print_above(line)
    first, *_ = terminal.raw.decode().splitlines()
    assert first == "word " * 15 + "word"
    assert ("/a/path/" + "long" * 30) in terminal.raw.decode()  # whole, to be copied
