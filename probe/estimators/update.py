"""The gradient of the loss on U."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimators.loss_settings import LossSettings
from probe.estimators.loss_terms import needs_scores
from probe.estimators.losses import LossInputs, loss_weights
from probe.estimators.router_loss import router_gradient
from probe.scoring.collector import Progress
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores


@dataclass(frozen=True)
class LossGradient:
    """The gradient of the loss on U.

    Attributes:
        gradient: by parameter name, before clipping.
        weights: `d loss / d l[i, t]`, `(B, T)` float64.
        entropy_weights: `d loss / d h[i, t]`, `(B, T)` float64.
        scores: scores of U at the current weights.
        inputs: what the weights are a function of, at these scores.
        router: the part of a load-balancing loss in the gradient, which has none in the weights; None without one.
    """

    gradient: Mapping[str, Tensor]
    weights: Tensor
    entropy_weights: Tensor
    scores: TokenScores
    inputs: LossInputs
    router: Mapping[str, Tensor] | None = None


def loss_inputs(
    batch: RolloutBatch,
    logprob: Tensor,
    entropy: Tensor,
    ref_logprobs: Tensor | None = None,
    order: Tensor | None = None,
) -> LossInputs:
    """What the loss of a batch with advantages is a function of.

    Args:
        batch: U.
        logprob: `l`, `(B, T)` nats.
        entropy: `h`, `(B, T)` nats.
        ref_logprobs: under the reference policy, `(B, T)`, where there is a KL penalty.
        order: see `loss_gradient`.
    """
    assert batch.advantages is not None
    return LossInputs(
        batch.mask,
        batch.advantages,
        logprob,
        entropy,
        batch.truncated,
        batch.old_logprobs,
        ref_logprobs,
        batch.sampling_logprobs,
        order,
        batch.loss_tokens,
    )


def loss_gradient(
    policy: Policy,
    batch: RolloutBatch,
    settings: LossSettings,
    ref_logprobs: Tensor | None = None,
    progress: Progress | None = None,
    order: Tensor | None = None,
) -> LossGradient:
    """Gradient of the policy-gradient loss on U, summed over microbatches: their size changes nothing.

    Where the weights depend on scores (see `needs_scores`), U is scored first: they may depend on other tokens' too.

    Args:
        policy: the policy.
        batch: U, with advantages; with `old_logprobs` the PPO ratio and clipping apply, with
            `sampling_logprobs` the sampler's correction.
        settings: the loss.
        ref_logprobs: `(B, T)` log-probs of the reference policy, needed where `kl_coef > 0`.
        progress: called after each microbatch.
        order: `(B,)` int64, in which a trainer cuts U into its microbatches; None takes U as it stands.

    Raises:
        ValueError: U has no advantages.
        RolloutError: all responses are empty.
        NumericalError: a score or gradient is not finite.
    """
    if batch.advantages is None:
        raise ValueError(
            "expected an update batch with advantages, found none; see probe.estimators.advantages"
        )
    first = score_tokens(policy, batch, None) if needs_scores(settings, batch) else None
    zeros = torch.zeros(batch.mask.shape, dtype=torch.float64)
    l, h = (zeros, zeros) if first is None else (first.logprob, first.entropy)
    inputs = loss_inputs(batch, l, h, ref_logprobs, order)
    kept, kept_entropy = loss_weights(settings, inputs)

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return kept[i, t].unsqueeze(0), kept_entropy[i, t].unsqueeze(0)

    (gradient,), scores = token_gradients(policy, batch, token_weights, 1, progress)
    if first is None:
        inputs = replace(inputs, logprob=scores.logprob, entropy=scores.entropy)
    router: dict[str, Tensor] | None = None
    if settings.router_aux_loss_coef:
        cut, rows = settings.mask_truncated_completions, settings.per_device_train_batch_size
        found = router_gradient(policy, batch, cut, rows, order)
        router = {name: settings.router_aux_loss_coef * of_router for name, of_router in found.items()}
        for name, of_router in router.items():
            gradient[name] += of_router
    return LossGradient(
        gradient, kept, entropy_weights=kept_entropy, scores=scores, inputs=inputs, router=router
    )
