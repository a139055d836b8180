"""Predictors of a token's entropy effect: each is one function with a decorator, see `registry`."""

from probe.attribution.predictors import published
from probe.attribution.predictors.registry import PREDICTORS, Predictor, predictor

__all__ = ["PREDICTORS", "Predictor", "predictor", "published"]
