"""Diagnostics of importance weights: how many samples they are worth, and whether their tail lets means converge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.errors.exceptions import NumericalError
from probe.errors.remedies import Remedy

PARETO_K_LIMIT = 0.7
"""No Pareto k above this is good, whatever the sample size (Vehtari et al. 2024, arXiv:1507.02646)."""
SMALLEST_TAIL_SAMPLE = 25
"""Below this many weights the tail has fewer than the five draws that a fit needs."""


@dataclass(frozen=True)
class WeightDiagnostics:
    """What the weights of `B` sequences say about an estimate made with them.

    Attributes:
        weights: `(B,)` float64, their mean being 1.
        log_weights: `log prod_t r[i,t]`, `(B,)` float64, unshifted.
        ess: effective sample size `(sum w)^2 / sum w^2`, at most `B`.
        w_max: largest weight.
        w_min: smallest weight.
        pareto_k: shape of the generalised Pareto distribution fitted to the largest weights; None where it cannot be
            fitted (fewer than 25 sequences, or largest weights that are all equal).
        pareto_k_limit: `min(1 - 1 / log10(B), 0.7)`.
    """

    weights: Tensor
    log_weights: Tensor
    ess: float
    w_max: float
    w_min: float
    pareto_k: float | None
    pareto_k_limit: float

    @property
    def pareto_k_good(self) -> bool | None:
        """Whether k is below its limit; None where there is no k."""
        return None if self.pareto_k is None else self.pareto_k < self.pareto_k_limit


def weight_diagnostics(log_weights: Tensor) -> WeightDiagnostics:
    """Normalise log-weights and say how good they are.

    Args:
        log_weights: `(B,)` float64.

    Raises:
        NumericalError: a log-weight is not finite.

    Example:
        >>> found = weight_diagnostics(torch.zeros(100, dtype=torch.float64))  # no update: every weight is 1
        >>> found.ess, found.w_max, found.pareto_k  # equal weights have no tail to fit
        (100.0, 1.0, None)
    """
    finite = torch.isfinite(log_weights)
    if not bool(finite.all()):
        raise NumericalError(
            f"expected finite log-weights, found {int((~finite).sum())} that are not; the update is too large for "
            "importance sampling (",
            Remedy.SMALLER_STEP_CAN_BE_MEASURED,
            ")",
        )
    weights = (log_weights - log_weights.max()).exp()
    weights = weights / weights.mean()
    B = len(weights)
    return WeightDiagnostics(
        weights=weights,
        log_weights=log_weights,
        ess=float(weights.sum() ** 2 / (weights**2).sum()),
        w_max=float(weights.max()),
        w_min=float(weights.min()),
        pareto_k=_pareto_k(log_weights),
        pareto_k_limit=pareto_k_limit(B) if B > 1 else -math.inf,
    )


def pareto_k_limit(size: float) -> float:
    """Largest Pareto k at which a mean of `size` weights, at least 2, can be relied on."""
    return min(1 - 1 / math.log10(size), PARETO_K_LIMIT)


def pareto_k_error(k: float, size: float) -> float:
    """Standard error of Pareto k from `size` weights: `(1 + k) / sqrt(M)`.

    `M = min(size / 5, 3 sqrt(size))` is the number of largest weights that k is fitted to, and the error the asymptotic
    one of the generalised Pareto distribution's shape (Smith, Biometrika 74, 1987).

    >>> round(pareto_k_error(1.0, 64), 2), round(pareto_k_error(1.0, 4096), 2)
    (0.56, 0.14)
    """
    return (1 + max(k, 0.0)) / math.sqrt(max(min(size / 5, 3 * math.sqrt(size)), 1.0))


def _pareto_k(log_weights: Tensor) -> float | None:
    """Pareto k by arviz-stats; None for too few weights, or where the largest of them do not differ."""
    from arviz_stats.base import array_stats

    if len(log_weights) < SMALLEST_TAIL_SAMPLE:
        return None
    try:
        # psislw is made for leave-one-out log-likelihoods, the negatives of log-weights
        with np.errstate(all="ignore"):  # tails with ties
            k = float(array_stats.psislw(-log_weights.numpy())[1])
    except ValueError as error:
        if "All tail values are the same" in str(error):
            return None
        raise
    return k if math.isfinite(k) else None
