"""One directional derivative by two methods, before any gradient is believed.

Several libraries drop or distort derivatives without an error (quantised layers, custom kernels, gradients computed
under `no_grad`). A backward pass and a finite difference along its own direction disagree then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.errors import NumericalError
from probe.estimators.weighting import still_to_come
from probe.rollouts.batch import RolloutBatch
from probe.scoring.passes import Policy, score_tokens, token_gradients
from probe.snapshot import parameters_at

RELATIVE_STEPS = (1e-2, 3e-2, 3e-3, 1e-1, 1e-3, 3e-4)
"""Sizes of the difference step relative to the norm of the parameters, tried in this order: the right size depends
on curvature (too large) and on the precision of a forward (too small)."""


@dataclass(frozen=True)
class DerivativeCheck:
    """The outcome.

    Attributes:
        relative_error: `|difference / backward - 1|` at the best step.
        tolerance: what was allowed.
        relative_step: the step's size relative to the norm of the parameters.
    """

    relative_error: float
    tolerance: float
    relative_step: float


def derivative_check(policy: Policy, batch: RolloutBatch) -> DerivativeCheck:
    """Compare the norm of a gradient, from backward, with the difference quotient along that gradient.

    The function is `f = sum_(i,t) h + w l` with `w` the entropy still to come, the one the entropy's gradient is
    made of. It passes when the two agree within 5 % (25 % where weights are in half precision, whose forwards are
    noisy) for one of a few step sizes: what is wrong without an error is wrong at every step size.

    Args:
        policy: the policy; parameters are restored bitwise.
        batch: a few sequences are enough; their cost is one gradient and 2 to 12 scorings.

    Raises:
        NumericalError: they disagree, or the gradient is zero.
    """
    weights = still_to_come(score_tokens(policy, batch).entropy)

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return weights[i, t].unsqueeze(0), torch.ones_like(h).unsqueeze(0)

    (gradient,), _ = token_gradients(policy, batch, token_weights, 1)
    norm = float(torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt())
    if norm == 0.0:
        raise NumericalError(
            "expected a gradient of the entropy, found exactly zero for every parameter; the trainable parameters do "
            "not influence the output (is the adapter active?)"
        )
    parameters = policy.parameters
    size = (
        float(torch.stack([p.detach().double().square().sum() for p in parameters.values()]).sum().sqrt())
        or 1.0
    )

    def shifted(eps: float) -> float:
        values = {n: p.detach() + (eps / norm) * gradient[n] for n, p in parameters.items()}
        with parameters_at(parameters, values):
            scores = score_tokens(policy, batch)
        return float((scores.entropy + weights * scores.logprob).sum())

    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in policy.model.parameters())
    tolerance, best, best_step = (0.25 if half else 0.05), float("inf"), 0.0
    for relative in RELATIVE_STEPS:
        eps = relative * size
        error = abs((shifted(eps) - shifted(-eps)) / (2 * eps) / norm - 1.0)
        if error < best:
            best, best_step = error, relative
        if best <= tolerance / 5:
            break
    if not best <= tolerance:
        raise NumericalError(
            f"the derivative by backward and by finite differences disagree: relative error {best:.2g} at the best of "
            f"{len(RELATIVE_STEPS)} step sizes, at most {tolerance} expected; some layer drops or distorts gradients "
            "(try checkpoint.attn_implementation: eager, or checkpoint.load_in_4bit: false). "
            "probe_rework.derivative_check: false switches this check off"
        )
    return DerivativeCheck(relative_error=best, tolerance=tolerance, relative_step=best_step)
