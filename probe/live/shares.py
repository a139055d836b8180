"""Which part of an optimizer step was momentum's and which weight decay's, found out after it was taken.

Nothing is copied before the step but the parameters: the first moment after it is `beta1 m + (1 - beta1) g`, and the
gradient `g` is still there, so the part that earlier batches have in the step follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import OptimizerStateError
from probe.estimators.prediction import norm
from probe.estimators.update import adam_parts, carried_moment
from probe.loading.moments import read_moments

TOLERANCE, CODED_TOLERANCE = 1e-2, 0.1
"""Largest norm of what the parts leave of the step unexplained, relative to the step; the same for 8-bit moments, which
are rounded after they were used."""


@dataclass(frozen=True)
class StepParts:
    """The parts of a step, by parameter name; the rest of it is the gradient's.

    Attributes:
        momentum: what earlier gradients have in it.
        decay: weight decay's part; empty where there is none.
        error: norm of `step - (momentum + decay + gradient part)` relative to the step's.
    """

    momentum: Mapping[str, Tensor]
    decay: Mapping[str, Tensor]
    error: float


def step_parts(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    old: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
) -> StepParts | str:
    """Split a step that was just taken, while the gradients are still there.

    For Adam and AdamW (torch's and bitsandbytes') and SGD the step is a sum of a part that is linear in this batch's
    gradient, with the denominator held at its value, and the parts of momentum and decay; see `adam_closed_form`. Other
    rules (Lion's sign, Muon's orthogonalisation) are no such sum.

    Args:
        optimizers: those that took the step.
        parameters: by name, after it.
        old: their values before it.
        step: `theta_new - theta_old`.

    Returns:
        The parts, or the reason why there are none.
    """
    owners = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    momentum, decay, rest, coded = {}, {}, {}, False
    for name, p in parameters.items():
        optimizer, group = owners[id(p)]
        theta, state = old[name].to(p.device).double(), optimizer.state.get(p, {})
        gone = p.grad is None or (not state and type(optimizer) is not torch.optim.SGD)
        if gone and bool(step[name].any()):
            return f"the gradient or the optimizer's state of {name} is gone"
        g = torch.zeros_like(theta) if p.grad is None else p.grad.detach().double()
        try:
            found = _parts(optimizer, group, state, name, theta, g)
        except OptimizerStateError as error:
            return f"{error}"
        if found is None:
            return f"{type(optimizer).__name__} is not linear in the gradient"
        coded = coded or "state1" in state or "__bnb_optimizer_quant_state__" in state
        of_momentum, of_decay, of_gradient = (
            found if p.grad is not None else (theta * 0, theta * 0, theta * 0)
        )
        rest[name] = step[name].to(p.device).double() - of_momentum - of_decay - of_gradient
        momentum[name] = of_momentum.to(step[name])
        decay[name] = of_decay.to(step[name])
    unexplained = norm(rest) / max(norm(step), 1e-300)
    if not unexplained <= (CODED_TOLERANCE if coded else TOLERANCE):
        return f"momentum, decay and gradient leave {unexplained:.2g} of the step unexplained"
    if not any(bool(x.any()) for x in decay.values()):
        decay = {}
    return StepParts(momentum=momentum, decay=decay, error=unexplained)


def _parts(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str,
    theta: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Momentum's, decay's and the gradient's part of one parameter's step; None for an unknown rule."""
    if isinstance(optimizer, torch.optim.Adam):
        return _adam(group, state, name, theta, g)
    if type(optimizer).__module__.startswith("bitsandbytes.") and "Adam" in type(optimizer).__name__:
        # bitsandbytes has AdamW's decay in all of them, and no name for it in the group
        return _adam({**group, "decoupled_weight_decay": True}, state, name, theta, g)
    if type(optimizer) is torch.optim.SGD:
        return _sgd(group, state, theta, g)
    return None


def _adam(
    group: Mapping[str, Any], state: Mapping[str, Any], name: str, theta: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of an Adam(W) step."""
    if not state:
        return torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    moments = read_moments({name: state}, {name: bool(group.get("amsgrad", False))})[name]
    largest = moments.max_exp_avg_sq
    second = (moments.exp_avg_sq if largest is None else largest).to(theta.device).double()
    carried = carried_moment(group, theta, moments.exp_avg.to(theta.device).double(), g)
    of_momentum, of_decay, factor = adam_parts(group, theta, carried, second, moments.step)
    return of_momentum, of_decay, factor * g


def _sgd(
    group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The parts of an SGD step; None for Nesterov's, which uses the gradient twice."""
    lr, mu, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    sign = -1.0 if group.get("maximize", False) else 1.0
    if group["nesterov"]:
        return None
    buffer, effective = state.get("momentum_buffer"), sign * g + decay * theta
    if mu == 0.0 or buffer is None:
        return torch.zeros_like(theta), -lr * decay * theta, -lr * sign * g
    after = buffer.to(theta.device).double()
    # the first step's buffer is the gradient itself, without dampening
    first = bool(torch.allclose(after, effective, rtol=1e-5, atol=0.0))
    share = 1.0 if first else 1.0 - float(group["dampening"])
    return -lr * (after - share * effective), -lr * share * decay * theta, -lr * share * sign * g
