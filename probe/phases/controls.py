"""When control variates are used, what they learn from, and what they take off an estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from probe.config.estimation import ProbeReworkConfig
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError
from probe.estimators.control_variates import SMALLEST_SAMPLE, ControlVariates, control_variates
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import change_by
from probe.estimators.prediction import token_first_order
from probe.estimators.weighting import Baseline
from probe.parameters import norm
from probe.phases.fit_memory import FitMemory, read_fit_memory
from probe.phases.passes import AlongStep
from probe.scoring.features import feature_basis
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores


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
        fitted: `Z` of each sequence, from functions fitted on other prompts.
        earlier: how many earlier batches they were fitted on too.
        learn: makes the memory with this batch in it.
    """

    fitted: ControlVariates
    earlier: int
    learn: Callable[[], FitMemory]

    @cached_property
    def learnt(self) -> FitMemory:
        """The memory with this batch in it."""
        return self.learn()


def controls_of_prediction(
    controls: Controls, passes: AlongStep, group: Tensor, baseline: Baseline = "loo_position"
) -> Estimates:
    """What to subtract from deltaH1, see `ControlVariates.shrunk`.

    Args:
        controls: of the step.
        passes: over E along the step.
        group: `(B,)` prompts of E.
        baseline: of the score part.
    """

    def on(rows: Tensor) -> Estimates:
        scores, tangents = passes.scores.rows(rows), passes.tangents.rows(rows)
        return token_first_order(scores, tangents, group[rows], "causal", baseline).total

    return controls.fitted.shrunk(passes.scores, group, on)


def controls_of_measurement(
    controls: Controls, old: TokenScores, new: TokenScores, group: Tensor
) -> Estimates:
    """What to subtract from the `per_decision` measurement, see `ControlVariates.shrunk`.

    Args:
        controls: of the step.
        old: scores of E at `theta`.
        new: scores of E after the step.
        group: `(B,)` prompts of E.
    """

    def on(rows: Tensor) -> Estimates:
        return change_by("per_decision", old.rows(rows), new.rows(rows), group[rows])

    return controls.fitted.shrunk(old, group, on)


def too_few_prompts(prompts: int) -> str:
    """Why control variates are not used where nobody insists; empty where there are enough prompts in E."""
    return (
        ""
        if prompts >= SMALLEST_SAMPLE
        else f"{prompts} prompts in E, they are used from {SMALLEST_SAMPLE} on"
    )


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
        fitted=fitted,
        earlier=len(earlier),
        learn=lambda: memory.with_batch(E, fitted.statistics, draw),
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
    too_few = too_few_prompts(prompts)
    if wanted == "auto" and too_few:
        return without(too_few)
    path, name = rework.control_variates_path, ""
    memory = None
    if path is not None:
        name = f"{checkpoint} ({norm(policy.parameters):.12g})"
        memory = read_fit_memory(Path(path), name)
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
