"""A device with little memory: passes of a model that raise what a device raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB"


def forward_mode(output: Tensor) -> bool:
    """Whether a pass carries tangents, of dual numbers or of `torch.func.jvp`."""
    nested = torch._C._functorch.is_functorch_wrapped_tensor(output)
    return nested or forward_ad.unpack_dual(output).tangent is not None


def backward(output: Tensor) -> bool:
    """Whether a pass keeps a graph."""
    return output.requires_grad


def longer_than(tokens: int) -> Callable[[Tensor], bool]:
    """Whether a pass has more tokens in a sequence."""
    return lambda output: output.shape[1] > tokens


def without_memory_for(layer: nn.Module, *too_much: Callable[[Tensor], bool]) -> Any:
    """Let a layer, whose output is `(B, L, ...)`, run out of memory where all of `too_much` hold; gives the handle."""

    def allocate(module: nn.Module, args: Any, output: Tensor) -> None:
        if all(test(output) for test in too_much):
            raise torch.OutOfMemoryError(MESSAGE)

    return layer.register_forward_hook(allocate)
