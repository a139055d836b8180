"""The update: the loss's gradient on U, and the step the optimizer takes with it.

`step = theta_new - theta_old` is what `optimizer.step()` really does, taken on a snapshot: clipping, momentum, bias
correction, weight decay and per-group settings included. `Y = step / eta` is the step per unit of learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.estimators.loss_settings import LossSettings
from probe.estimators.loss_terms import needs_scores
from probe.estimators.losses import LossInputs, loss_weights
from probe.estimators.rounding import Rounding
from probe.estimators.router_loss import router_gradient
from probe.scoring.collector import Progress
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores
from probe.snapshot import copied, preserved


@dataclass(frozen=True)
class LossGradient:
    """The gradient of the loss on U.

    Attributes:
        gradient: by parameter name, before clipping.
        weights: `d loss / d l[i, t]`, `(B, T)` float64.
        entropy_weights: `d loss / d h[i, t]`, `(B, T)` float64.
        scores: scores of U at the current weights.

    A load-balancing loss is in the gradient and not in the weights.
    """

    gradient: Mapping[str, Tensor]
    weights: Tensor
    entropy_weights: Tensor
    scores: TokenScores


@dataclass(frozen=True)
class Update:
    """One optimizer step.

    Attributes:
        step: `theta_new - theta_old` by parameter name, on the snapshot device.
        new_parameters: `theta_new`, bitwise what the optimizer left; where the training keeps its weights in 16 bits,
            what they are rounded to there, which is not `theta_old + step` then.
        gradient: the loss's gradient before clipping.
        gradient_norm: its Euclidean norm over all parameters.
        clip_factor: what clipping multiplied it by (1 when it did nothing).
        learning_rate: `eta`, the reference learning rate of the optimizer's groups.
        loss_weights: `d loss / d l[i, t]`, `(B, T)`.
        entropy_weights: `d loss / d h[i, t]`, `(B, T)`.
        scores: scores of U.
        rounding: what rounding to the training's type leaves of the step; None where there is none.
    """

    step: Mapping[str, Tensor]
    new_parameters: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    gradient_norm: float
    clip_factor: float
    learning_rate: float
    loss_weights: Tensor
    entropy_weights: Tensor
    scores: TokenScores
    rounding: Rounding | None = None


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
    scores = score_tokens(policy, batch, None) if needs_scores(settings, batch) else None
    zeros = torch.zeros(batch.mask.shape, dtype=torch.float64)
    kept, kept_entropy = loss_weights(
        settings,
        LossInputs(
            batch.mask,
            batch.advantages,
            zeros if scores is None else scores.logprob,
            zeros if scores is None else scores.entropy,
            batch.truncated,
            batch.old_logprobs,
            ref_logprobs,
            batch.sampling_logprobs,
            order,
            batch.loss_tokens,
        ),
    )

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return kept[i, t].unsqueeze(0), kept_entropy[i, t].unsqueeze(0)

    (gradient,), scores = token_gradients(policy, batch, token_weights, 1, progress)
    if settings.router_aux_loss_coef:
        cut, rows = settings.mask_truncated_completions, settings.per_device_train_batch_size
        for name, of_router in router_gradient(policy, batch, cut, rows, order).items():
            gradient[name] += settings.router_aux_loss_coef * of_router
    return LossGradient(gradient=gradient, weights=kept, entropy_weights=kept_entropy, scores=scores)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    max_grad_norm: float | None,
    snapshot_device: torch.device | str = "cpu",
    lr_factor: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float]:
    """What `optimizer.step()` would do with `gradient`; parameters, grads and optimizer are bitwise restored.

    Args:
        optimizer: any torch optimizer over `parameters`, with its state.
        parameters: by name.
        gradient: by the same names.
        max_grad_norm: clip the total norm to this first, as training does; None does not clip.
        snapshot_device: where the snapshot and the results are kept.
        lr_factor: multiplies the learning rate of every group.

    Returns:
        `(step, new_parameters, gradient_norm, clip_factor)`.

    Raises:
        NumericalError: the step is not finite.
    """
    with preserved(parameters, optimizer, snapshot_device):
        before = copied(parameters, snapshot_device)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * lr_factor
        for name, p in parameters.items():
            p.grad = gradient[name].clone()
        norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        factor = 1.0
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(parameters.values()), max_grad_norm, norm)
            factor = min(1.0, max_grad_norm / (float(norm) + 1e-6))  # torch's own formula
        optimizer.step()
        new = copied(parameters, snapshot_device)
    step = {name: new[name] - before[name] for name in new}
    for name, change in step.items():
        if not bool(torch.isfinite(change).all()):
            raise NumericalError(f"expected a finite optimizer step, found NaN or infinity in that of {name}")
    return step, new, float(norm), factor
