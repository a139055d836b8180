"""What one probed step did: the step itself, and its numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.errors.remedies import Message
from probe.estimand import Estimand, Number, Numbers, PerEstimand
from probe.estimators.estimate import Estimate, Estimates
from probe.estimators.ground_truth import GroundTruth, entropy_before
from probe.estimators.prediction import Prediction
from probe.live.attribution import TokenChanges
from probe.live.parts import PartChanges
from probe.results.changes import Changes, changes, reported
from probe.results.diagnostics import batch_diagnostics, derivative_diagnostics, ground_truth_diagnostics
from probe.results.result import BatchSizes, StepResult
from probe.rollouts.sampling import SampledTokens
from probe.scoring.scores import TokenScores
from probe.shards import first_nonfinite
from probe.verdict.words import Verdict


@dataclass(frozen=True)
class Before:
    """What is kept from before a step.

    Attributes:
        number: of the optimizer step, from 1.
        E: the evaluation batch, drawn from the policy as it was.
        seen: what sampling saw; None where E was not sampled by the probe.
        old: copies of the trainable parameters.
        seconds: that sampling took.
        X: gradient of the token entropy on E; None where nobody asked.
    """

    number: int
    E: RolloutBatch
    seen: SampledTokens | None
    old: Mapping[str, Tensor]
    seconds: float
    X: Mapping[str, Tensor] | None = None

    @property
    def mean_length(self) -> float:
        """Tokens per response of E."""
        return float(self.E.lengths.double().mean())


@dataclass(frozen=True)
class Outcome(StepResult):
    """What one probed step did.

    Attributes:
        H: entropy before the step, with the errors of this E alone.
        deltaH1: likewise; exactly 0 without error where the step was 0.
        deltaH_true: likewise.
        mean_length: tokens per response of E.
        step_norm: Euclidean norm of the step.
        parts: of deltaH1; None where they were not asked for, or the step was 0.
        tokens: what classes of the training's tokens add to it; None likewise.
    """

    H: Estimates
    deltaH1: Estimates
    deltaH_true: Estimates
    mean_length: float
    step_norm: float
    parts: PartChanges | None = None
    tokens: TokenChanges | None = None

    @property
    def moved(self) -> bool:
        """Whether the step was not 0."""
        return self.step_norm > 0.0

    def level(self, estimand: Estimand) -> tuple[float, float]:
        """Entropy before the step and its standard error as reported, nats."""
        H = self.changes.measurement["H_orig"][estimand]
        if H is None or H.value is None or H.se is None:
            raise ValueError(f"expected an entropy with its error {estimand.per}, found {H}")
        return H.value, H.se

    def change(self, quantity: str, estimand: Estimand) -> tuple[float, float, float]:
        """`deltaH1` or `deltaH_true` with its standard error as reported, nats, and its degrees of freedom.

        Below the noise floor the value is reported as null; it is what it is here, as sums average the rounding out.
        """
        own: Estimate = getattr(self, quantity)[estimand]
        number = self.changes.numbers[quantity][estimand]
        if number is None or number.se is None or number.df is None:
            return own.value, own.se, own.df
        return own.value, number.se, number.df

    @cached_property
    def verdict(self) -> Verdict:
        """How far the changes can be believed; nothing can be said of a step of 0."""
        return super().verdict if self.moved else NO_STEP

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """Names and meanings as in `probe.results.keys.RESULT_KEYS` and `probe.live.names.LIVE_KEYS`."""
        return {
            "verdict": self.verdict.word,
            "verdict_reasons": list(self.verdict.in_words_of("training")),
            **self.changes.as_mapping(),
            "learning_rate": self.learning_rate,
            "B_E": self.sizes.B_E,
            "avg_generation_length": self.mean_length,
            "diagnostics": self.diagnostics,
            **({} if self.parts is None else self.parts.as_mapping()),
            **({} if self.tokens is None else self.tokens.as_mapping()),
            "step_norm": self.step_norm,
            "timing": self.timing,
        }


NO_STEP = Verdict(
    "unresolved",
    (Message(("The optimizer's step was exactly 0 (learning rate 0, or gradients of 0).",)),),
)


def step_taken(parameters: Mapping[str, nn.Parameter], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theta_new - theta_old` by parameter name, in float32 or better, where the old parameters are kept.

    Args:
        parameters: as they are now.
        old: as they were.

    Raises:
        NumericalError: it is not finite.
    """
    step = {}
    for name, p in parameters.items():
        wide = torch.promote_types(p.dtype, torch.float32)
        step[name] = p.detach().to(old[name].device, wide) - old[name].to(wide)
    if (bad := first_nonfinite(step)) is not None:
        raise NumericalError(f"expected a finite optimizer step, found NaN or infinity in that of {bad}")
    return step


