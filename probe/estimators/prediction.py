"""deltaH1 = <grad H, step> = eta * bars_dot: the first-order entropy change of one update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from probe.estimators.entropy_gradient import EntropyGradient


@dataclass(frozen=True)
class Prediction:
    """The prediction, `sequence` estimand in nats per response and `token` estimand (`_tok`) in nats per token.

    Attributes:
        deltaH1: `<X, step>`.
        bars_dot: `<X, Y> = deltaH1 / eta`, per unit of learning rate.
        pathwise: the part of deltaH1 inside the states visited.
        score: the part from which states are visited; `pathwise + score = deltaH1`.
        deltaH1_tok: like `deltaH1`.
        bars_dot_tok: like `bars_dot`.
        pathwise_tok: like `pathwise`.
        score_tok: like `score`.
        learning_rate: `eta`.
    """

    deltaH1: float
    bars_dot: float
    pathwise: float
    score: float
    deltaH1_tok: float
    bars_dot_tok: float
    pathwise_tok: float
    score_tok: float
    learning_rate: float


def first_order(x: EntropyGradient, step: Mapping[str, Tensor], learning_rate: float) -> Prediction:
    """Put X and the step together; inner products are accumulated in float64.

    Args:
        x: the entropy's gradient.
        step: `theta_new - theta_old` by parameter name.
        learning_rate: `eta > 0`.

    Raises:
        ValueError: the names differ, or the learning rate is not positive.
    """
    if set(step) != set(x.pathwise):
        raise ValueError(
            f"expected a step for the parameters of X, found a difference in {set(step) ^ set(x.pathwise)}"
        )
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, found {learning_rate}")
    pathwise = inner_product(x.pathwise.__getitem__, step)
    score = inner_product(x.score.__getitem__, step)
    length = inner_product(x.length.__getitem__, step)
    score_tok = (score - x.H_tok * length) / x.mean_length
    pathwise_tok = pathwise / x.mean_length
    return Prediction(
        deltaH1=pathwise + score,
        bars_dot=(pathwise + score) / learning_rate,
        pathwise=pathwise,
        score=score,
        deltaH1_tok=pathwise_tok + score_tok,
        bars_dot_tok=(pathwise_tok + score_tok) / learning_rate,
        pathwise_tok=pathwise_tok,
        score_tok=score_tok,
        learning_rate=learning_rate,
    )


def inner_product(gradient: Callable[[str], Tensor], step: Mapping[str, Tensor]) -> float:
    """`sum over parameters of <gradient(name), step[name]>`, one parameter at a time, in float64."""
    total = 0.0
    for name, change in step.items():
        part = gradient(name)
        total += float((part.double() * change.to(part.device).double()).sum())
    return total
