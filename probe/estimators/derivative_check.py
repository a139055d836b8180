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
from probe.errors import NumericalError
from probe.estimators.estimate import Estimate
from probe.estimators.prediction import norm
from probe.estimators.weighting import still_to_come
from probe.scoring.differentiable import whole_gradients
from probe.scoring.passes import Policy, score_tokens, token_gradients
from probe.scoring.scores import TokenScores, TokenTangents
from probe.scoring.tangents import DifferenceQuotients, ForwardModeError, forward_tangents
from probe.text import error_text

_MEMORY = torch.OutOfMemoryError
"""Says nothing about whether a model can be differentiated."""

BLOCKS = 4
"""Blocks by depth that the parameters are split into."""
CHANGES = (1e-3, 1e-4, 1e-2, 1e-5, 3e-2, 1e-1)
"""Step sizes, as the first-order change of the function relative to its size, tried in this order: the right size
depends on curvature (sharp policies want a small one) and on the precision of a forward (half wants a large one)."""
LARGEST_MOVE = 0.1
"""No step moves a block by more than this, relative to the norm of its parameters."""
FORWARD_TOLERANCE, HALF_FORWARD_TOLERANCE = 1e-3, 0.05
"""Largest relative difference of forward mode and backward, and the same where forwards run in half precision."""
TOLERANCE, HALF_TOLERANCE = 0.05, 0.25
"""Largest relative error, and the same where forwards run in half precision and are noisy."""

STEP_RESPONSES = 8
"""Responses that derivatives along the step are compared on with differences of forwards."""
STEP_SCALES = range(-5, 5)
"""Their difference steps, as powers of 4 times the optimizer's step."""
ROUNDING, HALF_ROUNDING = 2e-3, 0.05
"""Relative difference below which the comparison looks no further, and calls nothing a contradiction; the second where
forwards run in half precision."""

OWN_ERRORS = 3.0
"""Differences contradict a derivative when it lies more than so many of their own errors away."""


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


def derivative_check(policy: Policy, batch: RolloutBatch) -> DerivativeCheck:
    """Compare backward with difference quotients, block by block.

    The function is `f = sum_(i,t) h + w l` with `w` the entropy still to come, the one the entropy's gradient is
    made of. A block passes when the norm of its gradient and the difference along it agree within 5 % (25 % where
    weights are in half precision) for one of a few step sizes. Parameters whose gradient is exactly zero are moved
    at random, together, and must leave `f` as it is.

    Args:
        policy: the policy; its parameters are not touched.
        batch: a few sequences are enough; the cost is one gradient and about ten scorings of them.

    Raises:
        DerivativeMismatchError: they disagree.
        NumericalError: the gradient is zero throughout.
    """
    scores, weights, gradient = _own_gradient(policy, batch)
    terms = scores.entropy + weights * scores.logprob
    here, size = float(terms.sum()), float(terms.abs().sum())  # rounding goes by the size of the terms
    parameters = policy.parameters

    def objective(direction: Mapping[str, Tensor], eps: float) -> float:
        values = {n: p.detach() + eps * direction[n] for n, p in parameters.items() if n in direction}
        scores = score_tokens(policy.at(values), batch)
        return float((scores.entropy + weights * scores.logprob).sum())

    moved = [name for name, g in gradient.items() if bool(g.any())]
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


@dataclass(frozen=True)
class ForwardModeCheck:
    """Whether forward mode can be believed.

    Attributes:
        usable: it ran, and agreed with backward.
        reason: a sentence.
    """

    usable: bool
    reason: str


def forward_mode_check(policy: Policy, batch: RolloutBatch) -> ForwardModeCheck:
    """Run forward mode along the gradient of the function of `derivative_check`: it must give the gradient's norm.

    Where backward or forward mode fails with an error of torch's or of the model's, forward mode is not usable, and
    the reason is that error.

    Args:
        policy: the policy.
        batch: a few sequences are enough; the cost is a gradient and a forward-mode pass of them.
    """
    try:
        scores, weights, gradient = _own_gradient(policy, batch)
    except _MEMORY:
        raise
    except RuntimeError as error:  # reentrant checkpointing, custom kernels without a backward
        return ForwardModeCheck(False, f"the model has no gradient to compare with: {_first_line(error)}")
    length = norm(gradient)
    if length == 0.0:
        if not bool(scores.undecided.any()):
            return _runs_forward_mode(policy, batch, gradient)
        return ForwardModeCheck(False, "the gradient of the entropy is zero on the first responses")
    found = _forward_tangents(policy, batch, {n: g / length for n, g in gradient.items()})
    if isinstance(found, ForwardModeCheck):
        return found
    difference = abs(float((found.entropy + weights * found.logprob).sum()) / length - 1.0)
    limit = HALF_FORWARD_TOLERANCE if policy.half_precision else FORWARD_TOLERANCE
    if not difference <= limit:
        return ForwardModeCheck(
            False, f"forward mode and backward differ by {difference:.2g} relative, at most {limit} expected"
        )
    return ForwardModeCheck(True, f"forward mode agrees with backward to {difference:.1g}")


@dataclass(frozen=True)
class StepCheck:
    """Derivatives per token along a step beside differences of forwards along it.

    Attributes:
        difference: `|T - D(c)| / |D(c)|`, Euclidean over the log-probs and entropies of some responses, at the scale
            `c` of the step where it is smallest. 1 where no difference has finite scores.
        error: the relative error that `D(c)` has by its own measure, `|D(c) - D(c/4)| / |D(c)|`, at most 1; 0 where
            `difference` leaves no question.
        scale: `c` as a power of 4.
        rounding: a difference below this is none.
    """

    difference: float
    error: float
    rounding: float
    scale: int = 0

    @property
    def contradicted(self) -> bool:
        """Whether the differences know better: they lie further off than what they themselves may be wrong by."""
        return self.difference > self.rounding and self.difference > OWN_ERRORS * self.error


