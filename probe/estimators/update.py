"""The update: the loss's gradient on U, and the step the optimizer takes with it.

`step = theta_new - theta_old` is what `optimizer.step()` really does, taken on a snapshot: clipping, momentum, bias
correction, weight decay and per-group settings included. `Y = step / eta` is the step per unit of learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors import NumericalError, OptimizerStateError
from probe.estimators.losses import LossInputs, LossSettings, loss_weights, needs_scores
from probe.estimators.router_loss import router_gradient
from probe.scoring.passes import Policy, Progress, score_tokens, token_gradients
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


@dataclass(frozen=True)
class Rounding:
    """A step in the type that the training keeps its weights in.

    Attributes:
        dtype: that type, `bfloat16` or `float16`.
        moved: fraction of the weights in that type that the training's step changes.
        moved_exact: fraction of them that the exact step changes.
        norm: Euclidean norm of the step that is left, all parameters included.
    """

    dtype: str
    moved: float
    moved_exact: float
    norm: float


@dataclass(frozen=True)
class ClosedFormStep:
    """An Adam(W) step in the parts it is exactly the sum of, float64, by parameter name.

    Attributes:
        momentum: the part of the saved first moment.
        decay: the part of weight decay.
        gradient: the part of the gradient: elementwise `P * g`, the denominator held at the step's own.
        gradient_map: `P`, what one unit of the loss's gradient (before clipping) adds to the step.
    """

    momentum: Mapping[str, Tensor]
    decay: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    gradient_map: Mapping[str, Tensor]

    def total(self) -> dict[str, Tensor]:
        """The step."""
        return {name: self.momentum[name] + self.decay[name] + self.gradient[name] for name in self.gradient}


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


def rounded_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    new_parameters: Mapping[str, Tensor],
    clip_factor: float = 1.0,
    lr_factor: float = 1.0,
    fused: bool = False,
) -> tuple[dict[str, Tensor], Rounding]:
    """The step as a training takes it whose weights, moments and gradients are in 16 bits.

    Every operation of torch's Adam or AdamW rounds there (of the fused one every result), so that what is small beside
    the weight is lost. The step is taken on copies, one parameter after the other.

    Args:
        optimizer: Adam or AdamW over `parameters`, with moments that are numbers of `dtypes`.
        parameters: by name, with values that are numbers of `dtypes`.
        gradient: before clipping, by name.
        dtypes: the training's type of every parameter that is in 16 bits there.
        new_parameters: what the exact step leaves, on the device where the result is to be.
        clip_factor: what clipping multiplies the gradient by.
        lr_factor: multiplies the learning rate of every group.
        fused: whether the training's optimizer is the fused one.

    Returns:
        The new parameters, in the types and on the devices of `new_parameters`, and what is left of the step.
    """
    groups = _groups_by_name(optimizer, parameters)
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
    new = dict(new_parameters)
    total, moved, moved_exact = 0, 0, 0
    for name, dtype in dtypes.items():
        p = parameters[name]
        twin = nn.Parameter(p.detach().to(dtype))
        twin.grad = gradient[name].to(device=p.device, dtype=dtype) * clip_factor
        group = {k: v for k, v in groups[name].items() if k not in ("params", "foreach", "fused")}
        how = {"fused": True} if fused else {"foreach": False}
        own = kind([{**group, "params": [twin], "lr": group["lr"] * lr_factor}], **how)
        own.state[twin] = {
            key: value.clone() if key == "step" else value.to(dtype)
            for key, value in optimizer.state.get(p, {}).items()
        }
        own.step()
        exact = new_parameters[name]
        before = p.detach().to(exact.device)
        new[name] = twin.detach().to(exact)
        total += p.numel()
        moved += int((new[name] != before).sum())
        moved_exact += int((exact != before).sum())
    squares = sum(
        float((new[n] - p.detach().to(new[n].device)).double().square().sum()) for n, p in parameters.items()
    )
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    return new, Rounding(
        ", ".join(names), moved / max(total, 1), moved_exact / max(total, 1), math.sqrt(squares)
    )


def adam_closed_form(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    clip_factor: float = 1.0,
) -> ClosedFormStep:
    """The step of torch's Adam or AdamW written out, in float64, from the optimizer's own groups and state.

    With `k` steps taken before, `m`, `v` the moments and `g` the clipped gradient,

        v_new = beta2 v + (1 - beta2) g^2,    denom = sqrt(v_new / (1 - beta2^(k+1))) + eps
        step  = -eta (beta1 m + (1 - beta1) g) / (1 - beta1^(k+1)) / denom - eta lambda theta

    the last term for AdamW; Adam adds `lambda theta` to `g` instead, whose linear part is then the `decay`.

    Args:
        optimizer: torch.optim.Adam or AdamW.
        parameters: by name.
        gradient: before clipping, by name.
        clip_factor: what clipping multiplies the gradient by.

    Raises:
        OptimizerStateError: the optimizer is not Adam or AdamW, or a parameter is in none of its groups.
    """
    groups = _groups_by_name(optimizer, parameters)
    momentum, decay, step, linear = {}, {}, {}, {}
    for name, p in parameters.items():
        g = gradient[name].double()
        momentum[name], decay[name], of_clipped = _adam_terms(
            groups[name], optimizer.state.get(p, {}), p, g * clip_factor
        )
        linear[name] = of_clipped * clip_factor
        step[name] = linear[name] * g
    return ClosedFormStep(momentum, decay, step, linear)


def preconditioned_direction(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The direction `Y = -g / (sqrt(v_hat_old) + eps)`, float64: the gradient scaled by the *saved* second moment.

    Without momentum, clipping and decay this is not the step any optimizer takes; it is kept so that numbers
    published with it can be reproduced.

    Args:
        optimizer: torch.optim.Adam or AdamW, with state.
        parameters: by name.
        gradient: gradient of the loss by name (the step descends it, hence the sign).

    Raises:
        OptimizerStateError: not Adam or AdamW, a parameter in no group, or no second moment yet.
    """
    groups = _groups_by_name(optimizer, parameters)
    out = {}
    for name, p in parameters.items():
        state, group = optimizer.state.get(p, {}), groups[name]
        k = float(state.get("step", 0))
        if k < 1:
            raise OptimizerStateError(
                f"step: preconditioned expects a saved second moment, found none for {name}; use step: optimizer"
            )
        v_hat = state["exp_avg_sq"].to(p.device).double() / (1 - float(group["betas"][1]) ** k)
        out[name] = -gradient[name].double() / (v_hat.sqrt() + float(group["eps"]))
    return out


