"""Which part of an optimizer step was momentum's and which weight decay's, found out after it was taken.

Nothing is copied before the step but the parameters: the first moment after it is `beta1 m + (1 - beta1) g`, and the
gradient `g` is still there, so the part that earlier batches have in the step follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors.exceptions import OptimizerStateError
from probe.estimators.adam import adam_parts, carried_moment
from probe.loading.moments import read_moments
from probe.parameters import norm
from probe.shards import from_part, is_shard, part, total

TOLERANCE, CODED_TOLERANCE = 1e-2, 0.1
"""Largest norm of what the parts leave of the step unexplained, relative to the step; the same for 8-bit moments, which
are rounded after they were used."""

FIRST_STEP = 1e-4
"""Relative distance of SGD's buffer from the gradient up to which they are the same, which they are after one step."""
SMALLEST_DECAY = 1e-3
"""Weight decay whose norm is below this share of the step's is not worth a pass: it counts with the gradient's part."""
SECOND_MOMENT_TOLERANCE = 0.1
"""How far rounding may take a second moment below its least value, relative to it and to the largest of its tensor
(moments of 8 bits have one scale per block)."""


@dataclass(frozen=True)
class StepParts:
    """The parts of a step, by parameter name; the rest of it is the gradient's.

    Attributes:
        momentum: what earlier gradients have in it.
        decay: weight decay's part; empty where there is none to speak of.
        gradient_map: what one unit of the gradient that the step was taken with adds to it; empty where nobody asked.
        error: norm of `step - (momentum + decay + gradient part)` relative to the step's: whether the rule is the one
            assumed. It does not check the gradient, whose part momentum's makes up for.
    """

    momentum: Mapping[str, Tensor]
    decay: Mapping[str, Tensor]
    error: float
    gradient_map: Mapping[str, Tensor] = field(default_factory=dict)


def step_parts(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    old: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
    keep_map: bool = False,
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
        keep_map: also give the map from the gradient to its part.

    Returns:
        The parts, or the reason why there are none.
    """
    found = _split(optimizers, parameters, old, step, keep_map)
    apart = [(p, float(isinstance(found, str))) for p in parameters.values() if is_shard(p)][:1]
    if total(apart) > 0 and not isinstance(found, str):
        return "another process has none for its part of the step"
    if isinstance(found, str):
        return found
    unexplained = math.sqrt(total((step[name], amount) for name, amount in found.rest.items()))
    unexplained /= max(norm(step), 1e-300)
    if not unexplained <= (CODED_TOLERANCE if found.coded else TOLERANCE):
        return f"momentum, decay and gradient leave {unexplained:.2g} of the step unexplained"
    decay = {} if norm(found.decay) < SMALLEST_DECAY * norm(step) else found.decay
    return StepParts(found.momentum, decay, unexplained, found.gradient_map)


@dataclass
class _Split:
    """What `step_parts` makes of a step: its parts, the square of what they leave of it, and how finely they are known.

    Of sharded parameters each process has its own part, and asks no other.
    """

    momentum: dict[str, Tensor]
    decay: dict[str, Tensor]
    rest: dict[str, float]
    gradient_map: dict[str, Tensor]
    coded: bool = False


def _split(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    old: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
    keep_map: bool,
) -> _Split | str:
    """The parts of the step, or the reason why there are none."""
    owners = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    split = _Split({}, {}, {}, {})
    for name, p in parameters.items():
        optimizer, group = owners[id(p)]
        theta = part(old[name]).to(p.device).double()
        state = {k: part(v) if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        gone = p.grad is None or (not state and type(optimizer) is not torch.optim.SGD)
        if gone and bool(part(step[name]).any()):
            return f"the gradient or the optimizer's state of {name} is gone"
        g = torch.zeros_like(theta) if p.grad is None else part(p.grad.detach()).double()
        try:
            found = _parts(optimizer, group, state, name, theta, g)
        except OptimizerStateError as error:
            return f"{error}"
        if found is None:
            return f"{type(optimizer).__name__} is not linear in the gradient"
        split.coded = split.coded or "state1" in state or "__bnb_optimizer_quant_state__" in state
        of_momentum, of_decay, factor = found if p.grad is not None else (theta * 0, theta * 0, theta * 0)
        of_gradient = factor * g
        own = part(step[name])
        left = own.to(p.device).double() - of_momentum - of_decay - of_gradient
        split.rest[name] = float(left.square().sum())
        split.momentum[name] = from_part(of_momentum.to(own), step[name])
        split.decay[name] = from_part(of_decay.to(own), step[name])
        if keep_map:
            split.gradient_map[name] = from_part(factor.to(own), step[name])
    return split


def _parts(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str,
    theta: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Momentum's and decay's part of a parameter's step, and the gradient's factor in it; None for an unknown rule."""
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
    first = moments.exp_avg.to(theta.device).double()
    carried = carried_moment(group, theta, first, g)
    _check_gradient(group, name, first - carried, moments.exp_avg_sq.to(theta.device).double())
    if moments.step == 1:
        carried = torch.zeros_like(theta)  # exactly, whatever the rounding of the moment
    of_momentum, of_decay, factor = adam_parts(group, theta, carried, second, moments.step)
    return of_momentum, of_decay, factor


def _check_gradient(group: Mapping[str, Any], name: str, new: Tensor, second: Tensor) -> None:
    """Compare a gradient with the second moment, `beta2 v + (1 - beta2) g^2`, which cannot be less than its part of it.

    The parts of momentum and gradient add up to the step whatever the gradient is: their sum cannot show that it is
    another one than the step was taken with.

    Args:
        group: the parameter's settings.
        name: its name.
        new: `(1 - beta1) g`, the gradient's part of the first moment.
        second: the second moment after the step.

    Raises:
        OptimizerStateError: the gradient is too large.
    """
    beta1, beta2 = (float(b) for b in group["betas"])
    if not second.numel():  # of a part without entries
        return
    least = (1 - beta2) * (new / (1 - beta1)).square()
    if bool((least > (1 + SECOND_MOMENT_TOLERANCE) * second + SECOND_MOMENT_TOLERANCE * second.max()).any()):
        raise OptimizerStateError(f"the gradient of {name} is not the one that the step was taken with")


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
        return torch.zeros_like(theta), -lr * decay * theta, torch.full_like(theta, -lr * sign)
    after = buffer.to(theta.device).double()
    # the first step's buffer is the gradient itself, without dampening
    first = float((after - effective).norm()) <= FIRST_STEP * float(after.norm())
    share = 1.0 if first else 1.0 - float(group["dampening"])
    factor = torch.full_like(theta, -lr * share * sign)
    return -lr * (after - share * effective), -lr * share * decay * theta, factor