def step_check(
    policy: Policy,
    batch: RolloutBatch,
    scores: TokenScores,
    step: Mapping[str, Tensor],
    tangents: TokenTangents,
    start: int = 0,
) -> StepCheck:
    """Compare derivatives along a step with what forwards do along it.

    The size of the difference step is searched for in powers of 4 until the two agree but for rounding, or are within
    5 % (25 % in half precision) and come no nearer: rounding wants a large one, curvature and routers of experts (which
    choose others, a jump that is no part of the derivative) a small one. Mostly that is two to eight scorings of the
    few responses of the largest entropy, where there is something to differentiate.

    Args:
        policy: the policy, at the point of differentiation.
        batch: the batch that was differentiated.
        scores: its scores.
        step: the direction.
        tangents: of `batch`, by another way than differences.
        start: the `scale` of an earlier check of such a step.
    """
    rows = scores.sequence_entropy.argsort(descending=True, stable=True)[:STEP_RESPONSES]
    rows = rows[batch.lengths[rows] > 0]
    expected, quotients = tangents.vector(rows), DifferenceQuotients(policy, batch.subset(rows), step)
    half = policy.half_precision
    tolerance, rounding = (HALF_TOLERANCE, HALF_ROUNDING) if half else (TOLERANCE, ROUNDING)
    difference, best = math.nan, start
    for k in sorted(STEP_SCALES, key=lambda k: (abs(k - start), k)):
        found = quotients.at(k)
        if found is None:
            continue
        size = float(found.norm()) or float(expected.norm())
        off = float((expected - found).norm()) / size if size else 0.0
        if difference <= min(off, tolerance):
            break
        if not difference <= off:
            difference, best = off, k
        if difference <= rounding:
            break
    if math.isnan(difference):
        return StepCheck(1.0, 1.0, rounding, start)
    error = min(quotients.error(best), 1.0) if difference > rounding else 0.0
    return StepCheck(min(difference, 1.0), error, rounding, best)


def agreement_check(
    backward: tuple[float, float], tokens: tuple[Estimate, Estimate], size: tuple[float, float], known: float
) -> StepCheck:
    """Compare deltaH1 by backward with the one of differences per token: the same question as `step_check`'s.

    Args:
        backward: deltaH1 per response and per token.
        tokens: the same from differences of forwards, with errors.
        size: of the parts that each is the sum of, which may nearly cancel: differences know those to `known`.
        known: relative error of the differences.

    Returns:
        The estimand that is further off, relative to deltaH1 or to its standard error, whichever is larger.
    """
    found = []
    for value, estimate, part in zip(backward, tokens, size, strict=True):
        scale = max(abs(estimate.value), estimate.se if math.isfinite(estimate.se) else 0.0) or 1.0
        found.append((min(abs(value - estimate.value) / scale, 1.0), min(known * part / scale, 1.0)))
    difference, error = max(found, key=lambda pair: pair[0] - OWN_ERRORS * pair[1])
    return StepCheck(difference, error, ROUNDING)


def stopped_gradients(checked: StepCheck) -> str:
    """Why forwards are believed and not the derivatives that they contradict."""
    return (
        f"derivatives along the step differ by {100 * checked.difference:.2g} % from what forwards do, and differences "
        f"of forwards are known to {100 * checked.error:.2g} %: a layer takes a part of what it computes as a "
        "constant (as DoRA does with its norm)"
    )


def _runs_forward_mode(policy: Policy, batch: RolloutBatch, zero: Mapping[str, Tensor]) -> ForwardModeCheck:
    """Whether forward mode runs, for a policy without any choice left, whose derivatives are all 0."""
    found = _forward_tangents(policy, batch, zero)
    if isinstance(found, ForwardModeCheck):
        return found
    return ForwardModeCheck(
        True, "forward mode runs; the policy has no choice left, so that derivatives are 0"
    )


def _forward_tangents(
    policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor]
) -> TokenTangents | ForwardModeCheck:
    """Derivatives by forward mode, or why there are none."""
    try:
        return forward_tangents(policy, batch, direction)
    except _MEMORY:
        raise
    except ForwardModeError as error:
        return ForwardModeCheck(False, str(error))
    except RuntimeError as error:
        return ForwardModeCheck(False, f"the model does not run in forward mode: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """Type of an error and the first line of its text, shortened."""
    return f"{(error_text(error).splitlines() or [''])[0]:.200}"


def _own_gradient(policy: Policy, batch: RolloutBatch) -> tuple[TokenScores, Tensor, dict[str, Tensor]]:
    """Scores, the weights `w` of the log-probs, and the gradient of `sum h + w l` by backward."""
    scores = score_tokens(policy, batch)
    weights = still_to_come(scores.entropy)

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return weights[i, t].unsqueeze(0), torch.ones_like(h).unsqueeze(0)

    with whole_gradients(policy.model):
        (gradient,), _ = token_gradients(policy, batch, token_weights, 1)
    return scores, weights, gradient


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
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
        direction[name] = noise * (float(p.detach().double().norm()) or 1.0) / p.numel() ** 0.5
    moved = objective(direction, 0.1)
    if abs(moved - here) > 1e-6 * max(abs(here), 1.0):
        raise DerivativeMismatchError(
            f"expected parameters without a gradient to have no influence, found that moving {names[0]} "
            f"({len(names)} such in all) changes the entropy by {moved - here:.2g}; {REMEDY}"
        )
