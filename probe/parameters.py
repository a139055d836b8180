"""Vectors by parameter name: the trainable ones, their norm and inner product; and the model that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from probe.shards import part, total


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an update changes, in the order of `named_parameters` (tied ones once).

    Args:
        model: the policy.

    Returns:
        Name to parameter.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_adapters(model: Any) -> Any:
    """The transformers model itself; adapters that peft has put into its layers stay there.

    Args:
        model: a transformers model, possibly wrapped by peft.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inner_product(gradient: Callable[[str], Tensor], step: Mapping[str, Tensor]) -> float:
    """`sum over parameters of <gradient(name), step[name]>`, one parameter at a time, in float64."""

    def products() -> Iterator[tuple[Tensor, float]]:
        for name, change in step.items():
            of_gradient = part(by_name := gradient(name))
            yield (
                by_name,
                float((of_gradient.double() * part(change).to(of_gradient.device).double()).sum()),
            )

    return total(products())


def inner_products(gradient: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> dict[str, float]:
    """`inner_product` of each parameter on its own, by name."""
    return {name: inner_product(gradient.__getitem__, {name: change}) for name, change in step.items()}


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors, accumulated in float64."""
    return math.sqrt(total((t, float(part(t.detach()).double().square().sum())) for t in tensors.values()))
