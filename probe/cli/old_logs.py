"""Pages made from files that runs and trainings have left: logs, a trainer's state, Lightning's loggers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from probe.config.files import read_config_file
from probe.errors.exceptions import ConfigError, LogError
from probe.files.atomic import atomic_write_bytes
from probe.files.log_files import load_log
from probe.live.names import ALARMS, PREFIX, history_names
from probe.report.html.run import run_page
from probe.report.html.training import training_page
from probe.text import printable
from probe.verdict.words import WORDS

HOST_PREFIX = "train/"
"""What transformers puts before the names of numbers in event files."""
READ = (
    "a log of a run (.json, .json.gz), trainer_state.json, metrics.csv of a CSVLogger, or a folder of TensorBoard's "
    "events"
)
"""What a page can be made from."""


def execute(log: str, output: str | None = None) -> Path:
    """Make the page of a run or a training, and say where it is.

    Args:
        log: see `READ`.
        output: the file to write; None for one beside the log.

    Raises:
        ConfigError: `output` is no name of a page.
        LogError: the log cannot be read, or the page not written.
    """
    path = Path(log).expanduser()
    if output is not None and Path(output).suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: expected a file that ends in .html, found {output}")
    written = atomic_write_bytes(_beside(path) if output is None else output, page_of(path).encode("utf-8"))
    print(f"report: {printable(str(written))}")
    return written


def _beside(path: Path) -> Path:
    """The page's place where none is given."""
    if path.is_dir():
        return path / "entropy_probe_report.html"
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".csv") + ".html")


def page_of(path: Path) -> str:
    """The page of a run or a training, from what it has left on disk.

    Args:
        path: see `READ`.

    Raises:
        LogError: there is no such file, it cannot be read, or it has nothing of the probe.
    """
    if not path.exists():
        raise LogError(f"cannot read {path}: expected {READ}, found nothing there; check the path")
    if path.is_dir() or path.name.startswith("events.out"):
        return _page_of_steps(path, _event_steps(path))
    if path.suffix == ".csv":
        return _page_of_steps(path, _csv_steps(path))
    state = _trainer_state(path)
    if state is not None:
        logs = (one for one in state["log_history"] if isinstance(one, Mapping))
        steps = state.get("global_step")
        counted = steps if isinstance(steps, int) else 0
        return _page_of_steps(
            path, ({"step": one.get("step"), **history_names(one)} for one in logs), counted
        )
    return run_page(load_log(path), _config_beside(path))


def _trainer_state(path: Path) -> dict[str, Any] | None:
    """The state of a transformers trainer; None where the file is none."""
    if path.suffix != ".json" or path.name.endswith("_summary.json"):
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # `load_log` says what is wrong with it
    history = found.get("log_history") if isinstance(found, dict) else None
    return found if isinstance(history, list) else None


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The configuration that a run has written beside its log."""
    name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix("_summary")
    file = path.with_name(f"{name}_config.yaml")
    return read_config_file(file) if file.is_file() else None


def _csv_steps(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a CSVLogger's file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                numbers = {name: _number(text) for name, text in row.items() if isinstance(name, str)}
                yield {"step": numbers.get("step"), **history_names(numbers)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LogError(
            f"cannot read {path}: expected a CSV file of Lightning's CSVLogger, found {error}"
        ) from error


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _event_steps(path: Path) -> Iterable[dict[str, Any]]:
    """The scalars of TensorBoard's event files, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    found.Reload()
    steps: dict[int, dict[str, Any]] = {}
    for tag in found.Tags().get(SCALARS, ()):
        for name in history_names({tag.removeprefix(HOST_PREFIX): None}):
            for event in found.Scalars(tag):
                steps.setdefault(event.step, {"step": event.step})[name] = event.value
    return [steps[step] for step in sorted(steps)]


def _page_of_steps(path: Path, steps: Iterable[Mapping[str, Any]], counted: int = 0) -> str:
    """The page of a training whose numbers were logged step by step; `counted` steps, as far as a trainer says so."""
    history = logged_history(steps)
    if not history and path.is_dir() and (logs := sorted(path.glob("*_summary.json"))):
        raise LogError(
            f"cannot make a report of {path}: expected the events of a training, found the logs of {len(logs)} runs; "
            f"give one of them ({logs[-1].name}, ...)"
        )
    if not history:
        raise LogError(
            f"cannot make a report of {path}: expected the numbers of a training that was probed ({PREFIX}/H_orig_tok, "
            "...), found none; attach the probe to the training, or give the log of a run"
        )
    if all("cumulative_H_tok" not in entry for entry in history):
        raise LogError(
            f"cannot make a report of {path}: expected the numbers of a training, found those of a run; give the run's "
            "log (NAME.json.gz in its folder per date), which has more"
        )
    last = history[-1]
    return training_page(
        history, max(counted, last["step"]), last.get("cost_share"), title=f"Entropy of {path.name}"
    )


def logged_history(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history of a watch, as far as loggers have it: numbers, the word of the verdict, and alarms.

    Args:
        steps: numbers by their names in the history, with their `step`; one step may come in several parts.
    """
    merged: dict[int, dict[str, Any]] = {}
    for numbers in steps:
        step = numbers.get("step")
        if step is None or not math.isfinite(step):
            continue
        known = {
            name: x
            for name, x in numbers.items()
            if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        }
        merged.setdefault(int(step), {}).update(known)
    history: list[dict[str, Any]] = []
    for step in sorted(merged):
        entry = {**merged[step], "step": step}
        if "H_orig_tok" in entry:
            code = entry.get("verdict_code")
            if code is not None and 0 <= int(code) < len(WORDS):
                entry["verdict"] = WORDS[int(code)]
            history.append(entry)
        if history and any(entry.get(name) for name in ALARMS.values()):
            history[-1].setdefault("alarms", []).append(step)
    return history
