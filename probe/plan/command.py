"""Runs the pilot, makes the plan, prints it and writes it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from probe.callbacks.console import say
from probe.callbacks.defaults import measuring_callbacks
from probe.callbacks.progress import ProgressBars
from probe.config.checkpoint import DEMO
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.files.atomic import atomic_write_bytes, ensure_replaceable
from probe.files.strict_json import dump_bytes
from probe.module import EntropyProbe
from probe.plan.page import page
from probe.plan.passes import PassClock
from probe.plan.settings import PlanConfig
from probe.plan.sizes import Plan, plan_of
from probe.runner import ProbeRunner
from probe.snapshot import one_thread


def execute(runner: ProbeRunner, module: EntropyProbe, settings: PlanConfig) -> Plan:
    """Run a pilot and say what it recommends.

    The result mapping of the pilot, with the plan under `plan`, goes to `output.results_path` where that is given. Logs
    and TensorBoard are left out: what is probed is the plan's, not a run's.

    Args:
        runner: devices and further callbacks.
        module: the policy and its configuration; left as it is configured for the pilot.
        settings: the pilot.

    Raises:
        ProbeError: whatever went wrong, in one line.
    """
    if module.configured.attribution.enabled:
        raise ConfigError(
            "attribution.enabled: expected false in a plan, which has no use for it, found true; leave it to the runs"
        )
    runner.launch()
    path = module.configured.output.results_path if runner.ranks.first else None
    if path is not None:
        ensure_replaceable(Path(path))
    given = module.given if settings.pilot_B_U is None else {*module.given, "batch_config.B_U"}
    module.reconfigure(pilot_config(module.configured, settings), module.seed, given)
    clock = PassClock()
    threads = one_thread if module.configured.checkpoint.checkpoint_path == DEMO else nullcontext
    with threads():
        result = runner.run(module, [ProgressBars(), *measuring_callbacks(module.configured), clock])
    plan = plan_of(result, clock.passes, settings)
    say(runner, page(plan))
    if path is not None:
        atomic_write_bytes(Path(path), dump_bytes({**result.values, "plan": plan.as_mapping()}))
    return plan


def pilot_config(config: ProbeConfig, settings: PlanConfig) -> ProbeConfig:
    """The configuration of the pilot: that of the run, with other sizes."""
    batch = replace(config.batch_config, B_E=settings.pilot_B_E)
    if settings.pilot_B_U is not None:
        batch = replace(batch, B_U=settings.pilot_B_U)
    return replace(config, batch_config=batch)
