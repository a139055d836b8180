"""What a run has produced so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.errors.exceptions import LogError
    from probe.estimators.entropy_gradient import EntropyGradient
    from probe.estimators.estimate import Estimate
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction
    from probe.estimators.update import Update
    from probe.phases.fit_memory import FitMemory
    from probe.rollouts.sampling import SampledTokens
    from probe.scoring.features import FeatureBasis
    from probe.scoring.scores import TokenScores


@dataclass
class ProbeState:
    """Filled in by the phases of one run, read by callbacks; a part that has not run is None.

    Attributes:
        E: the evaluation batch.
        U: the update batch, with rewards and advantages.
        E_scores: scores of E at the checkpoint's weights.
        basis: features of states and tokens for control variates; None without them.
        fit_memory: what earlier batches taught the control variates.
        shared: responses of E, from a file, that are the update's own.
        control_variates: `[mean Z_seq, mean Z_tok]` for the update's step; None without them.
        scores_new: scores of E after the step, where differences needed them already.
        noise_floor: what rounding makes of a change of 0, nats per response and per token.
        derivative: how deltaH1 is differentiated, and why.
        seen: what sampling itself saw of E and U (those that were sampled), to check that scoring agrees.
        entropy_gradient: X.
        update: the gradient on U and the optimizer's step.
        prediction: deltaH1 and its parts.
        ground_truth: deltaH_true and its diagnostics.
        timing: seconds per phase that ran.
        diagnostics: further numbers for the result's `diagnostics`.
        unwritten: files that could not be written on the way; said when everything else is published.
    """

    E: RolloutBatch | None = None
    U: RolloutBatch | None = None
    E_scores: TokenScores | None = None
    basis: FeatureBasis | None = None
    fit_memory: FitMemory | None = None
    shared: int = 0
    control_variates: list[Estimate] | None = None
    scores_new: TokenScores | None = None
    noise_floor: tuple[float, float] | None = None
    derivative: tuple[str, str] | None = None
    seen: dict[str, SampledTokens] = field(default_factory=dict)
    entropy_gradient: EntropyGradient | None = None
    update: Update | None = None
    prediction: Prediction | None = None
    ground_truth: GroundTruth | None = None
    timing: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, object] = field(default_factory=dict)
    unwritten: list[LogError] = field(default_factory=list)
