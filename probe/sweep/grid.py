"""The grid of points that a sweep stands for."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from probe.config.checkpoint import DEMO
from probe.config.output import OutputConfig
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.from_checkpoint.fill import filled_config
from probe.rollouts.tables import has_update
from probe.sweep.settings import DEFAULT_FACTORS, SweepConfig

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(?:^|[-_.])(\d+)$")


@dataclass(frozen=True)
class Point:
    """One point of the grid: one row of the table.

    Attributes:
        checkpoint: absolute path of the checkpoint, or `demo`.
        seed: master seed of the batches.
        B_U: prompts in U.
        G: responses per prompt of U.
        B_E: prompts of E.
        learning_rate: the learning rate, or None where `eta_factor` says it.
        eta_factor: the learning rate as a multiple of the run's own, or None.
    """

    checkpoint: str
    seed: int
    B_U: int
    G: int
    B_E: int
    learning_rate: float | None
    eta_factor: float | None

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on the coordinates only.

        >>> Point("demo", 42, 32, 8, 1024, None, 1.0).id
        '55e490fb47fced66'
        """
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def eta(self, own: float) -> float:
        """The learning rate, given the run's own."""
        if self.learning_rate is not None:
            return self.learning_rate
        return own if self.eta_factor is None else self.eta_factor * own


@dataclass(frozen=True)
class Combination:
    """The points that share everything but the learning rate: one run, then one more measurement per point."""

    points: tuple[Point, ...]

    @property
    def first(self) -> Point:
        """A point with the coordinates that all have in common."""
        return self.points[0]

    def configure(self, config: ProbeConfig, sweep: SweepConfig) -> ProbeConfig:
        """The configuration of this combination's run, which writes no files of its own."""
        point, rework = self.first, config.probe_rework
        config = replace(
            config,
            batch_config=replace(config.batch_config, B_E=point.B_E, B_U=point.B_U, G=point.G),
            detailed_logging=replace(config.detailed_logging, enabled=False),
            output=OutputConfig(),
        )
        if sweep.seeds is not None:  # which a master seed would override
            config = replace(config, probe_rework=replace(rework, master_seed=None))
        if sweep.checkpoints is not None:
            config = replace(config, checkpoint=replace(config.checkpoint, checkpoint_path=point.checkpoint))
        return config


@dataclass(frozen=True)
class Grid:
    """All points of a sweep.

    Attributes:
        axes: the values along each axis, by its name in `SweepConfig`; those not swept have one.
        combinations: the points in the order in which they are measured: checkpoints outermost.
    """

    axes: dict[str, list[Any]]
    combinations: tuple[Combination, ...]

    @property
    def points(self) -> list[Point]:
        """The points in order."""
        return [point for combination in self.combinations for point in combination.points]

    @property
    def varying(self) -> list[str]:
        """The axes with more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]


def build_grid(sweep: SweepConfig, config: ProbeConfig, seed: int, given: Collection[str] = ()) -> Grid:
    """The grid that a sweep of a configuration stands for.

    Args:
        sweep: what is swept.
        config: what has one value everywhere, but for what stands beside each checkpoint.
        seed: master seed where none are swept.
        given: the keys that the configuration gives explicitly, which count before what stands beside a checkpoint.

    Raises:
        ConfigError: an axis that could change nothing, or checkpoints that are not there.
    """
    _refuse_idle_axes(sweep, config)
    if sweep.checkpoints is None:
        checkpoints = [_own_checkpoint(config)]
    else:
        checkpoints = find_checkpoints(sweep.checkpoints)
        if isinstance(sweep.checkpoints, str):
            checkpoints = _with_rollouts(checkpoints, config.batch_config.U_rollouts)
    eta_name, etas = _etas(sweep)
    seeds = [seed] if sweep.seeds is None else list(sweep.seeds)
    B_Es = list(sweep.B_E or [config.batch_config.B_E])
    sizes = {path: _update_sizes(sweep, config, path, given) for path in checkpoints}
    axes: dict[str, list[Any]] = {
        "checkpoints": checkpoints,
        "seeds": seeds,
        "B_U": list(dict.fromkeys(B_U for B_Us, _ in sizes.values() for B_U in B_Us)),
        "G": list(dict.fromkeys(G for _, Gs in sizes.values() for G in Gs)),
        "B_E": B_Es,
        eta_name: etas,
    }
    by_factor = eta_name == "eta_factors"
    combinations = tuple(
        Combination(
            tuple(
                Point(checkpoint, seed, B_U, G, B_E, None if by_factor else eta, eta if by_factor else None)
                for eta in etas
            )
        )
        for checkpoint in checkpoints
        for seed, B_U, G, B_E in itertools.product(seeds, *sizes[checkpoint], B_Es)
    )
    return Grid(axes, combinations)


def keys_given(sweep: SweepConfig, given: Collection[str]) -> frozenset[str]:
    """The keys that a configuration and the axes of a sweep give explicitly."""
    axes = [axis for axis in ("B_E", "B_U", "G") if getattr(sweep, axis) is not None]
    return frozenset(given) | {f"batch_config.{axis}" for axis in axes}


def _update_sizes(
    sweep: SweepConfig, config: ProbeConfig, checkpoint: str, given: Collection[str]
) -> tuple[list[int], list[int]]:
    """The values of `B_U` and of `G` for a checkpoint: the sweep's, else those that count without one."""
    if sweep.B_U is None or sweep.G is None:
        own = replace(config, checkpoint=replace(config.checkpoint, checkpoint_path=checkpoint))
        config = config if checkpoint == DEMO else filled_config(own, keys_given(sweep, given))
    batch = config.batch_config
    return list(sweep.B_U or [batch.B_U]), list(sweep.G or [batch.G])


