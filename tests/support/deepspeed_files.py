"""Checkpoints in the files of DeepSpeed's ZeRO, for machines without DeepSpeed: its names, its classes, its layout."""

from __future__ import annotations

import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class fragment_address:  # noqa: N801
    """Where a piece of a parameter lies in a part."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class DynamicLossScaler:
    """An object in every file."""

    def __init__(self) -> None:
        self.cur_scale = 65536.0


class ZeroStageEnum(IntEnum):
    """The stage in every file."""

    gradients = 2
    weights = 3


HOMES = {
    fragment_address: "deepspeed.utils.tensor_fragment",
    DynamicLossScaler: "deepspeed.runtime.fp16.loss_scaler",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
}


@contextmanager
def _as_if_installed() -> Iterator[None]:
    """Pickle needs to find the classes under their names while it writes."""
    made: dict[str, types.ModuleType] = {}
    before = {kind: kind.__module__ for kind in HOMES}
    for kind, home in HOMES.items():
        names = home.split(".")
        for k in range(1, len(names) + 1):
            name = ".".join(names[:k])
            made.setdefault(name, types.ModuleType(name))
        setattr(made[home], kind.__name__, kind)
        kind.__module__ = home
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        for kind, home in before.items():
            kind.__module__ = home


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of each group with their names."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [[(known[id(p)], p) for p in group["params"]] for group in optimizer.param_groups]


def write_zero(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    stage: int = 2,
    ranks: int = 2,
    mappings: bool = True,
    fused: bool = False,
    reverse: bool = False,
) -> Path:
    """Write `global_step5` and `latest` into a folder.

    Args:
        folder: the checkpoint's.
        model: whose trainable parameters the optimizer has.
        optimizer: torch's Adam or AdamW after some steps.
        stage: 2 (the files of stage 1 are alike) or 3.
        ranks: of data parallelism.
        mappings: with `param_slice_mappings`, as newer versions write them.
        fused: DeepSpeed's own Adam, which counts steps in its groups.
        reverse: parameters lie in another order than their names (round robin).
    """
    inside = folder / "global_step5"
    inside.mkdir(parents=True)
    (folder / "latest").write_text("global_step5")
    groups = _names(model, optimizer)
    shapes = [OrderedDict((name, p.shape) for name, p in group) for group in groups]
    for rank in range(ranks):
        content = (_zero_2 if stage == 2 else _zero_3)(
            optimizer, groups, ranks, rank, mappings, fused, reverse
        )
        content |= {"loss_scaler": DynamicLossScaler(), "overflow": False, "ds_version": "0.18.0"}
        with _as_if_installed():
            torch.save(
                {"optimizer_state_dict": content, "ds_config": {"zero_optimization": {"stage": stage}}},
                inside / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
    name = "mp_rank_00" if stage == 2 else "zero_pp_rank_0_mp_rank_00"
    with _as_if_installed():
        torch.save(
            {"module": {"w": torch.zeros(2)}, "param_shapes": shapes, "loss_scaler": DynamicLossScaler()},
            inside / f"{name}_model_states.pt",
        )
    return inside


def write_universal(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, groups: int = 1, third: bool = False
) -> Path:
    """Write `global_step5_universal` as `ds_to_universal.py` does.

    Args:
        folder: the checkpoint's.
        model: whose trainable parameters the optimizer has.
        optimizer: torch's Adam or AdamW after some steps.
        groups: of the optimizer whose settings are written.
        third: as of ZeRO-3, in one line each.
    """
    zero = folder / "global_step5_universal" / "zero"
    for group in _names(model, optimizer):
        for name, p in group:
            own = zero / name
            own.mkdir(parents=True)
            for key, value in optimizer.state[p].items():
                if key == "step":
                    torch.save(value, own / "step.pt")
                else:
                    torch.save(
                        value.flatten() if third else {"param": value, "cat_dim": 0}, own / f"{key}.pt"
                    )
            torch.save({"param": p.detach(), "cat_dim": 0}, own / "fp32.pt")
    settings = [_group(optimizer, number, [number], None, False) for number in range(groups)]
    with _as_if_installed():
        content = {
            "param_groups": settings,
            "loss_scaler": DynamicLossScaler(),
            "zero_stage": ZeroStageEnum.gradients,
        }
        torch.save(content | ({"fp32_flat_groups": []} if third else {}), zero / "optimizer_state.pt")
    return zero.parent


def _group(optimizer: torch.optim.Optimizer, number: int, indices: list[int], step: Any, fused: bool) -> Any:
    own = {k: v for k, v in optimizer.param_groups[number].items() if k != "params"}
    if fused:
        own = {k: own[k] for k in ("lr", "betas", "eps", "weight_decay")} | {
            "bias_correction": True,
            "step": step,
        }
    return {**own, "params": indices}


def _state(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor], step: Any, fused: bool) -> Any:
    return moments if fused else {"step": torch.tensor(float(step)), **moments}


def _zero_2(
    optimizer: torch.optim.Optimizer,
    groups: list[list[tuple[str, nn.Parameter]]],
    ranks: int,
    rank: int,
    mappings: bool,
    fused: bool,
    reverse: bool,
) -> dict[str, Any]:
    states, settings, addresses, masters = {}, [], [], []
    for number, group in enumerate(groups):
        order = group[::-1] if reverse else group
        step = int(optimizer.state[order[0][1]]["step"])
        size = sum(p.numel() for _, p in order)
        length = math.ceil(size / (2 * ranks)) * 2  # aligned for the network
        start = rank * length

        def mine(values: list[Tensor], length: int = length, start: int = start) -> Tensor:
            line = torch.cat([x.flatten() for x in values])
            padded = torch.nn.functional.pad(line, (0, length * ranks - len(line)))
            return padded[start : start + length].clone()

        moments = {
            key: mine([optimizer.state[p][key] for _, p in order]) for key in ("exp_avg", "exp_avg_sq")
        }
        states[number] = _state(optimizer, moments, step, fused)
        settings.append(_group(optimizer, number, [number], step, fused))
        masters.append(mine([p.detach().float() for _, p in order])[: max(0, min(length, size - start))])
        found, at = OrderedDict(), 0
        for name, p in order:
            low, high = max(at, start), min(at + p.numel(), start + length)
            if low < high:
                found[name] = fragment_address(numel=high - low, start=low - start)
            at += p.numel()
        addresses.append(found)
    content = {
        "base_optimizer_state": {"state": states, "param_groups": settings},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": ZeroStageEnum.gradients,
        "partition_count": [ranks] * len(groups),
        "group_paddings": [0] * len(groups),
    }
    return content | ({"param_slice_mappings": addresses} if mappings else {})


def _zero_3(
    optimizer: torch.optim.Optimizer,
    groups: list[list[tuple[str, nn.Parameter]]],
    ranks: int,
    rank: int,
    mappings: bool,
    fused: bool,
    reverse: bool,
) -> dict[str, Any]:
    states, settings, masters, index = {}, [], [], 0

    def cut(x: Tensor) -> Tensor:
        size = math.ceil(x.numel() / ranks)
        return torch.nn.functional.pad(x.flatten(), (0, size * ranks - x.numel()))[
            rank * size : (rank + 1) * size
        ]

    for number, group in enumerate(groups):
        step, indices = int(optimizer.state[group[0][1]]["step"]), []
        for start in range(0, len(group), 3):  # several lines for one group
            some = [p for _, p in group[start : start + 3]]
            moments = {
                key: torch.cat([cut(optimizer.state[p][key]) for p in some])
                for key in ("exp_avg", "exp_avg_sq")
            }
            states[index] = _state(optimizer, moments, step, fused)
            masters.append(torch.cat([cut(p.detach().float()) for p in some]))
            indices.append(index)
            index += 1
        settings.append(_group(optimizer, number, indices, step, fused))
    return {
        "optimizer_state_dict": {"state": states, "param_groups": settings},
        "fp32_flat_groups": masters,
        "zero_stage": ZeroStageEnum.weights,
        "partition_count": ranks,
    }
