"""How large a batch resolves a change, from a small pilot: power averaged over what the pilot leaves open.

A pilot of `n` prompts has found `value` with standard error `se` of `df` degrees of freedom. With flat priors on the
change and on the logarithm of its error, what it has *not* settled is

    w = sqrt(chi2_df / df),    u = se / w  the true standard error at n,    change = value + u Z,    Z ~ N(0, 1)

A later, independent batch of `k n` prompts finds `value'` of standard deviation `u / sqrt(k)` around the change, with
an error of its own, `se' = w' u / sqrt(k)`, `w' = sqrt(chi2_(k df) / (k df))`: degrees of freedom grow with the batch.
It succeeds where `|value'| >= m se'`; `m` is Student's `t` for an interval that excludes 0. Given `w` and `w'`,
`value'` is normal with variance `u^2 (1 + 1 / k)`, so that with `z = value / se`

    P(k) = E[ Phi((sqrt(k) z w - m w') / sqrt(1 + k)) + Phi((-sqrt(k) z w - m w') / sqrt(1 + k)) ]

This predictive probability is the *assurance* (O'Hagan, Stevens & Campbell, Assurance in clinical trial design,
Pharmaceutical Statistics 4, 2005; Spiegelhalter & Freedman, Statistics in Medicine 5, 1986). The smallest `k` with
`P(k) >= power` is recommended. Putting the pilot's value in the place of the change instead would ask for too few:
what stands out in a pilot is overestimated as a rule.

A pilot whose value is below `FAINT` of its standard errors recommends nothing: then almost all would rest on the flat
prior, and a second pilot, large enough for a change of one standard error of the first (`size_for(pilot, 1.0)`), costs
a fraction of what would be bet.

What it is worth without any prior: over repetitions of pilot (and second pilot), recommended size and later batch, the
share that succeeds is 0.76 to 0.83 at a `power` of 0.8, for every change of at least `PROMISED` true standard errors of
the pilot. A smaller one, which needs more than eleven times the pilot, succeeds less often: a pilot cannot tell it from
a yet smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from probe.estimators.student import student_quantile

POWER = 0.8
"""Probability of success that is planned for."""
FAINT = 0.5
"""Standard errors below which a pilot's value recommends nothing."""
PROMISED = 0.85
"""Size of a change, true standard errors of the pilot, from which on the planned power is kept without a prior."""
REACH = 200.0
"""Times the pilot's size beyond which nothing is recommended."""
TAIL = 0.025
"""Probability beyond each end of an interval."""
_NODES = 81
_NEGLIGIBLE = 20.0
"""Of a density: below `exp(-20)` of its peak it is left out."""


@dataclass(frozen=True)
class Pilot:
    """What a small batch has found of a change.

    Attributes:
        value: in nats.
        se: its standard error, above 0.
        df: degrees of freedom of the error, at least 1.
        size: independent draws, prompts of E.
    """

    value: float
    se: float
    df: float
    size: int

    def __post_init__(self) -> None:
        """Refuse what says nothing: searches for a size would end somewhere.

        Raises:
            ValueError: a number is out of its range, or not a number.
        """
        known = math.isfinite(self.value) and math.isfinite(self.se) and self.se > 0.0
        if not (known and self.df >= 1.0 and self.size >= 1):
            raise ValueError(
                f"expected a finite change with an error above 0 and df of at least 1, found {self}"
            )

    @property
    def z(self) -> float:
        """The value in standard errors, without its sign."""
        return abs(self.value) / self.se

    @property
    def resolved(self) -> bool:
        """Whether its own 95 % interval excludes 0."""
        return self.z > student_quantile(self.df)


@dataclass(frozen=True)
class Size:
    """A batch size that is asked for.

    Attributes:
        recommended: with which success has the probability that is planned for; None where the pilot's value is below
            `FAINT`, or the size beyond `REACH`.
        low: the size needed if the change is as large, in units of its error, as the pilot's 95 % leave open.
        high: the size needed if it is as small; None where the pilot's interval contains 0: then no size is enough for
            certain.
    """

    recommended: float | None
    low: float
    high: float | None


def assurance(pilot: Pilot, size: float, multiple: float | None = None) -> float:
    """The predictive probability that a batch of `size` succeeds; see the module.

    Args:
        pilot: what is known.
        size: prompts of the later batch.
        multiple: standard errors that success asks for; None for Student's `t`, so that the interval excludes 0.

    >>> round(assurance(Pilot(2.8, 1.0, 1e6, 64), 64), 2), round(assurance(Pilot(0.0, 1.0, 1e6, 64), 64 * 64), 2)
    (0.72, 0.81)
    """
    w, weights = _chi(pilot.df)
    return _succeeds(size / pilot.size, pilot.z * w, weights, 1.0, pilot.df, multiple)


def needed_size(pilot: Pilot, power: float = POWER, multiple: float | None = None) -> Size:
    """The size with which a later batch succeeds with probability `power`, and the range that the pilot leaves open.

    The ends of the range are the sizes for a change of known size, `P` of the module with `u` and the change given: the
    2.5 and 97.5 % quantiles of `change / u`, which both the uncertain change and its uncertain error enter.

    Args:
        pilot: what is known.
        power: between 0 and 1.
        multiple: see `assurance`.

    >>> wanted = needed_size(Pilot(-4.0, 1.0, 30, 64))
    >>> round(wanted.recommended), round(wanted.low), round(wanted.high)
    (43, 17, 164)
    """
    told = pilot.z >= FAINT
    recommended = _smallest(lambda k: assurance(pilot, k * pilot.size, multiple), power) if told else None
    ends = [_standardised_quantile(pilot, q) for q in (TAIL, 1 - TAIL)]
    contains_zero = ends[0] <= 0.0 <= ends[1]
    large, small = max(map(abs, ends)), min(map(abs, ends))
    low = size_for(pilot, large, power, multiple)
    high = None if contains_zero else size_for(pilot, small, power, multiple)
    return Size(None if recommended is None else recommended * pilot.size, low, high)


