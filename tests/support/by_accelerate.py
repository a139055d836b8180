"""A model sharded as accelerate does it for `fsdp_version: 2`, on CPUs, which accelerate itself has no FSDP for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def sharded_by_accelerate(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Embedding, blocks, and the last norm with the output layer are units of their own; tied weights in one of them.

    Args:
        model: a transformers causal LM, possibly wrapped by peft.
        mesh: with a dimension `data_parallel`.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("data_parallel",)),
        is_main_process=torch.distributed.get_rank() == 0,
        mixed_precision="no",
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)  # type: ignore[no-any-return]
