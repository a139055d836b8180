"""How much deltaH1 owes to the prompts that U happens to have: its spread over update batches.

With the denominator of Adam held at the value the step used, the step is linear in the gradient of the loss:
`step = momentum + decay + sum over prompts of P * g_p`. So `deltaH1 = constant + sum_p c_p` with

    c_p = sum over the prompt's tokens of  weight[i,t] * dl[i,t] + bonus[i,t] * dh[i,t]

where `dl`, `dh` are derivatives along `u = P * grad H` and the weights those of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from probe.estimators.groups import index_groups, sum_per_group
from probe.scoring.scores import TokenTangents


def prompt_contributions(
    tangents: TokenTangents, weights: Tensor, entropy_weights: Tensor, group: Tensor
) -> Tensor:
    """`c_p` for every prompt of U, `(P,)` float64 nats.

    Args:
        tangents: derivatives of U's scores along `u`.
        weights: `d loss / d l`, `(B, T)`.
        entropy_weights: `d loss / d h`, `(B, T)` (of an entropy bonus).
        group: `(B,)` prompts.
    """
    by_response = (weights * tangents.logprob + entropy_weights * tangents.entropy).sum(1)
    return sum_per_group(by_response, *index_groups(group))


def spread(contributions: Tensor, sizes: Tensor | None = None) -> float | None:
    """Standard deviation of `sum_p c_p` over batches of as many prompts, `sqrt(P / (P - 1) sum (c_p - mean)^2)`.

    The prompts are taken as independent; clipping and Adam's denominator are held.

    Args:
        contributions: `c_p`, `(P,)`.
        sizes: `(P,)`, where the loss divides by a total that is the batch's own (the tokens, for `dapo`): the sum is a
            ratio then, and `mean` becomes `size_p / sum(size) * sum(c)`.

    Returns:
        None for a single prompt.

    >>> spread(torch.tensor([1.0, 3.0], dtype=torch.float64))
    2.0
    """
    P = len(contributions)
    if P < 2:
        return None
    share = torch.full_like(contributions, 1 / P) if sizes is None else sizes / sizes.sum()
    return math.sqrt(P / (P - 1) * float((contributions - share * contributions.sum()).square().sum()))


def preconditioned(gradient_map: Mapping[str, Tensor], X: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`u = P * grad H`, elementwise, by parameter name."""
    return {name: P.to(X[name].device) * X[name].double() for name, P in gradient_map.items()}
