"""What is swept, as it is configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from probe.config.numbers import is_finite
from probe.errors.exceptions import ConfigError, ProbeError, closest, did_you_mean, require
from probe.limits import LARGEST_COUNT, LARGEST_SEED

DEFAULT_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The learning rates of a sweep that names no axis, as multiples of the policy's own."""


class IncompleteSweepError(ProbeError):
    """Some points of a sweep have failed; the others, the table and the plots are there."""


@dataclass(frozen=True)
class SweepConfig:
    """What `entropy-probe sweep` varies: the points are their product. `--B_E` is short for `--sweep.B_E`."""

    learning_rates: list[float] | None = None
    """Learning rates of the update. All are measured on the same E, U and update direction."""
    eta_factors: list[float] | None = None
    """Learning rates as multiples of the run's own (probe_rework.learning_rate, else the saved one). When nothing at
    all is swept: 1/8, 1/4, 1/2, 1, 2, 4, 8; when only other things are: 1."""
    B_E: list[int] | None = None
    """Prompts of E, in place of batch_config.B_E."""
    B_U: list[int] | None = None
    """Prompts in U, in place of batch_config.B_U."""
    G: list[int] | None = None
    """Responses per prompt of U, in place of batch_config.G."""
    seeds: list[int] | None = None
    """Master seeds of the batches, in place of seed_everything: repetitions with fresh E and U."""
    checkpoints: list[str] | str | None = None
    """A folder of `checkpoint-N` as transformers' Trainer and TRL write it (taken in the order of N), or a list of
    checkpoint folders; in place of checkpoint.checkpoint_path."""
    output_folder: str = "lightning_logs/sweep"
    """Folder of the finished points, tables and plots. The same command continues the sweep that is in it."""
    overwrite: bool = False
    """Delete the sweep that is in the folder and start anew."""

    def __post_init__(self) -> None:
        """Check every list."""
        if self.learning_rates is not None and self.eta_factors is not None:
            raise ConfigError(
                "sweep.eta_factors: expected null where sweep.learning_rates is given, found both; leave one out"
            )
        for key in ("learning_rates", "eta_factors"):
            _check_list(key, getattr(self, key), _is_rate, "finite numbers above 0")
        for key, least in (("B_E", 2), ("B_U", 1), ("G", 2), ("seeds", 0)):
            most = LARGEST_SEED if key == "seeds" else LARGEST_COUNT
            what = f"integers of at least {least} and at most {most}"
            _check_list(key, getattr(self, key), partial(_is_count, least, most), what)
        if isinstance(self.checkpoints, list):
            _check_list("checkpoints", self.checkpoints, bool, "checkpoint folders")
        require(self.output_folder != "", "sweep.output_folder", "the name of a folder", self.output_folder)

    @property
    def axes_given(self) -> bool:
        """Whether anything is swept besides the default."""
        swept = (self.learning_rates, self.eta_factors, self.B_E, self.B_U, self.G, self.seeds)
        return any(values is not None for values in swept) or self.checkpoints is not None


def sweep_config(given: Mapping[str, Any]) -> SweepConfig:
    """A `SweepConfig` from keys and values.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    known = [field.name for field in fields(SweepConfig)]
    for key in given:
        if key not in known:
            near = closest(key, known)
            hint = did_you_mean(near and f"sweep.{near}", f"the keys are {', '.join(known)}")
            raise ConfigError(f"sweep.{key}: unknown configuration key{hint}")
    lists = [key for key in known if key not in ("output_folder", "overwrite")]
    return SweepConfig(**{key: _plain(key, value) if key in lists else value for key, value in given.items()})


def _check_list(key: str, values: list[Any] | None, allowed: Callable[[Any], bool], what: str) -> None:
    """Raise `ConfigError` unless the list is null, or has different values that are all allowed."""
    if values is None:
        return
    if not values:
        raise ConfigError(f"sweep.{key}: expected a list of {what}, found an empty one; leave it out")
    for i, value in enumerate(values):
        require(allowed(value), f"sweep.{key}", what, value)
        if value in values[:i]:
            raise ConfigError(f"sweep.{key}: expected different values, found {value!r} twice")


def _is_rate(value: Any) -> bool:
    """Whether a value can be a learning rate or a factor of one."""
    return is_finite(value) and value > 0


def _is_count(least: int, most: int, value: Any) -> bool:
    """Whether a value is an integer from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _plain(key: str, value: Any) -> Any:
    """A sequence or array as a list of plain values, a path as its text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value)
    values = value.tolist() if hasattr(value, "tolist") else value
    try:
        return [
            str(item) if isinstance(item, Path) else getattr(item, "item", lambda i=item: i)()
            for item in values
        ]
    except TypeError as error:
        raise ConfigError(f"sweep.{key}: expected a list, found {value!r}") from error
