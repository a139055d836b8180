"""The step as it is left in the 16-bit weights of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.estimators.adam import groups_by_name
from probe.parameters import norm
from probe.shards import part, total


@dataclass(frozen=True)
class Rounding:
    """A step in the type that the training keeps its weights in.

    Attributes:
        dtype: that type, `bfloat16` or `float16`.
        moved: fraction of the weights in that type that the training's step changes.
        moved_exact: fraction of them that the exact step changes.
        norm: Euclidean norm of the step that is left, all parameters included.
    """

    dtype: str
    moved: float
    moved_exact: float
    norm: float


def rounded_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    new_parameters: Mapping[str, Tensor],
    clip_factor: float = 1.0,
    lr_factor: float = 1.0,
    fused: bool = False,
) -> tuple[dict[str, Tensor], Rounding]:
    """The step as a training takes it whose weights, moments and gradients are in 16 bits.

    Every operation of torch's Adam or AdamW rounds there (of the fused one every result), so that what is small beside
    the weight is lost. The step is taken on copies, one parameter after the other.

    Args:
        optimizer: Adam or AdamW over `parameters`, with moments that are numbers of `dtypes`.
        parameters: by name, with values that are numbers of `dtypes`.
        gradient: before clipping, by name.
        dtypes: the training's type of every parameter that is in 16 bits there.
        new_parameters: what the exact step leaves, on the device where the result is to be.
        clip_factor: what clipping multiplies the gradient by.
        lr_factor: multiplies the learning rate of every group.
        fused: whether the training's optimizer is the fused one.

    Returns:
        The new parameters, in the types and on the devices of `new_parameters`, and what is left of the step.
    """
    groups = groups_by_name(optimizer, parameters)
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
    new = dict(new_parameters)
    numbers, moved, moved_exact = 0, 0, 0
    for name, dtype in dtypes.items():
        p = parameters[name]
        twin = nn.Parameter(p.detach().to(dtype))
        twin.grad = gradient[name].to(device=p.device, dtype=dtype) * clip_factor
        group = {k: v for k, v in groups[name].items() if k not in ("params", "foreach", "fused")}
        how = {"fused": True} if fused else {"foreach": False}
        own = kind([{**group, "params": [twin], "lr": group["lr"] * lr_factor}], **how)
        own.state[twin] = {
            key: value.clone() if key == "step" else value.to(dtype)
            for key, value in optimizer.state.get(p, {}).items()
        }
        own.step()
        exact = new_parameters[name]
        before = p.detach().to(exact.device)
        new[name] = twin.detach().to(exact)
        numbers += p.numel()
        moved += _differ(new[name], before)
        moved_exact += _differ(exact, before)
    change = norm({n: new[n] - p.detach().to(new[n].device) for n, p in parameters.items()})
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    return new, Rounding(", ".join(names), moved / max(numbers, 1), moved_exact / max(numbers, 1), change)


def _differ(one: Tensor, other: Tensor) -> int:
    """In how many entries two tensors differ."""
    return int(total([(one, float((part(one) != part(other)).sum()))]))
