"""Where loggers take numbers, texts, pictures and alerts: TensorBoard, Weights & Biases, trackio, MLflow."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

LIGHTNING_STEP = "trainer/global_step"
"""Under which Lightning's loggers of Weights & Biases log a step."""
LONGEST_TITLE = 60
"""Characters of an alert's title; Weights & Biases takes less than 64."""


class Board(Protocol):
    """What a logger takes, numbers and others."""

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Show a text in Markdown."""

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a picture, `(height, width, 3)` of unsigned bytes."""

    def alert(self, title: str, text: str) -> None:
        """Tell whoever watches the run."""

    def facts(self, facts: Mapping[str, str]) -> None:
        """Note what is now known of the run, in words, by name."""


@dataclass(frozen=True)
class TensorBoardWriter:
    """TensorBoard's tabs TEXT and IMAGES; it has no alerts, and no facts of a run.

    Attributes:
        writer: a `SummaryWriter`, of torch or of tensorboardX.
    """

    writer: Any

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Board`."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """See `Board`."""
        self.writer.add_text(tag, markdown, step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """See `Board`."""
        # not `add_figure`, which imports pyplot and with it a backend
        self.writer.add_image(tag, image, step, dataformats="HWC")

    def alert(self, title: str, text: str) -> None:
        """TensorBoard has none; the text of an alarm stands in its tab TEXT."""

    def facts(self, facts: Mapping[str, str]) -> None:
        """TensorBoard has none."""


@dataclass(frozen=True)
class TrackedRun:
    """A run of Weights & Biases or trackio, or that library itself, whose functions act on the run that is active.

    Attributes:
        run: with `log(metrics, step=...)` and `alert(title=..., text=..., level=...)`.
        step_name: under which the step is logged beside what it belongs to; None gives it to `log`, as
            those do who count the run's own steps.
    """

    run: Any
    step_name: str | None = None

    @property
    def library(self) -> Any:
        """The module with the library's media."""
        if isinstance(self.run, ModuleType):
            return self.run
        return sys.modules.get(type(self.run).__module__.partition(".")[0])

    def numbers(self, numbers: Mapping[str, Any], step: int) -> None:
        """Log numbers, or media."""
        if self.step_name is None:
            self.run.log(dict(numbers), step=step)
        else:
            self.run.log({**numbers, self.step_name: step})

    def text(self, tag: str, markdown: str, step: int) -> None:
        """See `Board`; Weights & Biases has no text in Markdown, and gets verdict and alarms as facts and alerts."""
        kind = getattr(self.library, "Markdown", None)
        if kind is not None:
            self.numbers({tag: kind(markdown)}, step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """See `Board`."""
        kind = getattr(self.library, "Image", None)
        if kind is not None:
            self.numbers({tag: kind(image)}, step)

    def alert(self, title: str, text: str) -> None:
        """See `Board`."""
        levels = getattr(self.library, "AlertLevel", None)
        level = {} if levels is None else {"level": levels.WARN}
        self.run.alert(title=title[:LONGEST_TITLE], text=text, **level)

    def facts(self, facts: Mapping[str, str]) -> None:
        """See `Board`; trackio has no summary of a run."""
        summary = getattr(self.run, "summary", None)
        if summary is not None:
            summary.update(dict(facts))


@dataclass(frozen=True)
class MlflowRun:
    """A run of MLflow: texts and pictures are artifacts of it, alarms and facts are tags.

    Attributes:
        client: an `MlflowClient`.
        run_id: of the run.
    """

    client: Any
    run_id: str

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Board`."""
        for name, value in numbers.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """See `Board`."""
        self.client.log_text(self.run_id, markdown, f"{tag}/step_{step}.md")

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """See `Board`."""
        self.client.log_image(self.run_id, image, artifact_file=f"{tag}/step_{step}.png")

    def alert(self, title: str, text: str) -> None:
        """See `Board`; MLflow tells nobody, and shows the tag with the run."""
        self.client.set_tag(self.run_id, title, text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """See `Board`."""
        for name, fact in facts.items():
            self.client.set_tag(self.run_id, name, fact)


def board_of_logger(logger: Any) -> Board | None:
    """The board that one of Lightning's loggers writes to; None for one that takes numbers alone."""
    experiment, run_id = getattr(logger, "experiment", None), getattr(logger, "run_id", None)
    if isinstance(run_id, str) and all(
        callable(getattr(experiment, name, None)) for name in ("log_text", "log_image", "set_tag")
    ):
        return MlflowRun(experiment, run_id)
    return board_of(experiment, LIGHTNING_STEP)


def board_of(target: Any, step_name: str | None = None) -> Board | None:
    """The board that a logger's object is; None for one that takes numbers alone.

    Args:
        target: a `SummaryWriter`, a run of Weights & Biases or trackio, or something else.
        step_name: see `TrackedRun`.
    """
    if callable(getattr(target, "add_text", None)) and callable(getattr(target, "add_image", None)):
        return TensorBoardWriter(target)
    if callable(getattr(target, "alert", None)) and callable(getattr(target, "log", None)):
        return TrackedRun(target, step_name)
    return None
