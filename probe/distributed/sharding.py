"""Policies that do not fit one device: every process holds a part of each weight and of its moments (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from probe.errors.exceptions import ConfigError
from probe.parameters import trainable_parameters, without_adapters
from probe.shards import is_sharded, keeps_means, part_like, why_not

NAMES = ("fsdp", "fsdp2")
"""What `trainer.strategy` calls it."""
Setup = Callable[[nn.Module], nn.Module]
"""Shards a model, on its devices (`ModelParallelStrategy.setup_module`)."""


def sharding(processes: int) -> ModelParallelStrategy:
    """Fabric's strategy by which all processes hold a part of every weight.

    Args:
        processes: of the job.
    """
    return ModelParallelStrategy(by_blocks, data_parallel_size=processes, tensor_parallel_size=1)


def by_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model over a mesh in place: its blocks of layers, brought together one at a time, and what remains.

    Args:
        model: a transformers causal LM, possibly wrapped by peft.
        mesh: with a dimension `data_parallel`.
    """
    kinds = set(getattr(without_adapters(model), "_no_split_modules", None) or ())
    own = mesh["data_parallel"]
    for module in model.modules():
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=own)
    fully_shard(model, mesh=own)
    return model


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, setup: Setup) -> nn.Module:
    """Shard a policy and the optimizer over it; every process has both, whole and the same.

    Args:
        model: on a CPU, or on the process's device.
        optimizer: over its trainable parameters; it keeps a part of each moment.
        setup: shards the model.

    Raises:
        ConfigError: the model cannot be sharded, or `setup` does it in another way than `fully_shard` does.
    """
    before = trainable_parameters(model)
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"trainer.strategy: expected weights in floating point where processes hold parts of them, found "
            f"{packed[0]} packed in 4 or 8 bits; take ddp, or checkpoint.device_map on one process"
        )
    try:
        model = setup(model)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f"trainer.strategy: the policy cannot be sharded: {error}") from error
    reason = why_not(model) if is_sharded(model) else "whole weights"
    if reason is not None:
        raise ConfigError(
            f"trainer.strategy: expected a policy that fully_shard is called on, found {reason}"
        )
    if not keeps_means(model):
        raise ConfigError(
            "trainer.strategy: expected fully_shard to average gradients over the processes, found another divide "
            "factor, or no reduction; leave set_gradient_divide_factor and set_requires_gradient_sync as they are"
        )
    _follow(optimizer, before, trainable_parameters(model))
    return model


def _follow(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Let an optimizer go on with other tensors in the place of its parameters, and with their parts of its state."""
    new = {id(before[name]): p for name, p in after.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[id(p)] for p in group["params"]]
    states = {p: optimizer.state.pop(p) for p in before.values() if p in optimizer.state}
    for old, state in states.items():
        p = new[id(old)]
        optimizer.state[p] = {key: _own(value, p) for key, value in state.items()}


def _own(value: Any, p: nn.Parameter) -> Any:
    """This process's part of an entry of an optimizer's state; what is not of the parameter's shape stays whole."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    return part_like(value.to(p.device), p)
