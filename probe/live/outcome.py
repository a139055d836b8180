"""What one probed step did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimators.entropy_change import entropy
from probe.estimators.estimate import Estimate, estimate
from probe.estimators.prediction import Prediction
from probe.estimators.step_parts import StepParts
from probe.results.changes import with_error
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
        values: names and meanings as in `probe.results.RESULT_KEYS` and `probe.live.names.LIVE_KEYS`.
        H: entropy before the step, `(sequence, token)`, nats.
        deltaH1: as reported, `(sequence, token)`; exactly 0 without error where the step was 0.
        deltaH_true: likewise.
        moved: whether the step was not 0.
    """

    values: dict[str, Any]
    H: tuple[Estimate, Estimate]
    deltaH1: tuple[Estimate, Estimate]
    deltaH_true: tuple[Estimate, Estimate]
    moved: bool


def judged(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their verdict, its reasons in the words of a training."""
    found = verdict(values)
    return {
        "verdict": found.word,
        "verdict_reasons": list(found.in_words_of("training")),
        **values,
    }


def entropies(scores: TokenScores, E: RolloutBatch) -> tuple[Estimate, Estimate]:
    """Entropy per response and per token, with errors over prompts."""
    sequence, token = estimate(lambda q: entropy(q, scores.entropy, scores.mask), E.group)
    return sequence, token


def levels(H: tuple[Estimate, Estimate]) -> dict[str, Any]:
    """`H_orig` with its error, both estimands."""
    return with_error("H_orig", H[0]) | with_error("H_orig_tok", H[1])


def with_influence(prediction: Prediction) -> tuple[Estimate, Estimate]:
    """DeltaH1 as reported, `(sequence, token)`."""
    return prediction.estimates[prediction.reported]


def directions(parts: StepParts) -> dict[str, Mapping[str, Tensor]]:
    """The parts of a step that have a direction of their own; decay's is 0 where there is none."""
    zero = {name: torch.zeros_like(x) for name, x in parts.momentum.items()}
    return {"momentum": parts.momentum, "decay": parts.decay or zero}


def part_values(name: str, of_part: Sequence[Estimate], prediction: Prediction) -> dict[str, Any]:
    """A part of deltaH1 in nats with its error; and as a share of it, where that is told from 0."""
    values: dict[str, Any] = {}
    for found, total, suffix in zip(of_part, with_influence(prediction), ("", "_tok"), strict=True):
        values |= with_error(f"deltaH1_{name}{suffix}", found)
        low, high = total.ci95
        values[f"{name}_share{suffix}"] = found.value / total.value if low > 0 or high < 0 else None
    return values