def size_for(pilot: Pilot, effect: float, power: float = POWER, multiple: float | None = None) -> float:
    """The size that a change of a known number of standard errors of the pilot needs.

    Args:
        pilot: the unit.
        effect: the change, true standard errors of the pilot; not 0.
        power: see `needed_size`.
        multiple: see `assurance`.
    """
    one, whole = np.array([abs(effect)]), np.ones(1)
    k = _smallest(lambda k: _succeeds(k, one, whole, 0.0, pilot.df, multiple), power, most=math.inf)
    assert k is not None  # without an upper bound there is one
    return k * pilot.size


def resolvable(pilot: Pilot, size: float, power: float = POWER) -> float:
    """The change, in nats, that a batch of `size` resolves with probability `power`: `(t + z_power) se'`.

    >>> round(resolvable(Pilot(0.0, 1.0, 1e6, 64), 256), 2)
    1.4
    """
    k = size / pilot.size
    t = student_quantile(max(pilot.df * k, 1.0))
    return (
        (t + float(torch.special.ndtri(torch.tensor(power, dtype=torch.float64)))) * pilot.se / math.sqrt(k)
    )


def needed_updates(pilot: Pilot, sd: float, batch: int, share: float, power: float = POWER) -> Size | None:
    """Prompts of U for which the spread of a change over update batches is at most `share` of the change.

    The spread falls like `1 / sqrt(B_U)`; at `batch` prompts it is `sd`, known as well as a standard deviation of
    `batch` prompts is. `recommended` suffices with probability `power` over what is not known of change and spread.

    Args:
        pilot: the change.
        sd: its standard deviation over update batches, nats.
        batch: prompts of U, at least 2.
        share: between 0 and 1.
        power: see `needed_size`.

    Returns:
        None where the spread is not known: a batch of one prompt has none, nor has one that is not finite and above 0.
    """
    if batch < 2 or not (math.isfinite(sd) and sd > 0.0):
        return None
    w, weights = _chi(pilot.df)
    v, v_weights = _chi(batch - 1)
    joint = weights[:, None] * v_weights

    def below(x: float) -> float:
        """P(|change| * v <= x), in nats: sd / v is the true spread."""
        limit, width = x / v, pilot.se / w[:, None]
        inside = _phi((limit - pilot.value) / width) - _phi((-limit - pilot.value) / width)
        return float((joint * inside).sum())

    def size(probability: float) -> float:
        return batch * (sd / (share * _root(below, probability, 0.0, 1e3 * (1 + pilot.z) * pilot.se))) ** 2

    recommended = size(1 - power)
    high = size(TAIL) if pilot.resolved else None
    return Size(recommended if recommended <= REACH * batch else None, size(1 - TAIL), high)


def _succeeds(
    k: float, centre: np.ndarray, weights: np.ndarray, spread: float, df: float, multiple: float | None
) -> float:
    """Mean probability of success of a batch `k` times the pilot's.

    Args:
        k: times the pilot.
        centre: `(n,)` possible means of the change, true standard errors of the pilot.
        weights: `(n,)` of these.
        spread: variance of the change around them, in the square of that unit.
        df: degrees of freedom of the pilot's error.
        multiple: see `assurance`.
    """
    freedom = max(df * k, 1.0)
    v, v_weights = _chi(freedom)
    m = student_quantile(freedom) if multiple is None else multiple
    middle, width = math.sqrt(k) * centre[:, None], math.sqrt(1 + k * spread)
    success = _phi((middle - m * v) / width) + _phi((-middle - m * v) / width)
    return float(weights @ success @ v_weights)


def _standardised_quantile(pilot: Pilot, probability: float) -> float:
    """A quantile of `change / u = z w + Z`, the change in true standard errors."""
    w, weights = _chi(pilot.df)
    far = 10.0 + 10.0 * pilot.z
    return _root(lambda x: float(weights @ _phi(x - pilot.z * w)), probability, -far, far)


def _smallest(probability: Callable[[float], float], power: float, most: float = REACH) -> float | None:
    """The smallest `k` up to `most` with `probability(k) >= power`; None where there is none."""
    high = 1.0
    while probability(high) < power:
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high / 2
    while probability(low) >= power and low > 1e-6:
        low, high = low / 2, low
    return math.exp(_root(lambda x: probability(math.exp(x)), power, math.log(low), math.log(high)))


def _root(increasing: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where an increasing function reaches a value, by bisection."""
    for _ in range(36):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) >= value else (middle, high)
    return high


@lru_cache(maxsize=1024)
def _chi(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of `sqrt(chi2_df / df)`, `(n,)`, and their weights.

    The density of `y = log(chi2_df / df)` is `exp(df / 2 (y - exp(y)))` up to a factor; the trapezoidal rule is exact
    to many digits for it, as it vanishes with all derivatives at both ends.
    """
    c = 2 * _NEGLIGIBLE / df
    left, right = math.sqrt(3 * c) if 3 * c <= 1 else 1 + c, min(math.sqrt(2 * c), math.log1p(c) + 2)
    y = np.linspace(-left, right, _NODES)
    weights = np.exp(df / 2 * (y - np.exp(y) + 1))
    return np.exp(y / 2), weights / weights.sum()


def _phi(x: np.ndarray) -> np.ndarray:
    """The normal distribution function."""
    return torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(x))).numpy()
