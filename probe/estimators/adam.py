"""Adam's rule written out: the step as a sum of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors.exceptions import OptimizerStateError


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
    groups = groups_by_name(optimizer, parameters)
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
    groups = groups_by_name(optimizer, parameters)
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


def groups_by_name(
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
