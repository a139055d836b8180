"""A run as it would be with another learning rate: same E, same U, same direction of the update."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime

from probe.errors.exceptions import ConfigError
from probe.module import EntropyProbe
from probe.phases.ground_truth import ground_truth
from probe.phases.prediction import Predicted
from probe.phases.state import ProbeState
from probe.phases.update import take_step
from probe.results.build import build_result
from probe.results.result import ProbeResult
from probe.runner import ProbeRunner
from probe.snapshot import evaluation_mode, exact_float32, isolated_rng


def measure_at(runner: ProbeRunner, module: EntropyProbe, learning_rate: float) -> ProbeResult:
    """The last run's result as it would be with another learning rate; nothing is published.

    E, U and the direction of the update are the same; the prediction is scaled, the ground truth measured anew at
    `theta + step`. Parameters are never changed (except by `is_mode: resample`, which puts them back).

    Args:
        runner: of the last run.
        module: the module of the last run.
        learning_rate: `eta > 0`.

    Raises:
        ProbeError: as `ProbeRunner.run`.
    """
    base = runner.state
    state = at_learning_rate(module, base, learning_rate)
    with isolated_rng(), exact_float32(), evaluation_mode(module):
        start = time.perf_counter()
        if module.config.importance.enabled and state.update is not None:
            smaller = base.update is not None and learning_rate < base.update.learning_rate
            known = None if base.ground_truth is None else base.ground_truth.noise_floor
            floor = None if module.policy.half_precision or smaller else known
            state.keep(ground_truth(module.batch_source, state.drawn, state.update, state.predicted, floor))
        seconds = time.perf_counter() - start
        state.timing, state.passes, state.traffic = {"ground_truth": seconds, "total": seconds}, [], {}
        return build_result(
            state, module.provenance, runner.config_mapping(module), datetime.now().astimezone()
        )


def at_learning_rate(module: EntropyProbe, state: ProbeState, learning_rate: float) -> ProbeState:
    """What a run has produced, as it would be with another learning rate.

    The step of the optimizers that the probe knows is exactly proportional to the learning rate, so that deltaH1 is
    multiplied by the factor and deltaH2 by its square. There is no ground truth yet.

    Args:
        module: the module of the run.
        state: with an update.
        learning_rate: `eta > 0`.

    Raises:
        ConfigError: the learning rate is not positive.
        RuntimeError: there is no update.
    """
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate: expected a number above 0, found {learning_rate}")
    update, predicted = state.update, state.predicted
    if update is None:
        raise RuntimeError("expected a run with an update, found none; run the phases in order")
    factor = learning_rate / update.learning_rate
    # again, not scaled: a rounded step does not scale
    taken = take_step(module.policy, module.loaded_optimizer, update.gradient, module.config, factor)
    return replace(
        state,
        update=replace(
            update,
            step=taken.step,
            new_parameters=taken.new_parameters,
            learning_rate=learning_rate,
            rounding=taken.rounding,
        ),
        predicted=None if predicted is None else _scaled(predicted, learning_rate, factor),
        ground_truth=None,
        timing={},
    )


def _scaled(predicted: Predicted, learning_rate: float, factor: float) -> Predicted:
    """The prediction, and its control variates, of a step `factor` times as long."""
    controls, passes = predicted.controls, predicted.passes
    if controls is not None:
        controls = replace(controls, fitted=controls.fitted.scaled(factor))
    return replace(
        predicted,
        prediction=predicted.prediction.at(learning_rate),
        passes=None if passes is None else replace(passes, new=None),
        controls=controls,
    )
