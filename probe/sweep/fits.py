"""Slopes on log-log axes: `|y| = c x^slope`, fitted by weighted least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PowerLaw:
    """A fitted `|y| = factor x^slope`.

    Attributes:
        slope: the exponent.
        slope_se: its standard error; None where the points do not tell (two of them without errors).
        factors: the factor of each group.
        points: how many points were fitted.
        x_min: smallest `x` among them.
        x_max: largest `x` among them.
    """

    slope: float
    slope_se: float | None
    factors: dict[object, float]
    points: int
    x_min: float
    x_max: float

    def at(self, x: ArrayLike, group: object = 0) -> np.ndarray:
        """The fitted curve of a group at `x`."""
        return np.asarray(self.factors[group] * np.asarray(x, dtype=float) ** self.slope)


def fit_power_law(
    x: ArrayLike, y: ArrayLike, y_se: ArrayLike | None = None, group: Sequence[object] | None = None
) -> PowerLaw | None:
    r"""Fit `log |y| = log c_g + slope log x` by least squares, one `c_g` per group and one slope for all.

    With standard errors the weights are `(y / y_se)^2`, the inverse variances of `log |y|`, and

    .. math:: se(slope)^2 = 1 / \sum_i w_i (\log x_i - \overline{\log x}_{g(i)})^2

    which takes the errors as independent: points that share E have errors in common, which move the curve up or down
    but hardly tilt it, and the standard error is then an upper bound. Without them all weights are equal and the
    standard error comes from the scatter around the line.

    Args:
        x: `(n,)`, above 0.
        y: `(n,)`, not 0; of either sign.
        y_se: `(n,)` standard errors of `y`, above 0, or None.
        group: `(n,)` labels of curves that differ by a factor (repetitions with other batches, say).

    Returns:
        The fit, or None with fewer than two different `x` in every group.

    >>> fit = fit_power_law([1, 2, 4], [3, -12, 48], [0.1, 0.1, 0.1])
    >>> round(fit.slope, 12), round(fit.factors[0], 12)
    (2.0, 3.0)
    """
    log_x, log_y = np.log(np.asarray(x, dtype=float)), np.log(np.abs(np.asarray(y, dtype=float)))
    labels = [0] * len(log_x) if group is None else list(group)
    weights = np.ones(len(log_x))
    if y_se is not None:
        weights = (np.asarray(y, dtype=float) / np.asarray(y_se, dtype=float)) ** 2
    dx, dy, means = np.zeros(len(log_x)), np.zeros(len(log_x)), {}
    for label in dict.fromkeys(labels):
        rows = np.array([other == label for other in labels])
        mean_x, mean_y = (np.average(v[rows], weights=weights[rows]) for v in (log_x, log_y))
        dx[rows], dy[rows] = log_x[rows] - mean_x, log_y[rows] - mean_y
        means[label] = (float(mean_x), float(mean_y))
    # of equal x only round-off is left
    if not len(dx) or np.abs(dx).max() < 1e-9:
        return None
    information = float((weights * dx**2).sum())
    slope = float((weights * dx * dy).sum()) / information
    return PowerLaw(
        slope=slope,
        slope_se=_slope_error(information, dy - slope * dx, len(means), weighted=y_se is not None),
        factors={label: float(np.exp(mean_y - slope * mean_x)) for label, (mean_x, mean_y) in means.items()},
        points=len(dx),
        x_min=float(np.min(x)),
        x_max=float(np.max(x)),
    )


def _slope_error(information: float, misfit: np.ndarray, groups: int, weighted: bool) -> float | None:
    """Standard error of the slope: from the points' errors, else from their scatter where there are enough."""
    if weighted:
        return information**-0.5
    freedom = len(misfit) - groups - 1
    return float((misfit @ misfit / freedom / information) ** 0.5) if freedom > 0 else None
