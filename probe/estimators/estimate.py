"""An estimate with its error: the influence of every prompt, from which standard errors and paired differences follow.

An estimator is a function of weights `q` on the sequences, all 1 for the batch as it was drawn. Its derivatives by `q`
are its influence function; leaving a prompt out is `q = 0` on that prompt's sequences. So one definition of an
estimator gives its value, its influence function and its jackknife.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.groups import index_groups, sum_per_group
from probe.estimators.student import student_interval

NORMAL_975 = 1.959963984540054
"""0.975 quantile of the standard normal distribution: half the width of a 95 % interval in standard errors."""
JACKKNIFE_PROMPTS = 200
"""Up to this many prompts the jackknife is used: it costs one evaluation per prompt and is the safer one there."""
JACKKNIFE_CHUNK = 16
"""Prompts left out at a time: what bounds the jackknife's memory, at `16 B T` numbers per array."""

ErrorMethod = Literal["jackknife", "influence"]
Estimator = Callable[[Tensor], Tensor]
"""From weights `q`, `(B,)` float64, to `K` values, `(K,)`; invariant to the scale of `q`, differentiable."""


def _nothing() -> Tensor:
    """No contributions."""
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Estimate:
    """A number with its sampling error over `P` independent prompts.

    Attributes:
        value: in nats.
        influence: `(P,)` float64, what each prompt contributes to the error: the variance of `value` is
            `P / (P - 1) sum_p influence_p^2`. Differences of estimates from the same batch subtract them.
        fit: what a fit of control variates adds to the error, nats: the variance of `value` is larger by the sum of
            squares, see `ControlVariates.shrunk`. Differences subtract it too; empty where nothing was fitted.
    """

    value: float
    influence: Tensor
    fit: Tensor = field(default_factory=_nothing)

    @property
    def se(self) -> float:
        """Standard error, nats; infinite for a single prompt."""
        P = len(self.influence)
        if P < 2:
            return math.inf
        return math.sqrt(P / (P - 1) * float(self.influence.square().sum()) + float(self.fit.square().sum()))

    @cached_property
    def df(self) -> float:
        """Degrees of freedom of the standard error, between 1 and `P - 1`; how much is known of the error's size.

        Satterthwaite's, from the kurtosis `kappa` of the influences: `2 / ((kappa - 3) / P + 2 / (P - 1))`, since the
        variance of an estimated variance is `sigma^4 ((kappa - 3) / P + 2 / (P - 1))`. Near `P - 1` where all prompts
        contribute alike; 2 where one of many carries the error, so that the next sample's may be of another size.
        """
        P = len(self.influence)
        centred = self.influence - self.influence.mean()
        second = float(centred.square().mean())
        if P < 2 or second == 0.0:
            return float(max(P - 1, 1))
        kappa = float(centred.pow(4).mean()) / second**2
        inverse = (kappa - 3) / (2 * P) + 1 / (P - 1)
        return min(max(1 / inverse, 1.0), P - 1.0) if inverse > 0 else P - 1.0

    @property
    def ci95(self) -> tuple[float, float]:
        """`value` minus and plus `t` standard errors, with Student's `t` for `df` degrees of freedom."""
        return student_interval(self.value, self.se, self.df)

    def by_response(self, group: Tensor) -> Tensor:
        """The influence of every response, `(B,)`: an equal share of its prompt's; see `from_responses`.

        Args:
            group: `(B,)`, that the estimate was made with.

        Raises:
            ValueError: the estimate has another number of prompts.
        """
        member, size = index_groups(group)
        if len(size) != len(self.influence):
            raise ValueError(
                f"expected an estimate over {len(size)} prompts, found one over {len(self.influence)}"
            )
        return (self.influence / size)[member]

    @classmethod
    def from_responses(
        cls, value: float, shares: Tensor, group: Tensor, fit: Tensor | None = None
    ) -> Estimate:
        """The estimate whose responses have these influences.

        Args:
            value: in nats.
            shares: `(B,)`, see `by_response`.
            group: `(B,)`, equal for responses to one draw of a prompt.
            fit: see `Estimate`.

        >>> found = Estimate(1.0, torch.tensor([0.5, -0.5]))
        >>> group = torch.tensor([3, 3, 8])
        >>> Estimate.from_responses(1.0, found.by_response(group), group).se == found.se
        True
        """
        influence = sum_per_group(shares, *index_groups(group))
        return cls(value, influence) if fit is None else cls(value, influence, fit)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference of two estimates from the same batch."""
        return self + other.scaled(-1.0)

    def __add__(self, other: Estimate) -> Estimate:
        """The sum of two estimates from the same batch."""
        fits = [one.fit for one in (self, other) if len(one.fit)]
        fit = sum(fits[1:], fits[0]) if fits else self.fit
        return Estimate(self.value + other.value, self.influence + other.influence, fit)

    def scaled(self, factor: float) -> Estimate:
        """The estimate times a constant."""
        return Estimate(self.value * factor, self.influence * factor, self.fit * factor)


Estimates = PerEstimand[Estimate]
"""An estimate of the `sequence` estimand (nats per response) and of the `token` estimand (nats per token)."""


def error_method(group: Tensor) -> ErrorMethod:
    """`jackknife` for up to 200 prompts, `influence` above; they differ by `O(1 / P)`."""
    return "jackknife" if len(group.unique()) <= JACKKNIFE_PROMPTS else "influence"


def estimate(estimator: Estimator, group: Tensor, method: ErrorMethod | None = None) -> list[Estimate]:
    """Values and errors of an estimator, with prompts as the independent units.

    - `influence`: `s_p = sum_(i in p) d theta / d q_i` at `q = 1` (the infinitesimal jackknife);
    - `jackknife`: `s_p = (P - 1) / P * (mean theta_(-p) - theta_(-p))` with `theta_(-p)` the value without prompt `p`.

    Either way the variance is `P / (P - 1) sum_p s_p^2`. Efron, The jackknife, the bootstrap and other resampling plans
    (1982), chapters 3 and 6.

    Args:
        estimator: see `Estimator`.
        group: `(B,)` int64, equal for sequences of one draw of a prompt, which are not independent of each other.
        method: by default see `error_method`.

    Returns:
        One estimate per output of the estimator.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> mean = estimate(lambda q: ((q * x).sum() / q.sum()).reshape(1), torch.arange(3), "influence")[0]
        >>> mean.value, round(mean.se, 6), round(float(x.std() / 3**0.5), 6)
        (3.0, 1.527525, 1.527525)
    """
    member, size = index_groups(group)
    P = len(size)
    q = torch.ones(len(group), dtype=torch.float64)
    values = estimator(q)
    if (method or error_method(group)) == "jackknife" and P > 1:
        left_out = (member.unsqueeze(0) != torch.arange(P).unsqueeze(1)).double()
        without = torch.func.vmap(estimator, chunk_size=JACKKNIFE_CHUNK)(left_out)
        influence = (P - 1) / P * (without.mean(0) - without)
    else:
        by_sequence = torch.func.jacrev(estimator)(q)
        influence = sum_per_group(by_sequence.T, member, size)
    return [Estimate(float(v), influence[:, k].contiguous()) for k, v in enumerate(values)]


def shrinkage(estimate: Estimate, control: Estimate) -> float:
    """The share of a zero-mean control to subtract: the lower 95 % end of the regression coefficient, within [0, 1].

    The coefficient is `cov / var` of the influences: near 1 where the control explains the error, near 0 where it has
    nothing to do with it. 1.96 of its standard errors (White's, robust to prompts of unequal noise) are taken off, as a
    share that is not there costs variance: a control whose gain is not resolved is left alone.

    >>> x = Estimate(1.0, torch.tensor([1.0, -1.0]))
    >>> shrinkage(x, Estimate(0.0, torch.tensor([2.0, -2.0]))), shrinkage(x, Estimate(0.0, torch.tensor([0.5, -0.5])))
    (0.5, 1.0)
    >>> shrinkage(Estimate(1.0, torch.tensor([1.0, -2.0, 1.0])), Estimate(0.0, torch.tensor([1.0, 0.0, -1.0])))
    0.0
    """
    z = control.influence
    variance = float(z.square().sum())
    if variance == 0.0:
        return 0.0
    coefficient = float((estimate.influence * z).sum()) / variance
    unexplained = estimate.influence - coefficient * z
    error = float((z * unexplained).norm()) / variance
    return min(max(coefficient - NORMAL_975 * error, 0.0), 1.0)


def mean_by_prompt(x: Tensor, group: Tensor) -> Estimate:
    """The mean of `x`, `(B,)`, with its error over prompts.

    >>> mean_by_prompt(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.arange(2)).value
    2.0
    """
    deviations = (x - x.mean()) / len(x)
    return Estimate(float(x.mean()), sum_per_group(deviations, *index_groups(group)))
