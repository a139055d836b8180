"""Directional derivatives by two methods, before any gradient is believed.

Several libraries drop or distort derivatives without an error (quantised layers, custom kernels, gradients computed
under `no_grad`). A backward pass and a finite difference along its own direction disagree then. A direction over all
parameters is not enough: where a layer passes only a part of the gradient on, what is left still agrees with itself,
and the missing part is orthogonal to it. So the parameters are taken in blocks by depth, each along its own gradient;
and those without any gradient are moved at random, which must change nothing.

A layer that stops gradients on purpose (DoRA takes the norm of its weight as a constant) does so for backward and
forward mode alike: both agree, and neither is the derivative of what a forward computes. Only forwards can tell. So
the derivatives along the optimizer's step itself are compared with differences of forwards on every run (`step_check`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.estimators.weighting import still_to_come
from probe.parameters import norm
from probe.scoring.differentiable import whole_gradients
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores
from probe.shards import nonzero, part_like

BLOCKS = 4
"""Blocks by depth that the parameters are split into."""
CHANGES = (1e-3, 1e-4, 1e-2, 1e-5, 3e-2, 1e-1)
"""Step sizes, as the first-order change of the function relative to its size, tried in this order: the right size
depends on curvature (sharp policies want a small one) and on the precision of a forward (half wants a large one)."""
LARGEST_MOVE = 0.1
"""No step moves a block by more than this, relative to the norm of its parameters."""
TOLERANCE, HALF_TOLERANCE = 0.05, 0.25
"""Largest relative error, and the same where forwards run in half precision and are noisy."""


class DerivativeMismatchError(NumericalError):
    """Backward is not the derivative of what a forward computes."""


@dataclass(frozen=True)
class DerivativeCheck:
    """The outcome.

    Attributes:
        relative_error: `|difference / backward - 1|` of the worst block, at its best step.
        tolerance: what was allowed.
        blocks: number of blocks compared.
    """

    relative_error: float
    tolerance: float
    blocks: int


@dataclass(frozen=True)
class OwnGradient:
    """The gradient that both checks compare with.

    Attributes:
        scores: of the batch.
        weights: `w[i, t]`, the entropy still to come, `(B, T)`.
        gradient: of `sum_(i,t) h + w l` by backward, by parameter name.
    """

    scores: TokenScores
    weights: Tensor
    gradient: Mapping[str, Tensor]


def derivative_check(policy: Policy, batch: RolloutBatch, own: OwnGradient | None = None) -> DerivativeCheck:
    """Compare backward with difference quotients, block by block.

    The function is `f = sum_(i,t) h + w l` with `w` the entropy still to come, the one the entropy's gradient is
    made of. A block passes when the norm of its gradient and the difference along it agree within 5 % (25 % where
    weights are in half precision) for one of a few step sizes. Parameters whose gradient is exactly zero are moved
    at random, together, and must leave `f` as it is.

    Args:
        policy: the policy; its parameters are not touched.
        batch: a few sequences are enough; the cost is one gradient and about ten scorings of them.
        own: `own_gradient` of the two, where it is there already.

    Raises:
        DerivativeMismatchError: they disagree.
        NumericalError: the gradient is zero throughout.
    """
    own = own_gradient(policy, batch) if own is None else own
    scores, weights, gradient = own.scores, own.weights, own.gradient
    terms = scores.entropy + weights * scores.logprob
    here, size = float(terms.sum()), float(terms.abs().sum())  # rounding goes by the size of the terms
    parameters = policy.parameters

    def objective(direction: Mapping[str, Tensor], eps: float) -> float:
        values = {n: p.detach() + eps * direction[n] for n, p in parameters.items() if n in direction}
        scores = score_tokens(policy.at(values), batch)
        return float((scores.entropy + weights * scores.logprob).sum())

    moved = [name for name, g in gradient.items() if nonzero(g)]
    tolerance, worst = HALF_TOLERANCE if policy.half_precision else TOLERANCE, 0.0
    if not moved:
        if not bool(scores.undecided.any()):  # a policy without any choice left has no gradient
            return DerivativeCheck(relative_error=0.0, tolerance=tolerance, blocks=0)
        raise NumericalError(
            "expected a gradient of the entropy, found exactly zero for every parameter; the trainable parameters do "
            "not influence the output (is the adapter active?)"
        )
    blocks = [moved[k * len(moved) // BLOCKS : (k + 1) * len(moved) // BLOCKS] for k in range(BLOCKS)]
    blocks = [block for block in blocks if block]
    for block in blocks:
        error = _block_error(objective, {n: gradient[n] for n in block}, parameters, tolerance, size)
        if not error <= tolerance:
            raise DerivativeMismatchError(
                f"the derivative by backward and by finite differences disagree: relative error {error:.2g} in the "
                f"block {block[0]} to {block[-1]} at the best of {len(CHANGES)} step sizes, at most {tolerance} "
                f"expected; {REMEDY}"
            )
        worst = max(worst, error)
    _check_zeros(objective, here, [n for n in gradient if n not in moved], parameters)
    return DerivativeCheck(relative_error=worst, tolerance=tolerance, blocks=len(blocks))


def own_gradient(policy: Policy, batch: RolloutBatch) -> OwnGradient:
    """Scores of a batch and the gradient of `sum h + w l` by backward."""
    scores = score_tokens(policy, batch)
    weights = still_to_come(scores.entropy)

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return weights[i, t].unsqueeze(0), torch.ones_like(h).unsqueeze(0)

    with whole_gradients(policy.model):
        (gradient,), _ = token_gradients(policy, batch, token_weights, 1)
    return OwnGradient(scores, weights, gradient)


REMEDY = (
    "some layer drops or distorts gradients (try checkpoint.attn_implementation: eager, or checkpoint.load_in_4bit: "
    "false). probe_rework.derivative_mode: finite_difference needs forwards only; derivative_check: false switches "
    "this check off"
)
Objective = Callable[[Mapping[str, Tensor], float], float]


def _block_error(
    objective: Objective,
    gradient: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tolerance: float,
    size: float,
) -> float:
    """Relative error of the difference quotient along a block's own gradient, at the best of a few step sizes.

    0 for a block whose influence is below the rounding of a forward at every step allowed: nothing can be said.
    """
    length = norm(gradient)
    largest = LARGEST_MOVE * (norm({n: parameters[n].detach() for n in gradient}) or 1.0)
    if largest * length < min(CHANGES) * size:
        return 0.0
    direction, best = {n: g / length for n, g in gradient.items()}, math.inf
    for change in CHANGES:
        eps = min(change * size / length, largest)
        quotient = (objective(direction, eps) - objective(direction, -eps)) / (2 * eps)
        best = min(best, abs(quotient / length - 1.0))
        if best <= tolerance / 5:
            break
    return best


def _check_zeros(
    objective: Objective, here: float, names: list[str], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Parameters with a gradient of exactly zero must not influence the objective (a LoRA's A while B is 0 does not).

    Raises:
        DerivativeMismatchError: they do.
    """
    if not names:
        return
    generator = torch.Generator().manual_seed(0)
    direction = {}
    for name in names:
        p = parameters[name]
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.device, p.dtype)
        direction[name] = part_like(noise, p) * (norm({name: p}) or 1.0) / p.numel() ** 0.5
    moved = objective(direction, 0.1)
    if abs(moved - here) > 1e-6 * max(abs(here), 1.0):
        raise DerivativeMismatchError(
            f"expected parameters without a gradient to have no influence, found that moving {names[0]} "
            f"({len(names)} such in all) changes the entropy by {moved - here:.2g}; {REMEDY}"
        )
