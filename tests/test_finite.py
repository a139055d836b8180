"""Weights and moments that are not finite are found, whatever their type."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from probe.errors.exceptions import NumericalError
from probe.finite import require_finite, require_finite_moments


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_floating_type(dtype, value):
    fine, bad = torch.ones(4).to(dtype), torch.tensor([1.0, value]).to(dtype)
    require_finite([("fine", fine)], "weights", "remedy")
    with pytest.raises(
        NumericalError,
        match=r"finite weights, found NaN or infinity in b \(1 entries and in 1 more\); remedy",
    ):
        require_finite([("a", fine), ("b", bad), ("c", bad)], "weights", "remedy")


def test_quantised_weights_and_counters_are_left_out():
    require_finite([("codes", torch.zeros(3, dtype=torch.uint8)), ("step", torch.tensor(3))], "weights", "")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments(key):
    """An infinite second moment makes a step of exactly 0, which looks like a frozen parameter."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_finite_moments([optimizer], layer.named_parameters())
    optimizer.state[layer.bias][key][0] = math.inf
    with pytest.raises(NumericalError, match=f"moments of the optimizer.*{key} of bias"):
        require_finite_moments([optimizer], layer.named_parameters())
