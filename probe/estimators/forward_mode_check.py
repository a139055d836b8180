"""Whether forward mode can be used with a model, and is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.memory import is_out_of_memory
from probe.estimators.derivative_check import OwnGradient, own_gradient
from probe.parameters import norm
from probe.scoring.forward_mode import ForwardModeError, forward_tangents
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenTangents
from probe.shards import is_sharded
from probe.text import error_text

FORWARD_TOLERANCE, HALF_FORWARD_TOLERANCE = 1e-3, 0.05
"""Largest relative difference of forward mode and backward, and the same where forwards run in half precision."""


@dataclass(frozen=True)
class ForwardModeCheck:
    """Whether forward mode can be believed.

    Attributes:
        usable: it ran, and agreed with backward.
        reason: a sentence.
    """

    usable: bool
    reason: str


def forward_mode_check(
    policy: Policy, batch: RolloutBatch, own: OwnGradient | None = None
) -> ForwardModeCheck:
    """Run forward mode along the gradient of the function of `derivative_check`: it must give the gradient's norm.

    Where backward or forward mode fails with an error of torch's or of the model's, forward mode is not usable, and
    the reason is that error.

    Args:
        policy: the policy.
        batch: a few sequences are enough; the cost is a gradient and a forward-mode pass of them.
        own: `own_gradient` of the two, where it is there already.
    """
    if is_sharded(policy.model):
        return ForwardModeCheck(False, "forward mode does not reach weights that processes hold parts of")
    try:
        own = own_gradient(policy, batch) if own is None else own
    except RuntimeError as error:  # reentrant checkpointing, custom kernels without a backward
        if is_out_of_memory(error):  # says nothing about whether a model can be differentiated
            raise
        return ForwardModeCheck(False, f"the model has no gradient to compare with: {_first_line(error)}")
    scores, weights, gradient = own.scores, own.weights, own.gradient
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
    except ForwardModeError as error:
        return ForwardModeCheck(False, str(error))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return ForwardModeCheck(False, f"the model does not run in forward mode: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """Type of an error and the first line of its text, shortened."""
    return f"{(error_text(error).splitlines() or [''])[0]:.200}"
