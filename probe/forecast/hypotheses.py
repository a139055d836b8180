"""How the entropy of a training may go on: the hypotheses that a forecast weighs against each other.

Each is one choice of

- the coordinate `g(H) = (H^p - 1) / p` (`log H` for `p = 0`) in which the drift is steady: exponential decay is steady
  in `log H`, a straight line in `H`;
- persistence `rho`: the drift of the next step is `rho` times that of this one. 1 goes on for ever; below 1 it dies
  away, and entropy flattens at `g + drift / (1 - rho)`: the floor of `H = floor + (H_0 - floor) rho^k` in `H` itself;
- wander `kappa`: how much the drift changes at random from step to step, in units of its usual size. It lets a fall
  speed up, slow down and turn;
- noise `nu`: the scatter of single steps about the drift, in the same units.

That what came before some reading was of another kind is a matter of `probe.forecast.trend.SPLITS`.

Persistence below 1 is the damped trend of Gardner and McKenzie (Management Science 31, 1985).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

POWERS = {0.0: 0.5, 1.0: 0.5}
PERSISTENCES = {1.0: 0.4, 0.98: 0.2, 0.94: 0.2, 0.85: 0.2}
WANDERS = {0.0: 0.4, 0.03: 0.3, 0.1: 0.2, 0.3: 0.1}
NOISES = {0.01: 0.2, 0.1: 0.2, 0.3: 0.2, 0.7: 0.2, 1.5: 0.2}
"""The values considered, with their probabilities before any reading."""


@dataclass(frozen=True)
class Hypotheses:
    """All combinations, `(G,)` each.

    Attributes:
        power: `p` of the coordinate.
        persistence: `rho`, per optimizer step.
        wander: `kappa`.
        noise: `nu`.
        log_prior: logarithm of the probability before any reading.
    """

    power: Array
    persistence: Array
    wander: Array
    noise: Array
    log_prior: Array

    def joined(self, others: Hypotheses) -> Hypotheses:
        """These, and then those."""
        names = (one.name for one in fields(self))
        return Hypotheses(*(np.concatenate([getattr(self, name), getattr(others, name)]) for name in names))

    def transform(self, H: Array) -> Array:
        """`g(H)`; `H` above 0 is `(..., 1)` or `(..., G)`, in units of the first level."""
        return coordinate(H, self.power)

    def slope(self, H: Array) -> Array:
        """`dg / dH`."""
        return np.asarray(H ** (self.power - 1))

    def inverse(self, g: Array, least: Array | float) -> Array:
        """`H` at which `transform` gives `g`; at least `least`, since a straight line goes on below 0."""
        p = np.where(self.power == 0, 1.0, self.power)
        power = np.maximum(1 + p * g, 0.0) ** (1 / p)
        return np.maximum(np.where(self.power == 0, np.exp(np.minimum(g, 300.0)), power), least)


def coordinate(H: Array, power: Array | float) -> Array:
    """`(H^power - 1) / power`, the logarithm for a power of 0."""
    p = np.where(np.equal(power, 0), 1.0, power)
    return np.where(np.equal(power, 0), np.log(H), (H**p - 1) / p)


def hypotheses(shape: float | None = None) -> Hypotheses:
    """All of them, or those of one coordinate.

    Args:
        shape: the power `p`; None considers exponential decay and a straight line.

    >>> len(hypotheses().power), len(hypotheses(shape=0.0).power)
    (160, 80)
    """
    powers = POWERS if shape is None else {shape: 1.0}
    rows = [
        (p, rho, kappa, nu, np.log(a * b * c * d))
        for (p, a), (rho, b), (kappa, c), (nu, d) in itertools.product(
            powers.items(), PERSISTENCES.items(), WANDERS.items(), NOISES.items()
        )
    ]
    return Hypotheses(*np.array(rows).T)