def _with_rollouts(checkpoints: list[str], U_rollouts: str | None) -> list[str]:
    """The checkpoints of a run whose next update's rollouts lie in a folder: after the last one there was none.

    Raises:
        ConfigError: none has any.
    """
    folder = None if U_rollouts is None else Path(U_rollouts).expanduser()
    if folder is None or not folder.is_dir():
        return checkpoints
    numbers = {path: _NUMBERED.search(Path(path).name) for path in checkpoints}
    lacking = [
        path for path, n in numbers.items() if n is not None and not has_update(folder, int(n.group(1)) + 1)
    ]
    if len(lacking) == len(checkpoints):
        raise ConfigError(
            f"batch_config.U_rollouts: expected rollouts of an update after one of the checkpoints in {folder}, found "
            f"none (checkpoint-60 needs those of update 61)"
        )
    for path in lacking:
        logger.warning("%s is left out: %s has no rollouts of the update after it", path, folder)
    return [path for path in checkpoints if path not in lacking]


def find_checkpoints(given: str | Sequence[str]) -> list[str]:
    """The checkpoint folders of a list, or in a folder, in the order of their numbers.

    Raises:
        ConfigError: a folder is missing or has no checkpoints in it.
    """
    if not isinstance(given, str):
        paths = [_absolute(path) for path in given]
        for path in paths:
            if path != DEMO and not Path(path).is_dir():
                raise ConfigError(f"sweep.checkpoints: expected existing folders, found no folder {path}")
        if len(set(paths)) < len(paths):
            raise ConfigError("sweep.checkpoints: expected different folders, found one of them twice")
        return paths
    folder = Path(_absolute(given))
    if given == DEMO or not folder.is_dir():
        raise ConfigError(
            f"sweep.checkpoints: expected a folder with checkpoint-N in it, found no folder {folder}; give its path, "
            'or a list of checkpoints such as "[runs/checkpoint-20, runs/checkpoint-40]"'
        )
    numbered = [
        (int(match.group(1)), path.name, str(path))
        for path in folder.iterdir()
        if path.is_dir() and (match := _NUMBERED.search(path.name))
    ]
    # Other numbered folders (logs by date, say) may stand beside the checkpoints.
    usual = [entry for entry in numbered if entry[1].startswith("checkpoint-")]
    found = [path for _, _, path in sorted(usual or numbered)]
    if not found:
        raise ConfigError(
            f"sweep.checkpoints: expected checkpoint-N folders in {folder}, found none; give the folder that holds "
            'them, or a list of checkpoints such as "[runs/checkpoint-20, runs/checkpoint-40]"'
        )
    return found


def _etas(sweep: SweepConfig) -> tuple[str, list[float]]:
    """The axis of learning rates: its name in `SweepConfig` and its values."""
    if sweep.learning_rates is not None:
        return "learning_rates", [float(eta) for eta in sweep.learning_rates]
    if sweep.eta_factors is not None:
        return "eta_factors", [float(factor) for factor in sweep.eta_factors]
    return "eta_factors", [1.0] if sweep.axes_given else list(DEFAULT_FACTORS)


def _own_checkpoint(config: ProbeConfig) -> str:
    """The checkpoint of the configuration."""
    path = config.checkpoint.checkpoint_path
    if not path:
        raise ConfigError(
            "checkpoint.checkpoint_path: expected a checkpoint folder (or `demo`), found none; set it in the config, "
            "pass --checkpoint PATH, or sweep over --checkpoints FOLDER"
        )
    return _absolute(path)


def _refuse_idle_axes(sweep: SweepConfig, config: ProbeConfig) -> None:
    """Raise `ConfigError` where a setting outside the sweep makes an axis change nothing."""
    batch = config.batch_config
    for axis, files in (("B_E", "E_rollouts"), ("B_U", "U_rollouts"), ("G", "U_rollouts")):
        if getattr(sweep, axis) is not None and getattr(batch, files) is not None:
            raise ConfigError(
                f"sweep.{axis}: expected null with batch_config.{files}, which fixes the batch, found "
                f"{getattr(sweep, axis)}; leave one of them out"
            )
    if sweep.seeds is not None and batch.E_rollouts is not None and batch.U_rollouts is not None:
        raise ConfigError(
            "sweep.seeds: expected null where both batches come from rollout files (nothing is drawn), found "
            f"{sweep.seeds}; leave one of them out"
        )
    if sweep.checkpoints is not None and config.checkpoint.optimizer_path is not None:
        raise ConfigError(
            "checkpoint.optimizer_path: expected null with sweep.checkpoints (each checkpoint has a state of its own), "
            f"found {config.checkpoint.optimizer_path!r}; leave it out"
        )


def _absolute(path: str) -> str:
    """An absolute path; `demo`, which is not a path, as it is."""
    return path if path == DEMO else os.path.abspath(os.path.expanduser(path))
