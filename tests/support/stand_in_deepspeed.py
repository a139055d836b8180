"""What the probe uses of DeepSpeed's engine and of its ZeRO-1 and ZeRO-2 optimizers, for machines without DeepSpeed.

The interface is that of `deepspeed.runtime.engine.DeepSpeedEngine` and
`deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer`: weights are views of one flat buffer per group, every
rank steps its part of a float32 copy with the optimizer that it was given, and then all exchange their parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DeepSpeedZeroOptimizer:
    """Steps flat parts; it is no torch optimizer, and one step of it is several of the one inside."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> None:
        self.optimizer, self.clip = optimizer, clip
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.overflow = False
        self.bit16_groups: list[list[nn.Parameter]] = []
        self.flat: list[Tensor] = []
        self.single_partition_of_fp32_groups: list[Tensor] = []
        self.sums: dict[nn.Parameter, Tensor] = {}
        for group in optimizer.param_groups:
            parameters = list(group["params"])
            self.bit16_groups.append(parameters)
            numbers = sum(p.numel() for p in parameters)
            padded = -(-numbers // self.size) * self.size
            flat = torch.zeros(padded, dtype=parameters[0].dtype)
            start = 0
            for p in parameters:
                flat[start : start + p.numel()] = p.data.flatten()
                p.data = flat[start : start + p.numel()].view(p.shape)
                start += p.numel()
            self.flat.append(flat)
            own = self._part(flat).clone().float().requires_grad_()
            self.single_partition_of_fp32_groups.append(own)
            group["params"] = [own]
        for parameters in self.bit16_groups:
            for p in parameters:
                p.register_post_accumulate_grad_hook(self._reduce)

    def _part(self, flat: Tensor) -> Tensor:
        return flat.chunk(self.size)[self.rank]

    def _reduce(self, p: Tensor) -> None:
        """Average a gradient over ranks as soon as it is there, and free it (ZeRO-2)."""
        assert p.grad is not None
        torch.distributed.all_reduce(p.grad)
        self.sums[p] = self.sums.get(p, 0) + p.grad / self.size  # type: ignore[index, arg-type]
        p.grad = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def zero_grad(self) -> None:
        self.sums = {}

    def step(self, closure: Any = None) -> None:
        """One update, of every group in turn."""
        if self.overflow:
            return
        groups = self.optimizer.param_groups
        for k, parameters in enumerate(self.bit16_groups):
            whole = torch.zeros_like(self.flat[k])
            start = 0
            for p in parameters:
                if p in self.sums:
                    whole[start : start + p.numel()] = self.sums[p].flatten()
                start += p.numel()
            own = self.single_partition_of_fp32_groups[k]
            own.grad = self._part(whole).float()
            self.optimizer.param_groups = [groups[k]]
            self.optimizer.step()
            self.optimizer.param_groups = groups
            parts = [torch.empty_like(self._part(self.flat[k])) for _ in range(self.size)]
            torch.distributed.all_gather(parts, own.detach().to(self.flat[k].dtype))
            self.flat[k].data.copy_(torch.cat(parts))
        self.zero_grad()


class DeepSpeedEngine(nn.Module):
    """Wraps a model; backward reduces and `step` updates."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.module = module
        self.optimizer = DeepSpeedZeroOptimizer(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()


DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
