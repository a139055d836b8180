"""What a run has produced so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.entropy_gradient import EntropyGradient
    from probe.estimators.prediction import Prediction
    from probe.estimators.snis import GroundTruth
    from probe.estimators.update import Update
    from probe.rollouts.sampling import SampledTokens
    from probe.scoring.scores import TokenScores


@dataclass
class ProbeState:
    """Filled in by the phases of one run, read by callbacks; a part that has not run is None.

    Attributes:
        E: the evaluation batch.
        U: the update batch, with rewards and advantages.
        E_scores: scores of E at the checkpoint's weights.
        seen: what sampling itself saw of E and U (those that were sampled), to check that scoring agrees.
        entropy_gradient: X.
        update: the gradient on U and the optimizer's step.
        prediction: deltaH1 and its parts.
        ground_truth: deltaH_true and its diagnostics.
        timing: seconds per phase that ran.
        diagnostics: further numbers for the result's `diagnostics`.
    """

    E: RolloutBatch | None = None
    U: RolloutBatch | None = None
    E_scores: TokenScores | None = None
    seen: dict[str, SampledTokens] = field(default_factory=dict)
    entropy_gradient: EntropyGradient | None = None
    update: Update | None = None
    prediction: Prediction | None = None
    ground_truth: GroundTruth | None = None
    timing: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, object] = field(default_factory=dict)
