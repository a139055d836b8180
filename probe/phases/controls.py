"""When control variates are used, what they learn from, and what they take off an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from probe.config.estimation import ProbeReworkConfig
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError
from probe.estimators.control_variates import SMALLEST_SAMPLE, SMALLEST_TAUGHT, control_variates
from probe.estimators.estimate import Both
from probe.parameters import norm
from probe.phases.fit_memory import FitMemory, read_fit_memory
from probe.phases.passes import AlongStep
from probe.scoring.features import feature_basis
from probe.scoring.policy import Policy


@dataclass(frozen=True)
class ControlSource:
    """What the control variates of a run are made from.

    Attributes:
        memory: features, and what earlier batches taught; None where there are to be no control variates.
        reason: why there are none; empty where there are.
        draw: where E comes from: batches of one draw share sequences.
    """

    memory: FitMemory | None
    reason: str
    draw: str


@dataclass(frozen=True)
class Controls:
    """Control variates of one step on one E.

    Attributes:
        Z: their means, `(nats per response, nats per token)`, to be subtracted whole: fitted on other prompts than they
            are used on, they have the mean 0 exactly.
        earlier: how many earlier batches they were fitted on too.
        learnt: the memory with this batch in it.
    """

    Z: Both
    earlier: int
    learnt: FitMemory


def too_few_prompts(prompts: int, taught: bool) -> str:
    """Why control variates are not used where nobody insists; empty where there are enough prompts.

    Args:
        prompts: in E.
        taught: whether earlier batches join the fit.
    """
    least = SMALLEST_TAUGHT if taught else SMALLEST_SAMPLE
    return "" if prompts >= least else f"{prompts} prompts in E, they are used from {least} on"


def fitted_controls(E: RolloutBatch, passes: AlongStep, memory: FitMemory, draw: str) -> Controls:
    """Fit control variates for a step.

    Args:
        E: the evaluation batch, of at least two prompts.
        passes: along the step, with the memory's features.
        memory: features, and what earlier batches taught.
        draw: where E comes from.
    """
    earlier = memory.earlier_than(E, draw)
    psi = memory.basis.sampled(E)
    fitted = control_variates(passes.scores, passes.tangents, psi, E.group, earlier)
    return Controls(
        Z=fitted.means(passes.scores, E.group),
        earlier=len(earlier),
        learnt=memory.with_batch(E, fitted.statistics, draw),
    )


def control_source(
    policy: Policy,
    E: RolloutBatch,
    U: RolloutBatch,
    rework: ProbeReworkConfig,
    checkpoint: str | None,
    draw: str,
) -> ControlSource:
    """Whether a run has control variates, with the features that they are made of.

    Args:
        policy: at the checkpoint's weights.
        E: the evaluation batch.
        U: the update batch, whose tokens the features are made for.
        rework: the section `probe_rework`.
        checkpoint: the checkpoint's path, which the file of earlier batches is tied to.
        draw: where E comes from.

    Raises:
        DataError: the file of earlier batches is none, or another policy's.
        ConfigError: they are asked for and E has one prompt.
    """

    def without(reason: str) -> ControlSource:
        return ControlSource(None, reason, draw)

    wanted, prompts = rework.control_variates, len(E.group.unique())
    if wanted == "off" or not rework.compute_delta_h1:
        return without("probe_rework.control_variates")
    if rework.weighting != "causal":
        return without(f"weighting: {rework.weighting}")
    path, name = rework.control_variates_path, ""
    memory = None
    if path is not None:
        name = f"{checkpoint} ({norm(policy.parameters):.12g})"
        memory = read_fit_memory(Path(path), name)
    too_few = too_few_prompts(prompts, memory is not None and bool(memory.earlier_than(E, draw)))
    if wanted == "auto" and too_few:
        return without(too_few)
    if memory is None:
        basis = feature_basis(policy.model, U)
        if basis is None:
            return without("the output layer has no dense weight")
        memory = FitMemory(basis, name)
    if prompts < 2:
        raise ConfigError(
            "probe_rework.control_variates: expected at least two prompts in E (they are fitted on one and used on "
            "another), found one; use auto or off"
        )
    return ControlSource(memory, "", draw)
