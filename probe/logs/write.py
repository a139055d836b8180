"""Log, summary and configuration of a run, written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from probe.config.output import DetailedLoggingConfig
from probe.files.atomic import atomic_create_bytes, atomic_write_bytes
from probe.files.log_files import CONFIG_SCHEMA
from probe.files.strict_json import dump_bytes, to_plain
from probe.logs.document import build_log, summary

if TYPE_CHECKING:
    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult


@dataclass(frozen=True)
class LogPaths:
    """The files of one run.

    Attributes:
        main: the log itself, `NAME.json` or `NAME.json.gz`.
        summary: the core metrics, `NAME_summary.json`.
        config: the resolved configuration, `NAME_config.yaml`; it can be run again.
    """

    main: Path
    summary: Path
    config: Path


def write_log(
    result: ProbeResult,
    state: ProbeState,
    config: DetailedLoggingConfig,
    token_text: Callable[[int], str] | None = None,
) -> LogPaths:
    """Write the three files of a run into `<output_directory>/YYYY-MM-DD/`, under a name that is not taken.

    Each file gets its name when it is complete. The configuration comes first, and keeps the name for this run; the
    summary comes last: where there is one, the run's files are all there.

    Args:
        result: what the run found.
        state: what it produced on the way.
        config: the section `detailed_logging`.
        token_text: the text of one token id, for level `debug`.

    Returns:
        The paths of the files.

    Raises:
        LogError: a file cannot be written. Files that were complete by then stay.
    """
    main = dump_bytes(log_of(result, state, config, token_text), config.compress)
    folder = Path(config.output_directory) / _date(result)
    paths = _claim(folder, log_name(result, config), ".json.gz" if config.compress else ".json", result)
    try:
        atomic_write_bytes(paths.main, main)
    except BaseException:
        with suppress(OSError):
            paths.config.unlink()
            folder.rmdir()  # fails where it holds something else
        raise
    files = {"main": paths.main.name, "config": paths.config.name}
    atomic_write_bytes(paths.summary, dump_bytes(summary(result, config.level, files)))
    return paths


def log_of(
    result: ProbeResult,
    state: ProbeState,
    config: DetailedLoggingConfig,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """The main log of a run; see `write_log`. Where processes hold parts of the step, all of them make it together."""
    return build_log(
        result,
        state,
        level=config.level,
        log_sequences=config.log_sequences,
        log_tokens=config.log_tokens,
        log_raw_tensors=config.log_raw_tensors,
        token_text=token_text,
    )


def log_name(result: ProbeResult, config: DetailedLoggingConfig) -> str:
    """The name of a run's files without ending, from `filename_template`.

    The fields are the time and date of the run's start, the checkpoint's name (see `safe_name`), the level and
    the seed.
    """
    seed = result.config.get("seed_everything")
    return config.filename_template.format(
        time=datetime.fromisoformat(result.started_at).strftime("%H-%M-%S"),
        date=_date(result),
        checkpoint=safe_name(result.checkpoint_name),
        level=config.level,
        seed="none" if seed is None else seed,
    )


def safe_name(name: str) -> str:
    """`name` as part of a file name on any system: letters, digits, dots, dashes, underscores; at most 80.

    >>> safe_name("../runs/step 60")
    'runs_step_60'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80] or "checkpoint"


def _date(result: ProbeResult) -> str:
    """The date of the run's start, `YYYY-MM-DD`."""
    return datetime.fromisoformat(result.started_at).strftime("%Y-%m-%d")


def _claim(folder: Path, name: str, ending: str, result: ProbeResult) -> LogPaths:
    """The paths for `name`, or `name_2`, ...: the first that are free, claimed by the run's configuration."""
    config = _config_yaml(result).encode("utf-8", "backslashreplace")
    number = 1
    while True:
        stem = name if number == 1 else f"{name}_{number}"
        paths = LogPaths(
            main=folder / f"{stem}{ending}",
            summary=folder / f"{stem}_summary.json",
            config=folder / f"{stem}_config.yaml",
        )
        others = (folder / f"{stem}.json", folder / f"{stem}.json.gz", paths.summary)
        if not any(os.path.lexists(path) for path in others) and atomic_create_bytes(paths.config, config):
            return paths
        number += 1


def _config_yaml(result: ProbeResult) -> str:
    """The resolved configuration as YAML that can be run again; its head tells `prune` what it is."""
    head = f"# schema: {CONFIG_SCHEMA}\n# started_at: {result.started_at}\n"
    config = to_plain(result.config, "config", keep_non_finite=True)
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