def _groups_by_name(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """The parameter group of each parameter."""
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
        raise OptimizerStateError(
            f"the closed form is that of torch.optim.Adam and AdamW, found {type(optimizer).__name__}; "
            "use step: optimizer"
        )
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in by_id]
    if missing:
        raise OptimizerStateError(f"expected every parameter in the optimizer, found none for {missing[:10]}")
    return {name: by_id[id(p)] for name, p in parameters.items()}


def _adam_terms(
    group: Mapping[str, Any], state: Mapping[str, Any], p: nn.Parameter, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One parameter's step: the parts of momentum and decay, and the factor of the clipped gradient `g`."""
    beta1, beta2 = (float(b) for b in group["betas"])
    theta = p.detach().double()
    m = state["exp_avg"].to(p.device).double() if "exp_avg" in state else torch.zeros_like(theta)
    v = state["exp_avg_sq"].to(p.device).double() if "exp_avg_sq" in state else torch.zeros_like(theta)
    second = beta2 * v + (1 - beta2) * _effective_gradient(group, theta, g) ** 2
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"].to(p.device).double())
    return adam_parts(group, theta, beta1 * m, second, float(state.get("step", 0)) + 1)


def adam_parts(
    group: Mapping[str, Any], theta: Tensor, carried: Tensor, second: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of one parameter's Adam(W) step.

    Args:
        group: its settings.
        theta: its value before the step, float64.
        carried: `beta1 m`, what the first moment carries over from earlier gradients.
        second: the second moment that the step uses (with AMSGrad the largest so far), before bias correction.
        step: the number of this step, from 1.

    Returns:
        The part of momentum, the part of decay, and the factor of the clipped gradient.
    """
    lr, eps, decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    beta1, beta2 = (float(b) for b in group["betas"])
    sign = -1.0 if group.get("maximize", False) else 1.0
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    scale = -lr / (1 - beta1**step) / denominator
    of_decay = -lr * decay * theta if _decoupled(group) else scale * (1 - beta1) * decay * theta
    return scale * carried, of_decay, sign * scale * (1 - beta1)


def carried_moment(group: Mapping[str, Any], theta: Tensor, first: Tensor, g: Tensor) -> Tensor:
    """`beta1 m` from the first moment *after* a step, `first = beta1 m + (1 - beta1) g'`.

    Args:
        group: the parameter's settings.
        theta: its value before the step, float64.
        first: the first moment after the step.
        g: the clipped gradient the step was taken with.
    """
    beta1 = float(group["betas"][0])
    return first - (1 - beta1) * _effective_gradient(group, theta, g)


def _effective_gradient(group: Mapping[str, Any], theta: Tensor, g: Tensor) -> Tensor:
    """The gradient as the moments see it: negated to maximise, with the decay where it is coupled."""
    signed = -g if group.get("maximize", False) else g
    return signed if _decoupled(group) else signed + float(group["weight_decay"]) * theta


def _decoupled(group: Mapping[str, Any]) -> bool:
    """Whether weight decay acts on the parameter directly (AdamW)."""
    return bool(group.get("decoupled_weight_decay", False))
