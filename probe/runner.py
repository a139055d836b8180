"""Runs the phases of a probe on a device, with Lightning Fabric."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.strategies import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

import probe
from probe.callbacks.base import ProbeCallback
from probe.config.checkpoint import DEMO
from probe.config.schema import ProbeConfig
from probe.config.trainer import Precision, TrainerConfig
from probe.distributed.crew import Crew, crew_at_work
from probe.distributed.launch import check_name, check_strategy, launched, setup_of
from probe.distributed.ranks import ALONE, Ranks
from probe.distributed.same import check_same
from probe.distributed.sharding import NAMES, sharding
from probe.errors.exceptions import ConfigError, ProbeError
from probe.estimators.ground_truth import GroundTruth
from probe.loading.tokenizer import token_decoder
from probe.logs.own_logger import OwnLogger
from probe.logs.write import safe_name
from probe.module import EntropyProbe
from probe.phases.attribution import Attribution
from probe.phases.costs import PassRecord
from probe.phases.entropy_gradient import Derivative
from probe.phases.prediction import Predicted
from probe.phases.sample import Sample
from probe.phases.state import Phase, ProbeState
from probe.phases.update import Update
from probe.phases.what_if import WhatIf
from probe.results.build import build_result
from probe.results.result import ProbeResult
from probe.scoring.collector import MakeProgress, Progress
from probe.snapshot import evaluation_mode, exact_float32, isolated_rng, operator_threads
from probe.text import first_line, shown
from probe.timing import Clock

Result = TypeVar("Result", Sample, Derivative, Update, Predicted, Attribution, WhatIf, GroundTruth)
HOOKS: dict[Phase, tuple[str, str]] = {
    "sample": ("on_sample_start", "on_sample_end"),
    "entropy_gradient": ("on_entropy_gradient_start", "on_entropy_gradient_end"),
    "update": ("on_update_start", "on_update_end"),
    "prediction": ("on_prediction_start", "on_prediction_end"),
    "attribution": ("on_attribution_start", "on_attribution_end"),
    "what_if": ("on_what_if_start", "on_what_if_end"),
    "ground_truth": ("on_ground_truth_start", "on_ground_truth_end"),
    "report": ("on_report_start", "on_report_end"),
}
"""The hooks of `ProbeCallback` before and after each phase."""
TrainerSection = TrainerConfig[ProbeCallback, Logger]
"""What `trainer:` gives, with the classes that callbacks and loggers are derived from."""


@dataclass(eq=False)
class ProbeRunner(TrainerSection):
    """Owns the devices, calls the phases of an `EntropyProbe` in order and the callbacks around each.

    It is made with the keys of `trainer:`, see `TrainerConfig`.

    Attributes:
        fabric: devices, precision, loggers and callbacks.
        crew: the processes that share the runs, once they are launched.
        state: what the phases of the current (or last) run produced.
        result: the last run's result.
        errors: what went wrong while publishing a result; raised when everything else is published.
        written: the files of the last run's result by what they are, for the last lines on the console.
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
        self.written: dict[str, str] = {}
        self.config = ProbeConfig()
        self._resolved: Mapping[str, Any] | None = None
        check_name(self.strategy)
        try:
            sharded = self.strategy in NAMES
            self.fabric = self._fabric("auto" if sharded else self.strategy)
            if sharded and self.fabric.world_size > 1:  # a single process holds the whole policy
                self.fabric = self._fabric(sharding(self.fabric.world_size))
        except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: the devices cannot be set up: {first_line(error)}") from error
        check_strategy(self.fabric)
        self.crew: Crew | None = None

    def _fabric(self, strategy: str | Strategy) -> Fabric:
        """Devices, precision and loggers, with a strategy."""
        return Fabric(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=strategy,
            precision=self.precision,
            loggers=_loggers(self.logger),
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that share the runs; this one alone before `launch`."""
        return ALONE if self.crew is None else self.crew.ranks

    def launch(self) -> None:
        """Start the other processes where there are several, once; every one of them runs the program from its start.

        What comes before is done by each of them, what comes after by all together.

        Raises:
            ConfigError: the processes cannot be started or do not find each other.
        """
        if self.crew is None:
            self.crew = launched(self.fabric)

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
        self.written = {}
        started = datetime.now().astimezone()
        asked = probe.default_callbacks(module.config) if callbacks is None else callbacks
        called = [*asked, *self.extra_callbacks]
        for callback in called:
            _check_callback(callback)
        self.fabric._callbacks = called
        self._use_own_logger(None)
        self.launch()
        module.ranks = self.ranks
        if self.ranks.size > 1 and module.config.checkpoint.device_map is not None:
            raise ConfigError(
                f"checkpoint.device_map: expected null where {self.ranks.size} processes hold the policy, or parts of "
                f"it, found {module.config.checkpoint.device_map!r}; take trainer.devices: 1"
            )
        try:
            with crew_at_work(self.crew), isolated_rng(), exact_float32():
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

    def phase(self, name: Phase, module: EntropyProbe, compute: Callable[[MakeProgress], Result]) -> Result:
        """Run a phase: the hooks around it, its seconds, its result kept in `state`.

        Args:
            name: of the phase.
            module: the policy.
            compute: gives the result, told how to report its progress.
        """

        def of_pass(what: str) -> Progress:
            def report(done: int, total: int) -> None:
                if done >= total:
                    self.state.passes.append(PassRecord(what, total))
                self.fabric.call("on_progress", self, name, done, total, what)

            return report

        start, end = HOOKS[name]
        self.fabric.call(start, self, module)
        drawn, traffic = self.state.sample, module.traffic
        threads = self.config.memory_config.number_of_threads if drawn is None else drawn.threads
        useful, padded = traffic.useful, traffic.padded
        with self._timed(name), operator_threads(threads), self.ranks.together(name):
            result = compute(of_pass)
        through = (traffic.useful - useful, traffic.padded - padded)
        found = self.ranks.gathered("traffic", through)
        self.state.traffic[name] = (sum(n for n, _ in found), sum(n for _, n in found))
        self.state.keep(result)
        self.fabric.call(end, self, module)
        return result

    def _phases(
        self, module: EntropyProbe, callbacks: Sequence[ProbeCallback], started: datetime
    ) -> ProbeResult:
        """Run the phases in order, timed."""
        self.fabric.call("on_probe_start", self, module)
        if module.model is None and module.config.checkpoint.checkpoint_path == DEMO:
            _make_demo(self, module)
        with self._timed("load"), self.ranks.together("load"):
            module.autocast = self.fabric.autocast
            module.load(self.fabric.device, setup_of(self.fabric))
            check_same(self.ranks, dict(module.policy.model.named_parameters()))
        self._use_own_logger(f"{safe_name(module.provenance.checkpoint_name)}_{started:%Y-%m-%d_%H-%M-%S}")
        with evaluation_mode(module):
            self.config = module.config  # with what the checkpoint has filled in
            self.phase("sample", module, module.sample)
            self.config = module.config  # with what U's file has settled about its advantages
            for callback in callbacks:
                callback.compute(self, module)
        self.fabric.call("on_report_start", self, module)
        self.state.timing["total"] = sum(self.state.timing.values())
        result = build_result(
            self.state,
            module.provenance,
            self.config_mapping(module),
            started,
            token_decoder(module.tokenizer),
        )
        self.result = result
        self.fabric.call("on_report_end", self, module, result)
        self.fabric.call("on_probe_end", self, module, result)
        return result

    def _use_own_logger(self, run: str | None) -> None:
        """A logger of one's own for one run, where the user gives none; `run` is its name, once that is known."""
        if self.logger is True:
            folder = Path(self.config.detailed_logging.output_directory)
            self.fabric._loggers = [OwnLogger(folder, run, self.fabric.is_global_zero)]

    def _timed(self, name: str) -> AbstractContextManager[None]:
        """Add the seconds of a block to the state's `timing`."""
        return Clock(self.state.timing).measures(name)

    def config_mapping(self, module: EntropyProbe) -> dict[str, Any]:
        """The configuration that counted, as it is saved with a result: it can be run again as it is."""
        return asdict(module.config) if self._resolved is None else module.sources.applied_to(self._resolved)


def _make_demo(runner: ProbeRunner, module: EntropyProbe) -> None:
    """Train the demo policy, timed, unless it is there."""
    clock = Clock()
    with clock.measures("demo_policy"), runner.fabric.rank_zero_first(local=True):
        trained = module.make_demo()
    if trained:
        runner.state.timing |= clock.seconds


def _check_callback(callback: Any) -> None:
    """Refuse what would be passed over in silence.

    Raises:
        ConfigError: it is no callback, or computes phases by methods that nobody calls.
    """
    if not isinstance(callback, ProbeCallback):
        raise ConfigError(f"callbacks: expected objects derived from ProbeCallback, found {shown(callback)}")
    former = [name for name in (*(f"run_{phase}" for phase in HOOKS), "phases") if hasattr(callback, name)]
    if former:
        raise ConfigError(
            f"callbacks: expected {type(callback).__name__} to compute its phases in `compute(runner, module)`, found "
            f"{', '.join(former)}, which nothing calls; see ProbeCallback.compute"
        )


def _seed_globals(seed: int) -> None:
    """Seed the global generators, for rewards that use them; the batches have streams of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _loggers(logger: Logger | list[Logger] | bool | None) -> list[Logger]:
    """Lightning's convention for the `logger` argument."""
    if logger is True:
        return [OwnLogger(Path("lightning_logs"))]
    if logger is False or logger is None:
        return []
    return list(logger) if isinstance(logger, (list, tuple)) else [logger]
