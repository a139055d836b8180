"""The folder of log files: which are whose, and how many are kept."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from probe.files.failures import write_error
from probe.files.log_files import CONFIG_SCHEMA, LOG_SCHEMA, SUMMARY_SCHEMA

DATE_FOLDERS = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
"""The pattern of the folders that logs go into."""


def prune(directory: str | os.PathLike[str], max_files: int, keep: Path | None = None) -> list[Path]:
    """Delete the oldest runs in `directory` beyond `max_files`, each with all its files.

    Only files in folders named by a date are looked at, and only those that say at their beginning that they
    are a log, summary or configuration of this package. Folders that this empties are removed.

    Args:
        directory: the folder that has the folders per date.
        max_files: how many runs stay.
        keep: a file of a run that stays in any case.

    Returns:
        The deleted files.

    Raises:
        LogError: a file cannot be deleted.
    """
    runs: dict[Path, _StoredRun] = {}
    for folder in Path(directory).glob(DATE_FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            own = _own_file(path)
            if own is not None:
                stem, started_at = own
                runs.setdefault(folder / stem, _StoredRun(started_at)).files.append(path)
    # Runs of the same second were numbered in the order in which they ended.
    oldest_first = sorted(runs, key=lambda run: (runs[run].started_at, _numbered(run.name)))
    excess = oldest_first[: max(len(runs) - max_files, 0)]
    doomed = [path for run in excess if keep not in runs[run].files for path in runs[run].files]
    for path in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
    for folder in {path.parent for path in doomed}:
        # Fails where something is left in it, or where another process was faster: both are fine.
        with suppress(OSError):
            folder.rmdir()
    return doomed


@dataclass
class _StoredRun:
    """The files of one run in a log folder."""

    started_at: str
    files: list[Path] = field(default_factory=list)


def _own_file(path: Path) -> tuple[str, str] | None:
    """The run's name and start where `path` is one of the three files of a run, else None."""
    kind = _kind(path.name)
    if kind is None or path.is_symlink() or not path.is_file():
        return None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(1000).decode("utf-8", "replace")
    except (EOFError, OSError, zlib.error):
        return None
    schema = re.match(r'(?:\{\s*"schema": "|# schema: )(entropy-probe/\w+)', head)
    started_at = re.search(r'started_at"?: "?([0-9T:.+-]+)', head)
    if schema is None or started_at is None or schema.group(1) != kind[0]:
        return None
    return kind[1], started_at.group(1)


def _kind(name: str) -> tuple[str, str] | None:
    """The schema that a file of this name has, and the run's name.

    >>> _kind("run_summary.json"), _kind("run.json.gz"), _kind("events.out.tfevents.1")
    (('entropy-probe/summary', 'run'), ('entropy-probe/log', 'run'), None)
    """
    endings = (
        ("_summary.json", SUMMARY_SCHEMA),
        ("_config.yaml", CONFIG_SCHEMA),
        (".json.gz", LOG_SCHEMA),
        (".json", LOG_SCHEMA),
    )
    for ending, schema in endings:
        if name.endswith(ending) and len(name) > len(ending):
            return schema, name.removesuffix(ending)
    return None


def _numbered(name: str) -> tuple[str, int]:
    """A key under which `run`, `run_2`, ..., `run_10` stand in this order."""
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, 1)
