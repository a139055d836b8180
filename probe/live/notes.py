"""What a log gets beside numbers: alarms and changes of the verdict in words, and pictures of the curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from probe.live.alarm import Alarm
from probe.live.settings import WatchSettings
from probe.report.boards import Board
from probe.report.drawing import pixels
from probe.report.markdown import escaped, verdict_markdown
from probe.report.summary import Summary
from probe.report.tags import PREFIX
from probe.report.training_figures import training_figures

if TYPE_CHECKING:
    import numpy as np

DRAWN_EVERY = 10
"""Probes from picture to picture, where no alarm asks for one."""


@dataclass(frozen=True)
class Notes:
    """What one moment of a training has to say.

    Attributes:
        texts: in Markdown, by name.
        alerts: for whoever watches the run.
        facts: what is known of the run now, by name.
        history: what pictures are drawn from; empty for none.
        spent: told the seconds that showing them has taken.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    alerts: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    spent: Callable[[float], None] = lambda seconds: None

    @cached_property
    def pictures(self) -> dict[str, np.ndarray]:
        """Drawn once, for however many logs."""
        return {name: pixels(figure) for name, figure in training_figures(self.history).items()}

    def show_on(self, board: Board | None, step: int) -> None:
        """Show everything on a board; nothing on what takes numbers alone."""
        if board is None:
            return
        start = time.perf_counter()
        for name, text in self.texts.items():
            board.text(f"{PREFIX}/{name}", text, step)
        for name, image in self.pictures.items():
            board.picture(f"{PREFIX}/{name}", image, step)
        for message in self.alerts:
            board.alert("entropy probe: alarm", message)
        if self.facts:
            board.facts({f"{PREFIX}/{name}": fact for name, fact in self.facts.items()})
        self.spent(time.perf_counter() - start)


class NoteTaker:
    """Notes what is new, as a training goes on.

    Attributes:
        spent: told the seconds that showing notes has taken.
    """

    def __init__(self, settings: WatchSettings) -> None:
        """Args: the `settings` of the probe, which the first note has; `figures` says whether there are pictures."""
        self.spent: Callable[[float], None] = lambda seconds: None
        self._settings = settings
        self._verdict = ""
        self._alarms: list[int] = []
        self._drawn, self._ended = 0, 0  # length of the history then

    def of_probe(self, history: Sequence[Mapping[str, Any]], alarms: Sequence[Alarm]) -> Notes | None:
        """What the last probe of a history has brought, with the alarms that it has raised; None for nothing new."""
        entry, texts, facts = history[-1], {}, {}
        if not self._verdict:
            texts["settings"] = _settings_table(self._settings)
        if entry["verdict"] != self._verdict:
            self._verdict = entry["verdict"]
            texts["verdict"] = verdict_markdown(entry)
            facts["verdict"] = self._verdict
        return self._notes(history, alarms, texts, facts, len(history) >= self._drawn + DRAWN_EVERY)

    def of_alarms(self, history: Sequence[Mapping[str, Any]], alarms: Sequence[Alarm]) -> Notes | None:
        """Alarms that were raised between two probes; None where there are none."""
        return self._notes(history, alarms, {}, {}, False)

    def of_end(self, history: Sequence[Mapping[str, Any]], summary: Summary | None) -> Notes | None:
        """What the training comes to; None where that has been said, or there is too little for a summary."""
        if len(history) == self._ended or summary is None:
            return None
        self._ended = len(history)
        texts = {"summary": f"<pre>{escaped(str(summary))}</pre>"}
        facts = {"outlook": summary.outlook} if summary.outlook else {}
        return self._notes(history, (), texts, facts, len(history) > self._drawn)

    def _notes(
        self,
        history: Sequence[Mapping[str, Any]],
        alarms: Sequence[Alarm],
        texts: dict[str, str],
        facts: dict[str, str],
        draw: bool,
    ) -> Notes | None:
        if alarms:
            messages = [one.message for one in alarms]
            texts["alarm"] = "\n\n".join(
                f"**Alarm after step {one.step}**: {escaped(one.message)}" for one in alarms
            )
            self._alarms += [one.step for one in alarms]
            facts["alarms"] = ", ".join(f"step {step}" for step in self._alarms)
        else:
            messages = []
        drawn: Sequence[Mapping[str, Any]] = ()
        if self._settings.figures and (draw or alarms):
            drawn, self._drawn = list(history), len(history)
        if not (texts or facts or drawn):
            return None
        return Notes(texts, messages, facts, drawn, self.spent)


def _settings_table(settings: WatchSettings) -> str:
    """The settings of the probe as a table in Markdown."""
    rows = [f"| {escaped(name)} | {escaped(str(value))} |" for name, value in asdict(settings).items()]
    return "\n".join(["| setting of the probe | value |", "| --- | --- |", *rows])
