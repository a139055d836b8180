"""Which tokens of the training's own batch did it: what classes of them add to the deltaH1 of a probed step.

The batch is known where a trainer keeps its rollouts (TRL's does), or where `watch(update=...)` gives it. Before the
step the gradient X of the token entropy is taken on E; after it, Adam's denominator is there, and one pass over the
batch along `P * X` says what each of its tokens has added (see `probe.attribution.contributions`). How much gradient
clipping has taken off is not asked for: the contributions are scaled such that they add up to what the step's own
gradient has in it, which is known; what they have to be multiplied by must be above 0 and not far above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probe.attribution.token_classes import token_labels
from probe.attribution.update_spread import preconditioned
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError, ProbeError
from probe.estimand import Number, Numbers, PerEstimand, as_mapping
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import loss_weight_parts
from probe.estimators.step_parts import StepParts
from probe.estimators.update import loss_inputs
from probe.estimators.weighting import score_weights
from probe.loading.tokenizer import token_decoder
from probe.parameters import inner_product, norm
from probe.phases.passes import AlongStep, tangents_of
from probe.scoring.differentiable import as_trained, whole_gradients
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.text import error_text

LARGEST_SCALE = 2.0
"""Contributions are scaled by the factor of gradient clipping, at most 1; dropout, of which the training's gradient has
another draw, and 16-bit arithmetic leave a margin."""
PARTS = {
    "advantage": {"positive": "positive advantage", "negative": "negative advantage"},
    "outcome": {"right": "right", "wrong": "wrong"},
    "entropy": {"high_entropy": "highest fifth"},
    "kind": {"eos": "eos", "digits": "digits", "words": "words"},
}
"""The classes of tokens that a training logs, by the name of the number: see `probe.attribution.token_classes`."""
CLASSES = tuple(name for classes in PARTS.values() for name in classes)


@dataclass(frozen=True)
class HostUpdate:
    """The batch that an update of a training is made from.

    Attributes:
        batch: its responses with advantages, and rewards where they are known.
        loss: what fixes its loss.
        ref_logprobs: under the reference policy, `(B, T)`, where there is a KL penalty.
    """

    batch: RolloutBatch
    loss: LossSettings
    ref_logprobs: Tensor | None = None


UpdateOf = Callable[[Policy], HostUpdate]
"""Gives, for the policy before the step, the batch of the update that is being made: this process's part of it. Called
after the optimizer's step, on all ranks; an exception says why it is not known."""


@dataclass(frozen=True)
class TokenChanges:
    """What classes of tokens of the training's batch add to deltaH1 per token.

    Attributes:
        numbers: `deltaH1_positive` and the like, nats per token, by name; classes without a token are left out.
        scale: what the contributions were multiplied by; None where there are none, or no token had a weight.
        reason: why there are none; empty where there are.
    """

    numbers: Mapping[str, Numbers]
    scale: float | None = None
    reason: str = ""

    def as_mapping(self) -> dict[str, Any]:
        """The names and values of a history entry."""
        if self.reason:
            return {"attribution_reason": self.reason}
        return {"attribution_scale": self.scale, **as_mapping(self.numbers)}


