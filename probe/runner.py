"""Runs the phases of a probe on a device, with Lightning Fabric."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

import probe
from probe.callbacks.base import PHASES, ProbeCallback
from probe.config.checkpoint import DEMO
from probe.config.schema import ProbeConfig
from probe.config.trainer import Precision, TrainerConfig
from probe.errors.exceptions import ConfigError, ProbeError
from probe.module import EntropyProbe
from probe.phases.state import ProbeState
from probe.results.result import ProbeResult, build_values
from probe.scoring.collector import Progress
from probe.snapshot import evaluation_mode, exact_float32, isolated_rng

TrainerSection = TrainerConfig[ProbeCallback, Logger]
"""What `trainer:` gives, with the classes that callbacks and loggers are derived from."""


@dataclass(eq=False)
class ProbeRunner(TrainerSection):
    """Owns the devices, calls the phases of an `EntropyProbe` in order and the callbacks around each.

    It is made with the keys of `trainer:`, see `TrainerConfig`.

    Attributes:
        fabric: devices, precision, loggers and callbacks.
        state: what the phases of the current (or last) run produced.
        result: the last run's result.
        errors: what went wrong while publishing a result; raised when everything else is published.
        extra_callbacks: those of `trainer.callbacks`, called after the built-in ones.
    """

    def __post_init__(self) -> None:
        """Set the devices up.

        Raises:
            ConfigError: the devices or the precision cannot be had.
        """
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"trainer.precision: expected 32-true or bf16-mixed, found {self.precision!r}; the trainable weights "
                "stay in float32 (checkpoint.dtype sets the type of the frozen ones, and float64 that of all)"
            )
        own = self.callbacks
        self.extra_callbacks = [own] if isinstance(own, ProbeCallback) else list(own or [])
        self.state = ProbeState()
        self.result: ProbeResult | None = None
        self.errors: list[ProbeError] = []
        self.config = ProbeConfig()
        self._resolved: Mapping[str, Any] | None = None
        try:
            self.fabric = Fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self.strategy,
                precision=self.precision,
                loggers=_loggers(self.logger),
            )
        except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: the devices cannot be set up: {_first_line(error)}") from error
        if self.fabric.world_size > 1:
            raise ConfigError(
                f"trainer.devices: expected 1 device, found {self.fabric.world_size}; probing on several devices is "
                "not supported by this version"
            )

    def run(
        self,
        module: EntropyProbe,
        callbacks: Sequence[ProbeCallback] | None = None,
        resolved: Mapping[str, Any] | None = None,
    ) -> ProbeResult:
        """Probe a checkpoint: load it, draw E and U, predict, measure, report.

        Args:
            module: the policy to probe.
            callbacks: what computes and publishes; the runner's own come after them. By default those that the
                module's configuration asks for.
            resolved: the configuration that describes the run, where there is more to it than the module's own.

        Returns:
            The result. Global random state, and the module's parameters, optimizer and flags, are as before.

        Raises:
            ProbeError: see the phases; publishing errors come last and carry the mapping as `.results`.
        """
        self.config, self.state, self.errors, self.result = module.config, ProbeState(), [], None
        self._resolved = resolved
        started = datetime.now().astimezone()
        asked = probe.default_callbacks(module.config) if callbacks is None else callbacks
        called = [*asked, *self.extra_callbacks]
        self.fabric._callbacks = called
        if self.logger is True:  # one run, one version folder: TensorBoard ties hyper-parameters to it
            self.fabric._loggers = _loggers(True, Path(self.config.detailed_logging.output_directory))
        self.fabric.launch()
        try:
            with isolated_rng(), exact_float32():
                _seed_globals(module.seed)
                result = self._phases(module, called, started)
        except BaseException as error:
            self.fabric.call("on_exception", self, module, error)
            raise
        if self.errors:
            unpublished = self.errors[0]
            unpublished.results = dict(result.values)
            raise unpublished
        return result

    def measure_at(self, module: EntropyProbe, learning_rate: float) -> ProbeResult:
        """The last run's result as it would be with another learning rate; nothing is published.

        E, U and the direction of the update are the same; the prediction is scaled, the ground truth measured anew at
        `theta + step`. Parameters are never changed (except by `is_mode: resample`, which puts them back).

        Args:
            module: the module of the last run.
            learning_rate: `eta > 0`.

        Raises:
            ProbeError: as `run`.
        """
        base = self.state
        state = module.at_learning_rate(base, learning_rate)
        with isolated_rng(), exact_float32(), evaluation_mode(module):
            start = time.perf_counter()
            if module.config.importance.enabled:
                state.ground_truth = module.ground_truth(state)
            state.timing = {"ground_truth": time.perf_counter() - start}
            state.timing["total"] = state.timing["ground_truth"]
            return ProbeResult(
                values=build_values(state, module),
                config=self._config_mapping(module),
                checkpoint_name=module.files.name if module.files is not None else "policy",
                started_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            )

    def progress(self, phase: str) -> Callable[[str], Progress]:
        """For a phase, a function from the name of a pass to its progress callback."""

        def of_pass(what: str) -> Progress:
            return lambda done, total: self.fabric.call("on_progress", self, phase, done, total, what)

        return of_pass

    def _phases(
        self, module: EntropyProbe, callbacks: Sequence[ProbeCallback], started: datetime
    ) -> ProbeResult:
        """Run the phases in order, timed."""
        self.fabric.call("on_probe_start", self, module)
        if module.model is None and module.config.checkpoint.checkpoint_path == DEMO:
            with self._timed("make_demo"):
                module.make_demo()
        with self._timed("load"):
            module.autocast = self.fabric.autocast
            module.load(self.fabric.device)
        self.config = module.config  # with what the checkpoint has filled in
        with evaluation_mode(module):
            with self._phase("sample", module):
                module.sample(self.state, self.progress("sample"))
            for phase in PHASES[1:-1]:
                if any(phase in callback.phases for callback in callbacks):
                    with self._phase(phase, module):
                        self.fabric.call(f"run_{phase}", self, module)
        self.fabric.call("on_report_start", self, module)
        self.state.timing["total"] = sum(self.state.timing.values())
        result = ProbeResult(
            values=build_values(self.state, module),
            config=self._config_mapping(module),
            checkpoint_name=module.files.name if module.files is not None else "policy",
            started_at=started.isoformat(timespec="seconds"),
        )
        self.result = result
        self.errors.extend(self.state.unwritten)
        self.fabric.call("on_report_end", self, module, result)
        self.fabric.call("on_probe_end", self, module, result)
        return result

    def _config_mapping(self, module: EntropyProbe) -> dict[str, Any]:
        """The configuration that counted, as it is saved with a result: it can be run again as it is."""
        return asdict(module.config) if self._resolved is None else module.sources.applied_to(self._resolved)

    @contextmanager
    def _phase(self, phase: str, module: EntropyProbe) -> Iterator[None]:
        """Call the hooks around a phase and time it."""
        self.fabric.call(f"on_{phase}_start", self, module)
        with self._timed(phase):
            yield
        self.fabric.call(f"on_{phase}_end", self, module)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.state.timing[phase] = time.perf_counter() - start


def _seed_globals(seed: int) -> None:
    """Seed the global generators, for rewards that use them; the batches have streams of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _loggers(
    logger: Logger | list[Logger] | bool | None, folder: Path = Path("lightning_logs")
) -> list[Logger]:
    """Lightning's convention for the `logger` argument."""
    if logger is True:
        return [TensorBoardLogger(save_dir=folder, name="entropy_probe")]
    if logger is False or logger is None:
        return []
    return list(logger) if isinstance(logger, (list, tuple)) else [logger]


def _first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
