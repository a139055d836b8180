"""Runs a sweep: the policy is loaded once per checkpoint, E and U are drawn once per combination of sizes and seed."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from probe.callbacks.console import say
from probe.callbacks.defaults import measuring_callbacks
from probe.config.files import read_config_file
from probe.config.parsing import parse_config
from probe.distributed.crew import crew_at_work
from probe.errors.exceptions import (
    CheckpointError,
    ConfigError,
    DataError,
    LogError,
    OptimizerStateError,
    ProbeError,
    RanksApartError,
)
from probe.module import EntropyProbe
from probe.results.result import ProbeResult
from probe.runner import ProbeRunner, TrainerSection
from probe.snapshot import one_thread
from probe.sweep.grid import DEMO, Combination, Grid, Point, build_grid, keys_given
from probe.sweep.plots.write import write_plots
from probe.sweep.progress import Tally, point_line
from probe.sweep.rescale import measure_at
from probe.sweep.settings import IncompleteSweepError, SweepConfig, sweep_config
from probe.sweep.store import Record, SweepFolder, shared_settings
from probe.sweep.summary import write_summary
from probe.sweep.table import build_table, write_table


def run_sweep(config: Mapping[str, Any] | str | Path, **sweep: Any) -> pd.DataFrame:
    """Sweep from Python, in a notebook for example.

    Args:
        config: sections as mappings, a YAML file, or the name of a shipped configuration; a section `sweep` may
            give the same keys as the keyword arguments.
        **sweep: the fields of `SweepConfig`; sequences and arrays are as good as lists.

    Returns:
        The table, one row per point, as in `sweep.parquet`. Points that failed have their reason in `error`.

    Raises:
        ConfigError: an unknown key, a wrong value, or a folder that holds a different sweep.
        ProbeError: an error that would hit every point.
    """
    given = dict(read_config_file(config) if isinstance(config, (str, Path)) else config)
    options = sweep_config({**(given.pop("sweep", None) or {}), **sweep})
    resolved = parse_config(given, TrainerSection)
    runner = ProbeRunner(**resolved.trainer)
    return execute(runner, EntropyProbe(resolved.probe, resolved.seed, resolved.given), options)


def execute(runner: ProbeRunner, module: EntropyProbe, sweep: SweepConfig) -> pd.DataFrame:
    """Measure the points that are missing, and write table, summary and plots.

    Args:
        runner: devices and callbacks. The callbacks that publish single runs are left out.
        module: the configuration that all points share, with its policy where checkpoints are not swept. It is left
            as configured for the last point.
        sweep: what is swept.

    Returns:
        The table.

    Raises:
        ConfigError: impossible settings, or a folder that holds a different sweep.
        ProbeError: an error that would hit every point. What was finished before it is kept.
    """
    if module.configured.attribution.enabled:
        raise ConfigError(
            "attribution.enabled: expected false in a sweep, whose table has no place for it, found true; take "
            "entropy-probe attribute for single points"
        )
    grid = build_grid(sweep, module.configured, module.seed, module.given)
    runner.launch()
    ranks, folder = runner.ranks, SweepFolder(sweep.output_folder)
    threads = one_thread if module.configured.checkpoint.checkpoint_path == DEMO else nullcontext
    with crew_at_work(runner.crew), folder.locked() if ranks.first else nullcontext(), threads():
        shared = shared_settings(module.configured, runner.precision, module.given)
        # one folder, which the first rank alone writes to
        records = ranks.from_first("records", lambda: folder.open(grid, shared, sweep.overwrite))
        loop = _Sweep(runner, module, sweep, grid, folder, records)
        loop.run()
        if ranks.first:
            write_summary(loop.table(), folder.path)
            plots = write_plots(loop.table(), folder)
            say(runner, loop.tally.closing(folder.path, len(plots)) + "\n")
    return loop.table()


def refuse_failures(table: pd.DataFrame) -> None:
    """Raise where points of a sweep have failed.

    Raises:
        IncompleteSweepError: names the count and the first reason.
    """
    failed = table[table["status"] == "failed"]
    if len(failed):
        raise IncompleteSweepError(
            f"{len(failed)} of {len(table)} points failed, the first one with: {failed['error'].iloc[0]}; the others "
            "are kept, and the same command tries the failed ones again"
        )


class _Sweep:
    """The loop over a grid, and what is known of its points.

    Attributes:
        records: the records of finished and failed points, by id.
        tally: counts and times of this session.
    """

    def __init__(
        self,
        runner: ProbeRunner,
        module: EntropyProbe,
        sweep: SweepConfig,
        grid: Grid,
        folder: SweepFolder,
        records: dict[str, Record],
    ) -> None:
        self.runner, self.module, self.sweep = runner, module, sweep
        self.grid, self.folder, self.records = grid, folder, records
        done = {id_ for id_, record in records.items() if record["status"] == "ok"}
        self.pending = {point.id for point in grid.points} - done
        self.tally = Tally(total=len(grid.points), done=len(done), failed=0)
        self.base, self.seed = module.configured, module.seed
        self.given = keys_given(sweep, module.given)

    def table(self) -> pd.DataFrame:
        """The table of what is there, in the order of the grid."""
        return build_table(self.records[p.id] for p in self.grid.points if p.id in self.records)

    def run(self) -> None:
        """Measure what is pending; a table stands in the folder at any time."""
        waiting = [c for c in self.grid.combinations if self._waiting(c)]
        self.tally.runs_left = len(waiting)
        say(self.runner, self.tally.opening(self.folder.path) + "\n")
        if self.records and self.runner.ranks.first:
            write_table(self.table(), self.folder.path)
        by_checkpoint: dict[str, list[Combination]] = {}
        for combination in waiting:
            by_checkpoint.setdefault(combination.first.checkpoint, []).append(combination)
        try:
            for combinations in by_checkpoint.values():
                self._checkpoint(combinations)
        except KeyboardInterrupt:
            kept = f"{self.tally.done} of {self.tally.total} points are kept in {self.folder.path}"
            again = "the same command without --overwrite" if self.sweep.overwrite else "the same command"
            raise KeyboardInterrupt(f"interrupted; {kept}, {again} continues") from None

    def _waiting(self, combination: Combination) -> list[Point]:
        """The points of a combination that are still to be measured."""
        return [point for point in combination.points if point.id in self.pending]

    def _checkpoint(self, combinations: list[Combination]) -> None:
        """All combinations of one checkpoint, with one policy, which nothing holds on to afterwards."""
        module = self.module
        if self.sweep.checkpoints is not None:
            config = combinations[0].configure(self.base, self.sweep)
            module = type(self.module)(config, self.seed, self.given)
        for i, combination in enumerate(combinations):
            try:
                self._combination(module, combination)
            except (CheckpointError, OptimizerStateError) as error:
                if self._hits_every_point(error):
                    raise
                for hopeless in combinations[i:]:  # none of them can be loaded
                    self._fail(self._waiting(hopeless), error)
                return

    def _combination(self, module: EntropyProbe, combination: Combination) -> None:
        """One run, and one more measurement per further learning rate."""
        points = self._waiting(combination)
        self.tally.start_run()
        try:
            config = combination.configure(self.base, self.sweep)
            module.reconfigure(config, combination.first.seed, self.given)
            result = self.runner.run(module, measuring_callbacks(module.config))
        except Exception as error:
            if isinstance(error, (CheckpointError, OptimizerStateError)) or self._hits_every_point(error):
                raise
            self._fail(points, error)
            return
        self.tally.end_run()
        own = result.values["learning_rate"]
        for point in points:
            eta = point.eta(own)
            try:
                same = math.isclose(eta, own, rel_tol=1e-9)
                found = result if same else measure_at(self.runner, module, eta)
            except Exception as error:
                self._fail([point], error)
            else:
                self._keep(point, found, own)

    def _hits_every_point(self, error: Exception) -> bool:
        """Whether an error is in what all points have in common, so that there is no use in going on."""
        if isinstance(error, RanksApartError):
            return True
        if isinstance(error, (CheckpointError, OptimizerStateError)):
            return len(self.grid.axes["checkpoints"]) == 1
        if isinstance(error, (ConfigError, DataError, LogError)):
            varied = [f"batch_config.{axis}" for axis in ("B_E", "B_U", "G") if axis in self.grid.varying]
            varied += ["checkpoint."] if "checkpoints" in self.grid.varying else []
            return not any(key in str(error) for key in varied)
        return False

    def _keep(self, point: Point, result: ProbeResult, own: float) -> None:
        """Keep a finished point."""
        record = self._record(point, "ok", None) | {
            "checkpoint_name": result.checkpoint_name,
            "own_learning_rate": own,
            "values": dict(result.values),
        }
        self._write(point, record)

    def _fail(self, points: list[Point], error: Exception) -> None:
        """Keep the reason why points failed; they are tried again by the next invocation."""
        reason = " ".join(str(error).split())
        if not isinstance(error, ProbeError):  # not foreseen: where it happened is worth knowing
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        for point in points:
            record = self._record(point, "failed", reason)
            if not isinstance(error, ProbeError):
                record["traceback"] = "".join(traceback.format_exception(error))
            self._write(point, record)

    def _record(self, point: Point, status: str, reason: str | None) -> Record:
        """What the records of finished and failed points have in common."""
        return {
            "id": point.id,
            "point": asdict(point),
            "G_E": self.base.batch_config.G_E,
            "status": status,
            "error": reason,
            "seconds": self.tally.lap(failed=status == "failed"),
            "finished_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        }

    def _write(self, point: Point, record: Record) -> None:
        """Write the point's file first, then the table, and say so."""
        self.records[point.id] = record
        self.pending.discard(point.id)
        with self.runner.ranks.together("point"):
            if self.runner.ranks.first:
                self.folder.keep(record)
                write_table(self.table(), self.folder.path)
        say(self.runner, point_line(point, record, self.grid, self.tally) + "\n")
