"""What one probed step did: the step itself, and its numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.estimand import PerEstimand, as_mapping
from probe.estimators.entropy_change import entropy
from probe.estimators.estimate import Estimate, Estimates, estimate
from probe.estimators.ground_truth import GroundTruth
from probe.estimators.prediction import Prediction
from probe.results.changes import changes, reported
from probe.results.diagnostics import batch_diagnostics, derivative_diagnostics, ground_truth_diagnostics
from probe.rollouts.sampling import SampledTokens
from probe.scoring.scores import TokenScores
from probe.verdict.verdict import verdict


@dataclass(frozen=True)
class Before:
    """What is kept from before a step.

    Attributes:
        number: of the optimizer step, from 1.
        E: the evaluation batch, drawn from the policy as it was.
        seen: what sampling saw.
        old: copies of the trainable parameters.
        seconds: that sampling took.
    """

    number: int
    E: RolloutBatch
    seen: SampledTokens
    old: Mapping[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What one probed step did.

    Attributes:
        values: names and meanings as in `probe.results.keys.RESULT_KEYS` and `probe.live.names.LIVE_KEYS`.
        H: entropy before the step.
        deltaH1: as reported; exactly 0 without error where the step was 0.
        deltaH_true: likewise.
        moved: whether the step was not 0.
    """

    values: dict[str, Any]
    H: Estimates
    deltaH1: Estimates
    deltaH_true: Estimates
    moved: bool


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
        if not bool(torch.isfinite(step[name]).all()):
            raise NumericalError(f"expected a finite optimizer step, found NaN or infinity in that of {name}")
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
    H = entropies(scores, before.E)
    unmoved = H.map(lambda one: Estimate(0.0, torch.zeros_like(one.influence)))
    values = {
        "verdict": "unresolved",
        "verdict_reasons": ["The optimizer's step was exactly 0 (learning rate 0, or gradients of 0)."],
        **_levels(H),
        **{f"{name}{suffix}": 0.0 for name in ("deltaH1", "deltaH_true") for suffix in ("", "_tok")},
        **_batch_values(before.E, rate),
        "step_norm": 0.0,
        "diagnostics": {**batch_diagnostics(before.E), "bias_flags": []},
        "timing": {"sample": before.seconds},
    }
    return Outcome(values, H, unmoved, unmoved, moved=False)


def outcome_of_step(
    before: Before,
    scores: TokenScores,
    prediction: Prediction,
    truth: GroundTruth,
    rate: float | None,
    half_precision: bool,
    further: Mapping[str, Any],
) -> Outcome:
    """The outcome of a step, with its verdict in the words of the drop-in probe's settings.

    Args:
        before: what was kept from before it.
        scores: of E before it.
        prediction: deltaH1.
        truth: deltaH_true.
        rate: the learning rate.
        half_precision: whether the policy computes in 16 bits.
        further: values by name: parts of deltaH1, size of the step, seconds.
    """
    E, H = before.E, entropies(scores, before.E)
    values = {
        **changes(prediction, truth).as_mapping(),
        **_levels(H),
        **_batch_values(E, rate),
        "diagnostics": {
            **batch_diagnostics(E),
            **ground_truth_diagnostics(truth),
            **derivative_diagnostics(prediction),
            "bias_flags": [*E.bias_flags, *(["half_precision"] if half_precision else [])],
        },
        **further,
    }
    judged = verdict(values)
    words = {"verdict": judged.word, "verdict_reasons": list(judged.in_words_of("training"))}
    return Outcome(
        values={**words, **values},
        H=H,
        deltaH1=prediction.total,
        deltaH_true=truth.change,
        moved=True,
    )


def entropies(scores: TokenScores, E: RolloutBatch) -> Estimates:
    """Entropy per response and per token, nats, with errors over prompts."""
    return PerEstimand.of(estimate(lambda q: entropy(q, scores.entropy, scores.mask), E.group))


def _levels(H: Estimates) -> dict[str, Any]:
    """`H_orig` with its error, both estimands."""
    return as_mapping({"H_orig": H.map(reported)})


def _batch_values(E: RolloutBatch, rate: float | None) -> dict[str, Any]:
    """Learning rate, and the size of E."""
    length = float(E.lengths.double().mean())
    return {"learning_rate": rate, "B_E": len(E), "avg_generation_length": length}
