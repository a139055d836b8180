"""What a run has produced so far: one frozen result per phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from probe.data.batch import RolloutBatch
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.ground_truth import GroundTruth
from probe.estimators.prediction import Prediction
from probe.phases.attribution import Attribution
from probe.phases.costs import PassRecord, passes_over
from probe.phases.entropy_gradient import Derivative
from probe.phases.prediction import Predicted
from probe.phases.sample import Sample
from probe.phases.update import Update
from probe.phases.what_if import WhatIf
from probe.scoring.scores import TokenScores
from probe.shards import is_shard

Phase = Literal[
    "sample", "entropy_gradient", "update", "prediction", "attribution", "what_if", "ground_truth", "report"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a run, in order. `sample` and `report` always run, one between them when a callback does it."""
PhaseResult = Sample | Derivative | Update | Predicted | Attribution | WhatIf | GroundTruth


@dataclass
class ProbeState:
    """The results of the phases that ran; None for the others. The runner keeps them, callbacks read them.

    Attributes:
        sample: E and U.
        derivative: how to differentiate, and X.
        update: the gradient on U and the optimizer's step.
        predicted: deltaH1, and what the passes for it gave.
        attribution: what U's tokens add to it.
        what_if: what interventions would do.
        ground_truth: deltaH_true and its diagnostics.
        timing: seconds per phase that ran.
        passes: over E and U, as they were made.
        traffic: per phase, tokens that its passes put through the model, and positions with padding.
    """

    sample: Sample | None = None
    derivative: Derivative | None = None
    update: Update | None = None
    predicted: Predicted | None = None
    attribution: Attribution | None = None
    what_if: WhatIf | None = None
    ground_truth: GroundTruth | None = None
    timing: dict[str, float] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)

    def keep(self, result: PhaseResult) -> None:
        """Keep what a phase found."""
        match result:
            case Sample():
                self.sample = result
            case Derivative():
                self.derivative = result
            case Update():
                self.update = result
            case Predicted():
                self.predicted = result
            case Attribution():
                self.attribution = result
            case WhatIf():
                self.what_if = result
            case GroundTruth():
                self.ground_truth = result

    @property
    def E(self) -> RolloutBatch | None:  # noqa: N802
        """The evaluation batch."""
        return None if self.sample is None else self.sample.E

    @property
    def U(self) -> RolloutBatch | None:  # noqa: N802
        """The update batch."""
        return None if self.sample is None else self.sample.U

    @property
    def E_scores(self) -> TokenScores | None:  # noqa: N802
        """Scores of E at the checkpoint's weights."""
        return None if self.sample is None else self.sample.E_scores

    @property
    def entropy_gradient(self) -> EntropyGradient | None:
        """X; None also where the prediction's forwards contradict it."""
        if self.predicted is not None:
            return self.predicted.X
        return None if self.derivative is None else self.derivative.X

    @property
    def prediction(self) -> Prediction | None:
        """DeltaH1; its spread over update batches is the attribution's where there is one, with X from all of E."""
        if self.predicted is None or self.attribution is None:
            return None if self.predicted is None else self.predicted.prediction
        found, attributed = self.predicted.prediction, self.attribution
        # two ways to one deltaH1 again: X by backward, and derivatives along the step
        agreement = attributed.agreement if found.agreement is None else found.agreement
        return replace(found, sd_U=attributed.sd_U, agreement=agreement)

    @property
    def drawn(self) -> Sample:
        """E and U, which every run draws first.

        Raises:
            RuntimeError: they are not there yet.
        """
        if self.sample is None:
            raise RuntimeError("expected E and U, found none; the phase `sample` comes first")
        return self.sample

    @property
    def attributed(self) -> tuple[Sample, Update, Attribution]:
        """What interventions are weighed by.

        Raises:
            RuntimeError: there is no attribution.
        """
        if self.update is None or self.attribution is None:
            raise RuntimeError("expected an attribution, found none; the phase `attribution` comes first")
        return self.drawn, self.update, self.attribution

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the vectors, so that all of them have a part in a log of these."""
        vectors = [] if self.update is None else [*self.update.step.values()]
        vectors += [] if self.entropy_gradient is None else [*self.entropy_gradient.total.values()]
        return any(is_shard(x) for x in vectors)

    @property
    def throughput(self) -> dict[str, dict[str, float]]:
        """Of every phase with passes: tokens per second without padding, and the share of padding."""
        return {
            phase: {"tokens_per_second": useful / self.timing[phase], "padding": 1 - useful / padded}
            for phase, (useful, padded) in self.traffic.items()
            if padded and self.timing.get(phase)
        }

    @property
    def diagnostics(self) -> Mapping[str, float | int]:
        """Numbers of single phases for the result's `diagnostics`, as far as they were computed."""
        found: dict[str, float | int | None] = {}
        if self.sample is not None:
            if self.passes:
                found["passes_E"] = passes_over(self.passes, "E", len(self.sample.E))
                found["passes_U"] = passes_over(self.passes, "U", len(self.sample.U))
            found |= {
                "threads": self.sample.threads,
                "processes": self.sample.processes,
                "tokens_per_microbatch": self.sample.config.memory_config.tokens_per_microbatch,
                "continuous_batching": self.sample.drawn_continuously,
                "sampling_scoring_gap": self.sample.sampling_gap,
                "on_policy_z": self.sample.on_policy_z,
            }
        if self.derivative is not None:
            found["derivative_check_error"] = self.derivative.check_error
        if self.entropy_gradient is not None:
            found["X_responses"] = self.entropy_gradient.responses
        if self.update is not None:
            found["zero_advantage_groups"] = self.update.zero_advantage_groups
        return MappingProxyType({name: value for name, value in found.items() if value is not None})
