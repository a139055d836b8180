"""The probe's lines on a terminal on which something is drawn: they stand above it, whole."""

from __future__ import annotations

import logging
import sys

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from probe.live.say import say
from tests.support.terminal import Terminal, logger_of_nobody

LINE = "step 5: H 0.2100 +/- 0.0052 nats/token"


class Loop(tqdm):
    """A bar of somebody's own, as Lightning's is."""

    monitor_interval = 0


@pytest.fixture
def logger(monkeypatch):
    return logger_of_nobody(monkeypatch)


def with_handler(logger: logging.Logger, who: str) -> None:
    """Set logging up as users do, before anything is drawn: on the terminal that stderr is now."""
    if who == "the user":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)


@pytest.mark.parametrize("who", ["nobody", "the user"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", [Loop, auto_tqdm])
def test_lines_stand_above_bars_of_tqdm(monkeypatch, logger, kind, stream, who):
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        with_handler(logger, who)
        with (
            kind(total=3, desc="Epoch 0", file=getattr(sys, stream), mininterval=0) as outer,
            kind(
                total=9, desc="Validation", position=1, leave=False, file=sys.stderr, mininterval=0
            ) as inner,
        ):
            for _ in range(3):
                outer.update()
                inner.update()
                say(LINE)
    begin = "INFO entropy probe: " if who == "the user" else "entropy probe: "
    lines = terminal.lines
    assert lines[:3] == [f"{begin}{LINE}"] * 3
    assert lines[3].startswith("Epoch 0: 100%")
    assert len(lines) == 4


@pytest.mark.parametrize("who", ["nobody", "the user"])
@pytest.mark.parametrize("stderr", [False, True])
def test_lines_stand_above_displays_of_rich(monkeypatch, logger, stderr, who):
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        with_handler(logger, who)
        with Progress(console=Console(stderr=stderr)) as bar:
            task = bar.add_task("Epoch 0", total=3)
            for _ in range(3):
                bar.update(task, advance=1, refresh=True)
                say(f"{LINE} [red]no[/red] [/]")
        say("after")
    begin = "INFO entropy probe: " if who == "the user" else "entropy probe: "
    lines = terminal.lines
    assert lines[:3] == [f"{begin}{LINE} [red]no[/red] [/]"] * 3
    assert lines[3].startswith("Epoch 0 ")
    assert lines[4:] == [f"{begin}after"]
    for handler in logger.handlers:
        assert getattr(handler, "stream", terminal.stream) is terminal.stream  # as it was


def test_handlers_keep_their_ways(monkeypatch, logger, tmp_path):
    """A file gets the line as ever, in one piece; a level is kept; a parent's handlers are reached."""
    parent = logging.Logger("parent")
    logger.parent = parent
    file = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    parent.addHandler(file)
    with Terminal(80) as terminal:
        terminal.take_over(monkeypatch)
        quiet = logging.StreamHandler(sys.stderr)
        quiet.setLevel(logging.WARNING)
        parent.addHandler(quiet)
        with Progress():
            say("word " * 40)
            say("a warning", warn=True)
    file.close()
    assert (
        tmp_path / "log.txt"
    ).read_text() == "entropy probe: " + "word " * 40 + "\nentropy probe: a warning\n"
    assert terminal.lines == ["entropy probe: a warning"]
    assert logger.handlers == []  # none of the probe's own, where there are others


def test_a_bar_that_cannot_be_moved_is_no_reason_for_silence(monkeypatch, logger, capsys):
    class Broken(Loop):
        def clear(self, nolock=False):
            raise ValueError("I/O operation on closed file")

    with Broken(total=2, file=sys.stderr):
        say(LINE)
    assert f"entropy probe: {LINE}\n" in capsys.readouterr().err
