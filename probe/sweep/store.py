"""The folder of a sweep: one file per finished point, and the settings that all its points share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe import __version__
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError, LogError
from probe.files.atomic import atomic_write_bytes, ensure_writable
from probe.files.failures import write_error
from probe.files.strict_json import dump_bytes
from probe.from_checkpoint.sources import KEYS
from probe.sweep.grid import Grid, Point

try:
    import fcntl
except ImportError:  # Windows: two sweeps in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
"""What is kept of one point: its coordinates, `status`, `error`, `seconds` and the whole result mapping."""

MANIFEST, POINTS, LOCK, EVENTS = "sweep.json", "points", ".lock", "tensorboard"
TABLES = ("sweep.csv", "sweep.parquet")
SUMMARY = "sweep_summary.json"
POINT_SCHEMA, SWEEP_SCHEMA = "entropy-probe/sweep-point", "entropy-probe/sweep"
SCHEMA_VERSION = 1
GIVEN = "given explicitly"
_ELSEWHERE = "choose another --output_folder, or pass --overwrite to delete that sweep and start anew"
_PLOTS = ("eta*.png", "batch_size*.png", "checkpoints*.png")


class SweepFolder:
    """Keeps the points of a sweep: each one at once, whole or not at all.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Args: `path`, the folder; it is made by `locked`."""
        self.path = Path(path).expanduser()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock goes with the process, however that ends.

        Raises:
            LogError: the folder cannot be written, or another process sweeps into it.
        """
        if not self.path.is_dir() and not self.path.exists():
            ensure_writable(self.path)
        self._refuse_foreign_files()
        ensure_writable(self.path)
        with open(self.path / LOCK, "a", encoding="utf-8") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise LogError(
                        f"sweep.output_folder: expected one sweep at a time in {self.path}, found another process that "
                        "works there; wait for it, or choose another --output_folder"
                    ) from error
                except OSError:  # a network file system without locks
                    pass
            yield

    def open(self, grid: Grid, shared: Mapping[str, Any], overwrite: bool = False) -> dict[str, Record]:
        """Start a sweep in the folder, or continue the one that is there.

        Args:
            grid: the points. A sweep with fewer is continued; its points are all in this one.
            shared: settings that all points have in common, see `shared_settings`.
            overwrite: delete what a sweep left in the folder.

        Returns:
            The records of the grid's points that are there, failed ones included, by id.

        Raises:
            ConfigError: the folder holds a different sweep.
        """
        if overwrite:
            self.clear()
        manifest = {
            "schema": SWEEP_SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "axes": grid.axes,
            "config": dict(shared),
        }
        if (self.path / MANIFEST).exists():
            there = self._read_manifest()
            differences = [*_differences(there["config"], json.loads(dump_bytes(shared)))]
            differences += _lost_values(there["axes"], grid.axes)
            # a value that differs was in most cases not given on the other side: the value says it all
            differences = [text for text in differences if not text.startswith(GIVEN)] or differences
            if differences:
                raise ConfigError(
                    f"sweep.output_folder: expected a new folder or the same sweep, found a different one in "
                    f"{self.path}: {'; '.join(differences[:3])}"
                    f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; {_ELSEWHERE}"
                )
        atomic_write_bytes(self.path / MANIFEST, dump_bytes(manifest))
        self._remove((self.path / POINTS).glob(".tmp-*"))  # of a process that was killed while it wrote
        records = {point.id: self._read(point) for point in grid.points}
        return {id_: record for id_, record in records.items() if record is not None}

    def keep(self, record: Record) -> None:
        """Write the record of one point.

        Raises:
            LogError: it cannot be written.
        """
        data = {"schema": POINT_SCHEMA, "schema_version": SCHEMA_VERSION, "version": __version__, **record}
        atomic_write_bytes(self.path / POINTS / f"{record['id']}.json", dump_bytes(data))

    def clear(self) -> None:
        """Delete what sweeps write into their folder, and nothing else.

        Raises:
            LogError: a file cannot be deleted.
        """
        if not (self.path / MANIFEST).exists():
            return
        self._remove((self.path / POINTS).glob("*.json"))
        self._remove((self.path / POINTS).glob(".tmp-*"))
        self.clear_plots()
        # last: points without their manifest would be nobody's, should this be interrupted
        self._remove(self.path / name for name in (*TABLES, SUMMARY, MANIFEST))

    def clear_plots(self) -> None:
        """Delete the plots and TensorBoard's files of them."""
        for pattern in _PLOTS:
            self._remove(self.path.glob(pattern))
        self.clear_events()

    def clear_events(self) -> None:
        """Delete TensorBoard's files of the plots."""
        self._remove((self.path / EVENTS).glob("events.out.tfevents.*"))

    def _remove(self, files: Iterable[Path]) -> None:
        """Delete files."""
        for file in list(files):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(file, error) from error

    def _refuse_foreign_files(self) -> None:
        """Raise unless the folder is missing, empty, or that of a sweep."""
        if not self.path.is_dir() or (self.path / MANIFEST).exists():
            return
        names = sorted(entry.name for entry in self.path.iterdir())
        other = [name for name in names if name != LOCK and not name.startswith(".tmp-")]
        if other:
            raise ConfigError(
                f"sweep.output_folder: expected a new folder or that of a sweep, found {self.path} with {other[0]} in "
                "it; choose another --output_folder"
            )

    def _read_manifest(self) -> dict[str, Any]:
        """The settings of the sweep that is there."""
        with suppress(OSError, ValueError, KeyError):
            content = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            parts = [content[key] for key in ("axes", "config")] if isinstance(content, dict) else [None]
            if all(isinstance(p, dict) for p in parts) and content.get("schema_version") == SCHEMA_VERSION:
                return content
        raise ConfigError(
            f"sweep.output_folder: expected a sweep of this version in {self.path}, found a {MANIFEST} that is none; "
            f"{_ELSEWHERE}"
        )

    def _read(self, point: Point) -> Record | None:
        """The record of a point; None where there is none, or one that cannot be read."""
        with suppress(OSError, ValueError):
            record = json.loads((self.path / POINTS / f"{point.id}.json").read_text(encoding="utf-8"))
            if isinstance(record, dict) and record.get("schema_version") == SCHEMA_VERSION:
                return record if record.get("id") == point.id else None
        return None


def shared_settings(
    config: ProbeConfig, precision: str | None, given: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that all points of a sweep have in common and that can change a number.

    What only bounds memory may change between two sessions, so that a sweep that ran out of it can go on. Which keys
    are `given` counts as well: what stands beside the checkpoints fills in the others.
    """
    sections = asdict(config)
    kept = ("checkpoint", "batch_config", "generation", "probe_rework", "importance")
    varied = {"checkpoint_path", "B_E", "B_U", "G", "master_seed", "snapshot_device"}
    shared: dict[str, Any] = {
        name: {key: value for key, value in sections[name].items() if key not in varied} for name in kept
    }
    if config.probe_rework.from_checkpoint == "auto":
        shared[GIVEN] = {key: True for key in KEYS if key in given}
    return {**shared, "trainer": {"precision": precision}}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`section.key is A there and B here`, for every key that differs."""
    for key in dict.fromkeys((*there, *here)):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} is {old!r} there and {new!r} here"


def _lost_values(there: Mapping[str, list[Any]], here: Mapping[str, list[Any]]) -> list[str]:
    """The axes that have lost a value; more values only add points."""
    return [
        f"sweep.{axis} is {values} there and {here.get(axis, 'not swept')} here"
        for axis, values in there.items()
        if not set(values) <= set(here.get(axis, ()))
    ]