def refuse_merged(model: nn.Module) -> None:
    """An adapter that is in its base's weights has no influence of its own, and would seem to change nothing.

    Raises:
        NumericalError: one is.
    """
    merged = [
        name
        for name, module in model.named_modules()
        if getattr(module, "merged", False) is True and any(p.requires_grad for p in module.parameters())
    ]
    if merged:
        raise NumericalError(
            f"expected the adapter beside its base, found it merged into {merged[0]} ({len(merged)} layers in all) "
            "after the optimizer's step; unmerge it (unmerge_adapter) before optimizer.step()"
        )


def outcome_of_no_step(before: Before, scores: TokenScores, rate: float | None) -> Outcome:
    """The outcome of a step of exactly 0: a learning rate of 0 in a warm-up, or gradients of 0.

    Args:
        before: what was kept from before it.
        scores: of E.
        rate: the learning rate.
    """
    H = entropy_before(scores, before.E.group)
    unmoved = H.map(lambda one: Estimate(0.0, torch.zeros_like(one.influence)))
    nothing: Numbers = PerEstimand(Number(0.0), Number(0.0))
    return Outcome(
        changes=Changes({"deltaH1": nothing}, {"deltaH_true": nothing, "H_orig": H.map(reported)}),
        sizes=BatchSizes(len(before.E)),
        diagnostics={**batch_diagnostics(before.E), "bias_flags": []},
        learning_rate=rate,
        timing={"sample": before.seconds},
        H=H,
        deltaH1=unmoved,
        deltaH_true=unmoved,
        mean_length=before.mean_length,
        step_norm=0.0,
    )


def outcome_of_step(
    before: Before,
    prediction: Prediction,
    truth: GroundTruth,
    rate: float | None,
    half_precision: bool,
    step_norm: float,
    seconds: Mapping[str, float],
    parts: PartChanges | None = None,
    tokens: TokenChanges | None = None,
) -> Outcome:
    """The outcome of a step.

    Args:
        before: what was kept from before it.
        prediction: deltaH1.
        truth: deltaH_true.
        rate: the learning rate.
        half_precision: whether the policy computes in 16 bits.
        step_norm: size of the step.
        seconds: that its parts took.
        parts: of deltaH1, where they were asked for.
        tokens: what classes of the training's tokens add to it, likewise.
    """
    E = before.E
    return Outcome(
        changes=changes(prediction, truth),
        sizes=BatchSizes(len(E)),
        diagnostics={
            **batch_diagnostics(E),
            **ground_truth_diagnostics(truth),
            **derivative_diagnostics(prediction),
            "bias_flags": [*E.bias_flags, *(["half_precision"] if half_precision else [])],
        },
        learning_rate=rate,
        timing={"sample": before.seconds, **seconds},
        H=truth.H_orig,
        deltaH1=prediction.total,
        deltaH_true=truth.change,
        mean_length=before.mean_length,
        step_norm=step_norm,
        parts=parts,
        tokens=tokens,
    )
