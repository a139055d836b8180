"""LoRA layers of peft computed with fewer passes over memory, for passes with grad mode off.

peft adds `s * B(A x)` to the layer's output by a product and a sum of that size, and their derivatives along a
direction take five more. Matrix products can add to what is there: the same numbers but for rounding, a fifth less time
for a forward-mode pass over a small model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import forward_ad

from probe.snapshot import Places


def added_in_place(model: nn.Module) -> Places:
    """The forwards of plain LoRA layers, and what may stand in for them; see `probe.snapshot.replaced`.

    Left as they are: layers in 4 or 8 bits, with hooks, several adapters, a variant of LoRA (DoRA, say), dropout that
    is on, or a bias in B.

    Args:
        model: any.
    """
    return [
        (vars(layer), "forward", functools.partial(_forward, layer, layer.forward))
        for layer in model.modules()
        if type(layer) is Linear and "forward" not in vars(layer) and _is_plain(layer)
    ]


def _is_plain(layer: Linear) -> bool:
    """Whether a layer computes `W x + b + s B A x` and nothing else."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return False
    parts = (layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]])
    dropout = layer.lora_dropout[names[0]]
    return (
        all(type(part) is nn.Linear and not _hooked(part) for part in parts)
        and parts[1].bias is None
        and parts[2].bias is None
        and len({part.weight.dtype for part in parts}) == 1
        and parts[0].weight.dtype in (torch.float32, torch.float64)
        and not _hooked(dropout)
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
    )


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or stands in its way."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _forward(layer: Linear, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output; by its own forward where something is as `added_in_place` has not seen it."""
    if (
        args
        or kwargs
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or layer.disable_adapters
        or layer.merged
        or type(x) is not Tensor
    ):
        return own(x, *args, **kwargs)
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    base: Any = layer.base_layer
    W, b = base.weight, base.bias
    A, B, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if x.dtype != W.dtype or any(type(p) not in (Tensor, nn.Parameter) for p in (W, A, B)):
        return own(x)
    if any(forward_ad.unpack_dual(p).tangent is not None for p in (W, b) if p is not None):
        return own(x)
    (x, dx), (A, dA), (B, dB) = (forward_ad.unpack_dual(t) for t in (x, A, B))
    rows = x.reshape(-1, x.shape[-1])
    low = rows @ A.T
    out = rows @ W.T if b is None else torch.addmm(b, rows, W.T)
    out.addmm_(low, B.T, alpha=scale)
    shape = (*x.shape[:-1], W.shape[0])
    if dx is None and dA is None and dB is None:
        return out.view(shape)
    # d(W x + s B A x) = W dx + s B (A dx + dA x) + s dB A x
    low_tangent = None
    if dx is not None:
        moved = dx.reshape(-1, dx.shape[-1])
        tangent, low_tangent = moved @ W.T, moved @ A.T
    else:
        tangent = torch.zeros_like(out)
    if dA is not None:
        low_tangent = rows @ dA.T if low_tangent is None else low_tangent.addmm_(rows, dA.T)
    if low_tangent is not None:
        tangent.addmm_(low_tangent, B.T, alpha=scale)
    if dB is not None:
        tangent.addmm_(low, dB.T, alpha=scale)
    return forward_ad.make_dual(out.view(shape), tangent.view(shape))
