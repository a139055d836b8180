"""Interventions on an update: each is one function with a decorator, see `registry`."""

from probe.attribution.interventions import masks, reweightings, settings
from probe.attribution.interventions.registry import (
    INTERVENTIONS,
    Composed,
    Intervention,
    Plan,
    intervention,
    parse_intervention,
)

__all__ = [
    "INTERVENTIONS",
    "Composed",
    "Intervention",
    "Plan",
    "intervention",
    "masks",
    "parse_intervention",
    "reweightings",
    "settings",
]
