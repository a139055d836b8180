"""4-bit layers whose forward and derivatives are those of the dequantised weight.

bitsandbytes' own forward repacks the weights for good when it runs in evaluation mode on some CPUs, after
which a backward is wrong or raises, and its kernels have no forward-mode rule. Here a layer dequantises its
weight and calls the ordinary linear map, in whichever mode it is; the packed weight is never changed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from probe.errors.exceptions import CheckpointError

DenseWeight = Callable[[torch.dtype], Tensor]


class FrozenLinear(torch.autograd.Function):
    """`x @ W.T + b` for a constant `W` that is rebuilt when it is needed.

    The built-in linear keeps `W` for the backward, which would hold every layer's dense weight at once and
    lose what 4-bit storage gains. Backward, forward mode and their compositions (second derivatives) are
    exact.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, dense_weight: DenseWeight) -> Tensor:
        """The linear map; `x` is `(..., in)`, the result `(..., out)`."""
        return F.linear(x, dense_weight(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, DenseWeight], output: Tensor) -> None:
        """Keep the recipe of the weight, not the weight."""
        _, bias, ctx.dense_weight = inputs
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """`grad @ W` for the input, the sum over all rows for the bias."""
        (grad,) = grad_outputs
        grad_x = grad @ ctx.dense_weight(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, bias_tangent: Tensor | None, _: None) -> Tensor:
        """The tangent of the result; torch hands in zeros for an input without a tangent."""
        return F.linear(x_tangent, ctx.dense_weight(x_tangent.dtype), bias_tangent)


def use_exact_4bit_layers(model: nn.Module) -> int:
    """Give every bitsandbytes `Linear4bit` of `model` an exact forward, in place.

    Weights, names and `state_dict` stay as they are, and the layers still are instances of `Linear4bit`.
    Calling it again changes nothing. Call it before the first forward of the model.

    Args:
        model: any model; one without 4-bit layers (or without bitsandbytes) is left alone.

    Returns:
        The number of 4-bit layers.

    Raises:
        CheckpointError: a layer's weight is not quantised, or a bitsandbytes forward has repacked it already.
    """
    layers = find_4bit_layers(model)
    for name, layer in layers.items():
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            raise CheckpointError(
                f"4-bit layer {name}: expected a quantised weight, found none; move the model to its device"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise CheckpointError(
                f"4-bit layer {name}: expected the weight as it was quantised, found it repacked by a "
                "forward pass of bitsandbytes; load the model again"
            )
        layer_class: Any = type(layer)
        exact = _exact_class(layer_class)
        layer.__class__ = exact
        if "_old_forward" in vars(layer):
            # accelerate's device hooks (`device_map`) call the forward they found when they were attached.
            layer._old_forward = types.MethodType(exact.forward, layer)
    return len(layers)


def find_4bit_layers(model: nn.Module) -> dict[str, Any]:
    """The bitsandbytes `Linear4bit` modules of `model`, by name.

    Args:
        model: any model.

    Returns:
        Name to module; empty where bitsandbytes is not installed.
    """
    # The class is recognised by name, so that bitsandbytes is not imported for a model that does not use it.
    return {name: module for name, module in model.named_modules() if _is_linear_4bit(type(module))}


def dequantized_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight `(out, in)` that a 4-bit layer stands for.

    Args:
        layer: a bitsandbytes `Linear4bit`.
        dtype: type of the result.

    Returns:
        A new tensor without gradient.
    """
    from bitsandbytes.functional import dequantize_4bit

    # `data` leaves out the Parameter subclass, whose tensor functions are overridden.
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


def _is_linear_4bit(module_class: type) -> bool:
    return any(
        base.__name__ == "Linear4bit" and base.__module__.startswith("bitsandbytes.")
        for base in module_class.__mro__
    )


@functools.cache
def _exact_class(base: Any) -> Any:
    """The subclass of `base` (a `Linear4bit`) with the exact forward; `base` where it is one already."""
    if getattr(base, "_probe_exact", False):
        return base

    def forward(self: Any, x: Tensor) -> Tensor:
        compute = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        dense_weight = functools.partial(dequantized_weight, self)
        return FrozenLinear.apply(x.to(compute), bias, dense_weight).to(x.dtype)

    return type(
        "ExactLinear4bit", (base,), {"forward": forward, "_probe_exact": True, "__doc__": forward.__doc__}
    )
