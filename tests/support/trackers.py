"""Stand-ins for Weights & Biases and trackio, with the signatures of the real ones, that record what they are told."""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

import numpy as np


class AlertLevel(enum.Enum):
    """Of both libraries."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


class Media:
    """A picture or a text, as it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value


class WandbRun:
    """`wandb.sdk.wandb_run.Run`, as far as the probe uses it."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.alerts: list[tuple[str, str, AlertLevel | None]] = []
        self.summary: dict[str, Any] = {}

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert type(data) is dict
        assert step is None or not self.logged or self.logged[-1][1] is None or step >= self.logged[-1][1]
        self.logged.append((data, step))

    def alert(
        self, title: str, text: str, level: AlertLevel | None = None, wait_duration: float | None = None
    ) -> None:
        assert len(title) < 64
        self.alerts.append((title, text, level))


class TrackioRun:
    """`trackio.Run`: no summary, and texts in Markdown."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.alerts: list[tuple[str, str | None, AlertLevel]] = []

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((metrics, step))

    def alert(
        self,
        title: str,
        text: str | None = None,
        level: AlertLevel = AlertLevel.WARN,
        step: int | None = None,
        webhook_url: str | None = None,
    ) -> None:
        self.alerts.append((title, text, level))


def library(name: str, *media: str, run: Any = None) -> ModuleType:
    """A module with the media of such a library, and with the functions of a run that is active."""
    module = ModuleType(name)
    for kind in media:
        setattr(module, kind, type(kind, (Media,), {}))
    module.AlertLevel = AlertLevel  # type: ignore[attr-defined]
    for part in ("log", "alert", "summary"):
        if hasattr(run, part):
            setattr(module, part, getattr(run, part))
    return module


def media_of(logged: list[tuple[dict[str, Any], int | None]]) -> dict[str, list[int | None]]:
    """The steps at which each picture or text was logged."""
    found: dict[str, list[int | None]] = {}
    for data, step in logged:
        for name, value in data.items():
            if isinstance(value, Media):
                found.setdefault(name, []).append(step)
                if type(value).__name__ == "Image":
                    assert isinstance(value.value, np.ndarray)
                    assert value.value.dtype == np.uint8
    return found


class MlflowClient:
    """`mlflow.MlflowClient`, as far as the probe uses it."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, str, float, int | None]] = []
        self.artifacts: dict[str, Any] = {}
        self.tags: dict[str, Any] = {}

    def log_metric(
        self, run_id: str, key: str, value: float, timestamp: int | None = None, step: int | None = None
    ) -> None:
        self.metrics.append((run_id, key, value, step))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.artifacts[artifact_file] = text

    def log_image(
        self, run_id: str, image: Any, artifact_file: str | None = None, key: str | None = None
    ) -> None:
        assert artifact_file is not None
        self.artifacts[artifact_file] = image

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        self.tags[key] = value


class MlflowLogger:
    """Lightning's `MLFlowLogger`."""

    def __init__(self) -> None:
        self.experiment, self.run_id = MlflowClient(), "3f"
        self.name, self.version = "experiment", "3f"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.experiment.log_metric(self.run_id, key, value, step=step)

    def log_hyperparams(self, params: Any) -> None:
        pass

    def save(self) -> None:
        pass
