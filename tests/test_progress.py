"""How far work has come: on a terminal, in a file, under NO_COLOR."""

from __future__ import annotations

import io
import logging

import pytest

from probe.progress import LiveBar, ProgressLines, progress_display
from probe.terminal import StderrHandler
from tests.support.terminal import Terminal


def test_a_bar_leaves_nothing_behind(monkeypatch):
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        monkeypatch.setattr("probe.progress.REDRAW_SECONDS", 0.0)
        shown = progress_display()
        assert isinstance(shown, LiveBar)
        for label in ("sample: sample E", "ground truth: score E [bold]after[/]"):
            for done in (8, 16, 24, 32):
                shown.show(label, done, 32)
        shown.line("done [bold]1.0 s[/]")
        shown.show("left where it stands", 1, 4)
        shown.close()
        print("report")
    raw = terminal.raw.decode()
    assert "sample: sample E" in raw
    assert "24/32" in raw
    assert " 75 %" in raw
    assert "score E [bold]after[/]" in raw  # no markup
    assert terminal.lines == ["done [bold]1.0 s[/]", "report"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_notes_stand_above_a_bar(monkeypatch, columns):
    logger = logging.Logger("a logger of its own")
    logger.addHandler(StderrHandler())
    with Terminal(columns) as terminal:
        terminal.take_over(monkeypatch)
        shown = progress_display()
        shown.show("sample: sample E", 1, 4)
        logger.warning("a note: \x1b[31m [bold]%s[/]", "word " * 30)
        shown.show("sample: sample E", 3, 4)
        shown.close()
        logger.warning("after")
    lines = terminal.lines
    assert " ".join(" ".join(lines).split()) == "a note: \\x1b[31m [bold]" + "word " * 30 + "[/] after"
    assert max(map(len, lines)) <= columns
    assert lines[-1] == "after"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_plain_terminal_gets_lines(monkeypatch, name, value):
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        monkeypatch.setenv(name, value)
        shown = progress_display()
        assert isinstance(shown, ProgressLines)
        shown.show("sample: sample E", 1, 4)
        shown.line("sample 1.0 s")
    assert terminal.raw == b"sample 1.0 s\r\n"


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds: float, batches: int) -> list[str]:
    """What a pass says that takes so many seconds."""
    clock, stream = Clock(), io.StringIO()
    shown = ProgressLines(stream, clock)
    for done in range(1, batches + 1):
        clock.now = seconds * done / batches
        shown.show("sample: sample E", done, batches)
    return stream.getvalue().splitlines()


def test_a_long_pass_says_how_far_it_is_and_how_long_it_takes():
    lines = lines_of(720.0, 1000)
    assert 9 <= len(lines) <= 13
    assert lines[0] == "sample: sample E: 8.4 % (84 of 1000), about 11 min left"
    shares = [float(line.split()[3]) for line in lines]
    assert shares == sorted(shares)
    assert lines[-1].endswith(f"about {720 * (1 - shares[-1] / 100):.0f} s left")


def test_a_long_pass_of_two_batches_has_a_word_after_the_first():
    assert lines_of(720.0, 2) == ["sample: sample E: 50 % (1 of 2), about 6 min left"]


def test_a_pass_of_hours_is_never_silent_for_long():
    lines = lines_of(3 * 3600.0, 10_000)
    assert 150 <= len(lines) <= 180  # one per minute


@pytest.mark.parametrize("batches", [1, 4, 1000])
def test_a_short_pass_says_nothing(batches):
    assert lines_of(9.0, batches) == []


def test_every_pass_counts_its_own_time():
    clock, stream = Clock(), io.StringIO()
    shown = ProgressLines(stream, clock)
    clock.now = 100.0
    shown.close()
    for label in ("sample: sample E", "sample: score E"):
        for done in (1, 2, 3, 4):
            clock.now += 20.0
            shown.show(label, done, 4, "loss 0.5")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sample: sample E: 25 % (1 of 4), loss 0.5, about 60 s left"
    assert lines[3] == "sample: score E: 25 % (1 of 4), loss 0.5, about 60 s left"
    assert len(lines) == 6


def test_a_stream_that_nobody_reads_ends_no_run():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    ProgressLines(Closed()).line("x")
    closed = io.StringIO()
    closed.close()
    ProgressLines(closed).line("x")


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch):
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        shown = progress_display()
        shown.show("sample: sample E", 1, 4)
    monkeypatch.setattr("probe.progress.REDRAW_SECONDS", 0.0)
    shown.show("sample: sample E", 2, 4)
    shown.line("x")
    shown.close()
    shown.show("sample: sample U", 1, 4)
    shown.close()
