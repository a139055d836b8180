"""Tensors of which each process holds a part: DTensors, as torch's `fully_shard` (FSDP2) makes a model's parameters.

Arithmetic entry by entry is that of the parts. A sum over all entries needs the other processes, and torch gives this
process's own in silence where such a sum becomes a Python number. So the probe never takes one of a DTensor itself:
`total` does, and everything that is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

MEETING: ContextVar[Callable[[str], None] | None] = ContextVar("MEETING", default=None)
"""How the processes of a block that all of them run make sure that none has failed (`Ranks.together`). Before they
exchange parts they meet: the exchange itself would wait for one that does not come."""


def meet(what: str) -> None:
    """Raise what another process has raised, in a block that all of them run.

    Args:
        what: the meeting is about; the same on all.
    """
    if (meeting := MEETING.get()) is not None:
        meeting(what)


def is_shard(x: Any) -> bool:
    """Whether something is a tensor of which this process holds a part."""
    return isinstance(x, DTensor)


def part(x: Tensor) -> Tensor:
    """What this process holds of a tensor, the very memory; of one that is whole, all of it.

    >>> bool((part(torch.ones(2)) == torch.ones(2)).all())
    True
    """
    return x.detach().to_local() if isinstance(x, DTensor) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, detached. Of a shard, every process that holds one of it must ask for it at the same time."""
    if not isinstance(x, DTensor):
        return x.detach()
    meet("all parts")
    # a part that is kept elsewhere (`snapshot_device`) goes back to where processes exchange
    return x.detach().to(x.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined, no-any-return]


def part_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, cut as another one of its shape is."""
    if not isinstance(like, DTensor):
        return x
    cut = distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return cut.to(part(like).device)


def from_part(own: Tensor, like: Tensor) -> Tensor:
    """What a process has found for its part of a tensor, as a tensor that is held in parts as that one is.

    Args:
        own: of the shape of `part(like)`.
        like: whole, or a shard.
    """
    if not isinstance(like, DTensor):
        return own
    made = DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made.to(own.device)


def total(amounts: Iterable[tuple[Tensor, float]]) -> float:
    """The sum of amounts, each of which adds up over the entries of a tensor; in float64.

    Args:
        amounts: `(tensor, amount of its part)`. Where there are shards all processes call it at the same time, with the
            same tensors in the same order.

    >>> total([(torch.ones(2), 2.0), (torch.ones(3), 3.0)])
    5.0
    """
    here, apart = 0.0, dict[Any, float]()
    for x, amount in amounts:
        if isinstance(x, DTensor):
            key = (x.device_mesh, x.placements)
            apart[key] = apart.get(key, 0.0) + amount
        else:
            here += amount
    if apart:
        meet("a sum over parts")
    for (mesh, placements), amount in apart.items():
        found = torch.tensor(amount, dtype=torch.float64, device=mesh.device_type)
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(found, group=mesh.get_group(dim))
        here += float(found)
    return here


def nonzero(*tensors: Tensor) -> bool:
    """Whether an entry of some tensors is not 0; on any process, where each holds a part."""
    return total((x, float(bool(part(x).any()))) for x in tensors) > 0


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor has an entry that is NaN or infinite, on any process; None where there is none."""
    flags = {name: float(not bool(torch.isfinite(part(x)).all())) for name, x in tensors.items()}
    if total((x, flags[name]) for name, x in tensors.items()) == 0:
        return None
    return next(name for name, x in tensors.items() if total([(x, flags[name])]) > 0)


def fully_sharded(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model that `fully_shard` was called on; the first is the root."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold a part each of a model's weights."""
    return next((True for module in model.modules() if isinstance(module, FSDPModule)), False)


def resharded(model: nn.Module) -> None:
    """Let each process hold its own part alone: what others have sent it, a forward will ask for again."""
    for module in fully_sharded(model):
        module.reshard()


def forward_type(module: nn.Module) -> torch.dtype | None:
    """The type that a sharded module's forwards cast weights to (`MixedPrecisionPolicy.param_dtype`); None for none."""
    if not isinstance(module, FSDPModule):
        return None
    dtype: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
    return dtype


def forward_types(model: nn.Module) -> set[torch.dtype]:
    """The types that a model's forwards have weights in, those that they are kept in included."""
    cast = {forward_type(module) for module in model.modules()}
    return {p.dtype for p in model.parameters()} | {dtype for dtype in cast if dtype is not None}


def keeps_means(model: nn.Module) -> bool:
    """Whether a backward leaves the mean of the processes' gradients in a sharded model's parameters, as by default."""
    groups = [group for module in fully_sharded(model) for group in _groups(module)]
    return all(getattr(g, "gradient_divide_factor", None) is None and g.reduce_grads for g in groups)


def _groups(module: FSDPModule) -> list[Any]:
    """What is brought together with a module; newer torch may have several of them."""
    state: Any = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:
        several = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(several)


def reset(model: nn.Module) -> None:
    """After a forward that has failed half way: as `reset_iter_state` of newer torch, and `resharded`."""
    modules = fully_sharded(model)
    if hasattr(modules[0], "reset_iter_state"):
        modules[0].reset_iter_state()
        return
    for module in modules:
        state: Any = module._get_fsdp_state()
        state._state_ctx.iter_forward_root = None
        state._comm_ctx.all_gather_state = None
        state._training_state = type(state._training_state).IDLE
        for group in _groups(module):
            group._all_gather_result = None
            group._training_state = type(group._training_state).IDLE
            group._to_sharded()


def why_not(model: nn.Module) -> str | None:
    """Why a model's shards are not of the kind that the probe can work with; None where they are, or there are none."""
    for name, p in model.named_parameters():
        if not isinstance(p, DTensor):
            continue
        kinds = {type(placement) for placement in p.placements}
        if not is_sharded(model) or not kinds <= {Shard, Replicate}:
            return (
                f"a DTensor in {name} that fully_shard alone has not made (placements {p.placements}): tensor "
                "parallelism is not supported"
            )
        if not isinstance(model, FSDPModule):
            return (
                f"a part of {name} in each process, and that fully_shard was called on other modules than the policy "
                "itself; call it on the policy too, last"
            )
        if part(p).device.type != p.device_mesh.device_type:
            return f"{name} on the CPU (CPUOffloadPolicy), which is not supported"
        if p.device_mesh.size() != torch.distributed.get_world_size():
            return f"{name} shared out to {p.device_mesh.size()} of {torch.distributed.get_world_size()} processes"
    return None
