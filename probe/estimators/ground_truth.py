"""deltaH_true = H(theta + step) - H(theta), measured: on the same E by importance sampling, or on a fresh sample.

The estimators themselves are in `entropy_change`; here they get their errors and diagnostics. Both entropies come from
the same sequences, so that their common error cancels in the difference.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.entropy_change import Reweighting, entropy, entropy_change
from probe.estimators.estimate import Estimates, estimate
from probe.estimators.importance_weights import WeightDiagnostics, weight_diagnostics
from probe.estimators.noise_floor import NoiseFloor
from probe.scoring.scores import TokenScores


@dataclass(frozen=True)
class GroundTruth:
    """The measured entropy change by several estimators.

    Attributes:
        estimates: by estimator: `snis`, `per_decision`, and where they were asked for `per_decision+cv`, `resample`,
            `snis_clipped`.
        reported: the key of the estimate that is reported.
        H_orig: entropies at `theta`, with their errors over E: nats per response, nats per token.
        weights: diagnostics of the sequences' importance weights.
        scores_new: scores of E at `theta + step`.
        clipped_fraction: share of the log-weights that clipping changed; None without clipping.
        noise_floor: size that a change of exactly 0 can seem to have by rounding; None where it was not measured.
    """

    estimates: Mapping[str, Estimates]
    reported: str
    H_orig: Estimates
    weights: WeightDiagnostics
    scores_new: TokenScores
    clipped_fraction: float | None = None
    noise_floor: NoiseFloor | None = None

    @property
    def change(self) -> Estimates:
        """The reported change."""
        return self.estimates[self.reported]

    def with_estimate(self, name: str, found: Estimates, reported: bool) -> GroundTruth:
        """The same with one more estimate, which becomes the reported one if asked."""
        return replace(
            self, estimates={**self.estimates, name: found}, reported=name if reported else self.reported
        )

    def with_control_variates(self, Z: Estimates, reported: bool) -> GroundTruth:
        """Add `per_decision+cv`: `per_decision` less the control variates.

        Args:
            Z: see `ControlVariates.shrunk`.
            reported: whether it becomes the reported estimate.
        """
        less_noisy = self.estimates["per_decision"].with_other(operator.sub, Z)
        return self.with_estimate("per_decision+cv", less_noisy, reported)


def entropy_before(scores: TokenScores, group: Tensor) -> Estimates:
    """The entropy of the policy that sampled, with its error over prompts."""
    return PerEstimand.of(estimate(lambda q: entropy(q, scores.entropy, scores.mask), group))


def change_by(
    estimator: Reweighting, old: TokenScores, new: TokenScores, group: Tensor, clip: float | None = None
) -> Estimates:
    """The change by one estimator, see `entropy_change`, with errors, from scores of the same sequences."""
    return PerEstimand.of(estimate(lambda q: entropy_change(q, old, new, estimator, clip), group))


def reweighted_change(
    old: TokenScores,
    new: TokenScores,
    group: Tensor | None = None,
    reported: Reweighting = "per_decision",
    clip: float | None = None,
) -> GroundTruth:
    """Measure the entropy change from scores of the same sequences before and after the update.

    Args:
        old: scores of E under the policy that sampled it, `B` sequences.
        new: scores of E under the updated policy.
        group: `(B,)` int64, equal for responses to the same draw of a prompt, which are not independent of each
            other; by default every sequence is its own group.
        reported: which estimator is reported.
        clip: also estimate with log-weights clamped to `[-clip, clip]`: a sensitivity, biased.

    Raises:
        ValueError: the batches differ in shape.
        NumericalError: a log-weight is not finite.

    Example:
        >>> l, h = torch.log(torch.tensor([[0.5], [0.5]])).double(), torch.tensor([[0.7], [0.7]]).double()
        >>> old = TokenScores(l, h, torch.ones(2, 1, dtype=torch.bool))
        >>> reweighted_change(old, old).change.sequence.value  # no update, no change, exactly
        0.0
    """
    if old.logprob.shape != new.logprob.shape:
        raise ValueError(
            f"expected scores of the same batch, found {old.logprob.shape} and {new.logprob.shape}"
        )
    group = torch.arange(len(old.mask)) if group is None else group
    weights = weight_diagnostics((new.logprob - old.logprob).sum(dim=1))
    estimates: dict[str, Estimates] = {
        "snis": change_by("snis", old, new, group),
        "per_decision": change_by("per_decision", old, new, group),
    }
    clipped = None
    if clip is not None:
        clipped = float((weights.log_weights.abs() > clip).double().mean())
        estimates["snis_clipped"] = change_by("snis", old, new, group, clip)
    return GroundTruth(
        estimates=estimates,
        reported=reported,
        H_orig=entropy_before(old, group),
        weights=weights,
        scores_new=new,
        clipped_fraction=clipped,
    )


def resampled_change(old: TokenScores, group: Tensor, fresh: TokenScores, fresh_group: Tensor) -> Estimates:
    """The change from a fresh sample of the new policy: no weights, far more noise, the independent check.

    Args:
        old: scores of E under the policy before, which sampled it.
        group: `(B,)` prompts of E.
        fresh: scores of new responses under the policy after, which sampled them.
        fresh_group: their prompts; equal numbers are the same draw of a prompt, whose common part of the error cancels.

    Returns:
        nats per response, nats per token.
    """
    B = len(group)
    h = torch.nn.utils.rnn.pad_sequence([*old.entropy, *fresh.entropy], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([*old.mask, *fresh.mask], batch_first=True)

    def change(q: Tensor) -> Tensor:
        return entropy(q[B:], h[B:], mask[B:]) - entropy(q[:B], h[:B], mask[:B])

    return PerEstimand.of(estimate(change, torch.cat([group, fresh_group])))
