"""The two estimands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimand:
    """One of the two entropies whose change is estimated.

    Attributes:
        name: `token` or `sequence`.
        suffix: ending of its columns.
        unit: its unit.
    """

    name: str
    suffix: str
    unit: str


ESTIMANDS = (Estimand("token", "_tok", "nats per token"), Estimand("sequence", "", "nats per response"))
