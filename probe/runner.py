"""Runs the phases of a probe on a device, with Lightning Fabric."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

from probe.callbacks.base import PHASES, ProbeCallback
from probe.config.checkpoint import DEMO
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError, ProbeError
from probe.module import EntropyProbe
from probe.phases.state import ProbeState
from probe.results.build import build_result
from probe.results.result import ProbeResult
from probe.scoring.collector import Progress
from probe.snapshot import evaluation_mode, exact_float32, isolated_rng, one_thread
from probe.sweep.settings import SweepConfig

Precision = Literal["32-true", "bf16-mixed"]
"""Fabric's name of the precision of forward passes. Trainable weights, moments and steps stay as loaded."""


NEXT_STEPS = """
Next:
  {bin}tensorboard --logdir lightning_logs
      look at the diagnostics
  {bin}entropy-probe demo --probe_rework.learning_rate 5e-3
      a larger step: where does first order end?
  {bin}entropy-probe run --checkpoint FOLDER --batch_config.dataset_name prompts.jsonl --batch_config.split train \\
      --batch_config.reward my_rewards:accuracy
      your own checkpoint, prompts and reward; every option: {bin}entropy-probe run --help"""


class ProbeRunner:
    """Owns the devices, calls the phases of an `EntropyProbe` in order and the callbacks around each.

    Attributes:
        fabric: devices, precision, loggers and callbacks.
        state: what the phases of the current (or last) run produced.
        result: the last run's result.
        errors: what went wrong while publishing a result; raised when everything else is published.
        default_logger: whether each run has a TensorBoard logger with a folder of its own.
        publish: whether the built-in callbacks publish a result (report, log files, TensorBoard); a sweep, which has a
            table of its own, switches them off.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        devices: list[int] | str | int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: Precision = "32-true",
        callbacks: list[ProbeCallback] | ProbeCallback | None = None,
        logger: Logger | list[Logger] | bool | None = True,
    ) -> None:
        """Set the devices up.

        Args:
            accelerator: `cpu`, `gpu` or `auto`.
            devices: how many devices, or which.
            num_nodes: number of machines.
            strategy: how processes work together.
            precision: precision of forward passes.
            callbacks: further callbacks, called after the built-in ones.
            logger: a Lightning logger or several; true is a TensorBoardLogger in
                `detailed_logging.output_directory`, false is none.

        Raises:
            ConfigError: the devices or the precision cannot be had.
        """
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision: expected 32-true or bf16-mixed, found {precision!r}; the trainable weights stay "
                "in float32 (checkpoint.dtype sets the type of the frozen ones, and float64 that of all)"
            )
        self.extra_callbacks = [callbacks] if isinstance(callbacks, ProbeCallback) else list(callbacks or [])
        self.default_logger = logger is True
        self.state = ProbeState()
        self.result: ProbeResult | None = None
        self.errors: list[ProbeError] = []
        self.publish = True
        self.config = ProbeConfig()
        self.resolved: dict[str, Any] = {}
        try:
            self.fabric = Fabric(
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy,
                precision=precision,
                loggers=_loggers(logger),
            )
        except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: the devices cannot be set up: {_first_line(error)}") from error
        if self.fabric.world_size > 1:
            raise ConfigError(
                f"trainer.devices: expected 1 device, found {self.fabric.world_size}; probing on several devices is "
                "not supported by this version"
            )

    def run(self, module: EntropyProbe) -> ProbeResult:
        """Probe a checkpoint: load it, draw E and U, predict, measure, report.

        Args:
            module: the policy to probe.

        Returns:
            The result. Global random state, and the module's parameters, optimizer and flags, are as before.

        Raises:
            ProbeError: see the phases; publishing errors come last and carry the mapping as `.results`.
        """
        self.config, self.state, self.errors, self.result = module.config, ProbeState(), [], None
        started = datetime.now().astimezone()
        callbacks = [*default_callbacks(module.config, self.publish), *self.extra_callbacks]
        self.fabric._callbacks = callbacks
        if self.default_logger:  # one run, one version folder: TensorBoard ties hyper-parameters to it
            self.fabric._loggers = _loggers(True, Path(self.config.detailed_logging.output_directory))
        self.fabric.launch()
        try:
            with isolated_rng(), exact_float32():
                _seed_globals(module.seed)
                result = self._phases(module, callbacks, started)
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
            return build_result(state, module, self._config_mapping(module), datetime.now().astimezone())

    def demo(self, module: EntropyProbe) -> ProbeResult:
        """Probe the built-in demo policy (made when absent) and say what to try next.

        Args:
            module: as configured by `configs/quickstart.yaml`.
        """
        with one_thread():  # the model is so small that threads would mostly wait for each other
            result = self.run(module)
        on_path = shutil.which("entropy-probe") is not None
        print(NEXT_STEPS.format(bin="" if on_path else f"{os.path.relpath(Path(sys.executable).parent)}/"))
        return result

    def sweep(self, module: EntropyProbe, sweep: SweepConfig) -> None:
        """Probe a grid of learning rates, batch sizes, seeds and checkpoints; can be stopped and continued.

        Args:
            module: the configuration that all points share.
            sweep: what is varied. On the command line `--sweep.B_E` can be written `--B_E`.

        Raises:
            IncompleteSweepError: some points failed; everything else is done.
        """
        from probe.sweep.loop import execute, refuse_failures

        refuse_failures(execute(self, module, sweep))

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
        result = build_result(self.state, module, self._config_mapping(module), started)
        self.result = result
        self.errors.extend(self.state.unwritten)
        self.fabric.call("on_report_end", self, module, result)
        self.fabric.call("on_probe_end", self, module, result)
        return result

    def _config_mapping(self, module: EntropyProbe) -> dict[str, Any]:
        """The configuration that counted, as it is saved with a result: it can be run again as it is."""
        return module.sources.applied_to(self.resolved) if self.resolved else asdict(module.config)

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


def default_callbacks(config: ProbeConfig, publish: bool = True) -> list[ProbeCallback]:
    """The built-in callbacks that the sections of a configuration ask for; without `publish` those that measure."""
    from probe.callbacks import (
        ConsoleReport,
        DeltaH1,
        DetailedLogging,
        GroundTruth,
        ProgressBars,
        ResultsFile,
        TensorBoardDiagnostics,
    )

    callbacks: list[ProbeCallback] = [ProgressBars()] if publish else []
    if config.probe_rework.compute_delta_h1:
        callbacks.append(DeltaH1())
    if config.importance.enabled:
        callbacks.append(GroundTruth())
    if not publish:
        return callbacks
    callbacks.append(ConsoleReport())
    if config.output.results_path is not None:
        callbacks.append(ResultsFile(config.output.results_path))
    if config.detailed_logging.enabled:
        callbacks.append(DetailedLogging(config.detailed_logging))
    callbacks.append(TensorBoardDiagnostics())
    return callbacks


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