def token_entropy_gradient(policy: Policy, E: RolloutBatch) -> dict[str, Tensor]:
    """X of the token estimand, by parameter name: causal weights with the leave-one-out baseline by position.

    Args:
        policy: with the parameters as they are.
        E: drawn from it.
    """
    scores = score_tokens(policy, E)
    weights = score_weights(scores)
    B, T = len(E), float(scores.lengths.mean())
    H = float(scores.sequence_entropy.mean()) / T
    of_logprob = (weights.entropy - H * weights.length) / (B * T)

    def constants(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return of_logprob[i, t].unsqueeze(0), torch.full_like(h, 1 / (B * T)).unsqueeze(0)

    with whole_gradients(policy.model):
        (gradient,), _ = token_gradients(policy, E, constants, 1)
    return gradient


def token_changes(
    policy: Policy,
    X: Mapping[str, Tensor],
    parts: StepParts | str,
    step: Mapping[str, Tensor],
    passes: AlongStep,
    update_of: UpdateOf,
    tokenizer: Any,
) -> TokenChanges:
    """What classes of tokens have added to deltaH1, or why it is not known.

    Args:
        policy: at the parameters before the step.
        X: gradient of the token entropy.
        parts: of the step, with the map from gradient to step; or why they are not known.
        step: `theta_new - theta_old`.
        passes: over E along the step.
        update_of: gives the training's batch.
        tokenizer: for the texts of tokens.
    """
    if isinstance(parts, str):
        return TokenChanges({}, reason=parts)
    own: HostUpdate | str
    try:
        own = update_of(policy)
        if own.batch.advantages is None:
            own = "the training's batch has no advantages"
    except ProbeError as error:
        own = error_text(error)
    except Exception as error:  # the trainer's own buffers raise what they like
        own = f"the training's batch cannot be read: {error_text(error)}"
    found = policy.ranks.gathered("the training's batch", own)
    reasons = [one for one in found if isinstance(one, str)]
    if reasons:
        return TokenChanges({}, reason=reasons[0])
    try:  # what fails here fails on all ranks alike
        update = joined([one for one in found if not isinstance(one, str)])
    except DataError as error:
        return TokenChanges({}, reason=error_text(error))
    if update.loss.router_aux_loss_coef > 0:
        return TokenChanges(
            {}, reason="the update has a load-balancing loss, which is no sum over its tokens"
        )
    return _changes(policy, X, parts, step, passes, update, tokenizer)


def _changes(
    policy: Policy,
    X: Mapping[str, Tensor],
    parts: StepParts,
    step: Mapping[str, Tensor],
    passes: AlongStep,
    update: HostUpdate,
    tokenizer: Any,
) -> TokenChanges:
    """See `token_changes`."""
    U = update.batch
    scores = score_tokens(policy, U)
    inputs = loss_inputs(U, scores.logprob, scores.entropy, update.ref_logprobs)
    try:
        weights = loss_weight_parts(update.loss, inputs)
    except ValueError as error:  # an option without what it needs
        return TokenChanges({}, reason=f"the update's loss: {error_text(error)}")
    u = preconditioned(parts.gradient_map, X)
    if norm(u) == 0.0:
        return TokenChanges({}, reason="the entropy's gradient is 0")
    with as_trained(policy.model, policy.values):
        if passes.way.mode == "jvp":
            tangents = forward_tangents(policy, U, u)
        else:
            tangents = tangents_of(policy, U, u, passes, norm(step), here=scores)
    c = weights.policy * tangents.logprob
    raw = float((c + weights.kl * tangents.logprob + weights.bonus * tangents.entropy).sum())
    own = {
        name: step[name] - parts.momentum[name] - parts.decay.get(name, torch.zeros_like(step[name]))
        for name in step
    }
    of_gradient = inner_product(X.__getitem__, own)
    idle = not any(
        bool(x.any()) for x in (weights.policy, weights.kl, weights.bonus)
    )  # all rewards are equal
    scale = of_gradient / raw if raw != 0.0 else 0.0
    if not idle and not 0.0 < scale <= LARGEST_SCALE:
        return TokenChanges(
            {},
            reason=f"the batch's tokens would add {raw:.2g} nats per token where the step's gradient has "
            f"{of_gradient:.2g}: it is not the batch that the step was made from, or not its loss",
        )
    labels = token_labels(U, scores.entropy, token_decoder(tokenizer))
    numbers: dict[str, Numbers] = {}
    for way, classes in PARTS.items():
        if way not in labels:
            continue
        label, names = labels[way]
        for name, of in classes.items():
            chosen = label == names.index(of)
            if bool(chosen.any()):
                numbers[f"deltaH1_{name}"] = PerEstimand(None, Number(scale * float(c[chosen].sum())))
    return TokenChanges(numbers, None if idle else scale)


def joined(parts: Sequence[HostUpdate]) -> HostUpdate:
    """The parts of several processes as one batch, in their order; groups of different parts stay apart.

    Raises:
        DataError: some have a column that others have not.
    """
    if len(parts) == 1:
        return parts[0]
    batches = [part.batch for part in parts]
    T = max(batch.mask.shape[1] for batch in batches)

    def rows(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [x for x in values if x is not None]
        if 0 < len(there) < len(values):
            raise DataError(
                "expected the same columns of the batch on all processes, found some on a part of them"
            )
        if not there:
            return None
        wide = [x if x.dim() == 1 else torch.nn.functional.pad(x, (0, T - x.shape[1])) for x in there]
        return torch.cat(wide)

    offsets = torch.tensor([0, *(int(batch.group.max()) + 1 for batch in batches[:-1])]).cumsum(0)
    tensors = (
        "completion_ids",
        "mask",
        "truncated",
        "rewards",
        "advantages",
        "old_logprobs",
        "sampling_logprobs",
    )
    cells: dict[str, Any] = {name: rows([getattr(one, name) for one in batches]) for name in tensors}
    cells["group"] = torch.cat([one.group + k for one, k in zip(batches, offsets, strict=True)])
    for name in ("prompts", "completions", "prompt_ids"):
        cells[name] = tuple(x for one in batches for x in getattr(one, name))
    batch = replace(batches[0], rows=(), doubts=(), places=(), **cells)
    return HostUpdate(batch, parts[0].loss, rows([part.ref_logprobs for part in parts]))
