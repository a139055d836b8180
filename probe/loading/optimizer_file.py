"""The file with an optimizer's state: read, checked and recognised."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probe.errors.exceptions import OptimizerStateError
from probe.limits import OPTIMIZER_BYTES, OPTIMIZER_BYTES_PER_PARAMETER
from probe.loading.checkpoint import TRAINER_STATE, CheckpointFiles
from probe.loading.deepspeed import deepspeed_folder, read_deepspeed
from probe.loading.foreign import check_torch_file
from probe.loading.moments import SavedKey
from probe.loading.rank_files import has_rank_files, read_rank_files
from probe.loading.sharded import read_sharded
from probe.text import shown

_SUPPORTED = "torch's Adam and AdamW, and bitsandbytes' 8-bit and 32-bit Adam and AdamW"
_ADAM_BETAS = 2
_ADAM_STATE = {"exp_avg", "exp_avg_sq", "step"}
_WRAPPERS = ("optimizer", "optimizer_state_dict", "optim_state_dict")


def optimizer_files(files_or_path: CheckpointFiles | str | Path) -> tuple[Path, Path | None]:
    """The optimizer's file, and trainer_state.json where there is one."""
    if isinstance(files_or_path, CheckpointFiles):
        return files_or_path.optimizer_file, files_or_path.trainer_state_file
    file = Path(files_or_path)
    beside = file.parent / TRAINER_STATE
    return file, beside if beside.is_file() else None


def largest_file(model: nn.Module) -> int:
    """Most bytes that a file with the optimizer of `model` can rightly have; the model's weights may be in it too."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return OPTIMIZER_BYTES + OPTIMIZER_BYTES_PER_PARAMETER * count


def read_state_dict(file: Path, most: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The `state_dict` in `file`, or in the folder of a sharded checkpoint, read without running any code in it."""
    payload, notes = _read_folder(file, most) if file.is_dir() else (_read_torch_file(file, most), ())
    for key in _WRAPPERS:
        if isinstance(payload, dict) and "param_groups" not in payload and isinstance(payload.get(key), dict):
            payload, notes = payload[key], (f"the state was read from the entry {key!r} of {file.name}",)
    if not isinstance(payload, dict) or not {"state", "param_groups"} <= payload.keys():
        kind = type(payload).__name__
        found = f"the keys {sorted(map(str, payload))[:10]}" if isinstance(payload, dict) else kind
        raise OptimizerStateError(
            f"{file}: expected an optimizer's state_dict (state, param_groups), found {found}"
        )
    return payload, notes


def _read_folder(folder: Path, most: int) -> tuple[Any, tuple[str, ...]]:
    """What ranks have saved in parts, and what there is to say of it."""
    if (parts := deepspeed_folder(folder)) is not None:
        return read_deepspeed(parts, most)
    if has_rank_files(folder):
        return read_rank_files(folder, most)
    return read_sharded(folder, most), ()


def _read_torch_file(file: Path, most: int) -> Any:
    """What torch.save wrote."""
    if file.exists():
        check_torch_file(file, most)
    try:
        with warnings.catch_warnings():
            # torch warns of unusual pickle protocols; what matters is whether the content can be read.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OptimizerStateError(f"{file}: expected the optimizer's state, found no such file") from error
    except pickle.UnpicklingError as error:
        # torch's message is a page of advice; what it stumbled over stands after these words.
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        raise OptimizerStateError(
            f"{file}: expected only tensors and plain values, found a pickle that needs more, which could "
            f"run code ({reason[:120]}); load it where you trust it and save `optimizer.state_dict()` again "
            "with torch.save"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise OptimizerStateError(
            f"{file}: expected a file that torch.save wrote, found {reason or 'nothing'}"
        ) from error


def well_formed(
    file: Path, payload: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[SavedKey, dict[str, Any]]]:
    """The groups with parameters and the states with content, in the containers that an optimizer writes."""
    saved, states = payload["param_groups"], payload["state"]
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        raise _malformed(file, "a list of mappings in param_groups", saved)
    if not isinstance(states, dict) or not all(isinstance(state, Mapping) for state in states.values()):
        raise _malformed(file, "a mapping of mappings in state", states)
    groups = []
    for index, group in enumerate(saved):
        keys = group.get("params")
        if not isinstance(keys, list) or not all(type(key) in (int, str) for key in keys):
            raise _malformed(file, f"a list of positions or names in params of group {index}", keys)
        names = group.get("param_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise _malformed(file, f"a list of names in param_names of group {index}", names)
        if keys:
            groups.append(group)
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise _malformed(
            file, "every parameter in one group", f"{len(keys) - len(set(keys))} in more than one"
        )
    filled = {key: dict(state) for key, state in states.items() if state}
    if not filled:
        raise OptimizerStateError(
            f"{file}: expected the moments of an optimizer that has taken steps, found an empty state; take "
            "a later checkpoint"
        )
    return groups, filled


def plain_numbers(file: Path, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a group that are numbers, as such: a learning rate may be saved as a tensor."""
    plain: dict[str, Any] = {}
    for name in ("lr", "eps", "weight_decay", "initial_lr"):
        if name in group:
            plain[name] = _number(file, f"{name} of group {index}", group[name])
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (list, tuple)):
            raise _malformed(file, f"numbers in betas of group {index}", betas)
        plain["betas"] = tuple(_number(file, f"betas of group {index}", beta) for beta in betas)
    for name in ("amsgrad", "maximize", "decoupled_weight_decay"):
        if name in group and not isinstance(group[name], (bool, type(None))):
            raise _malformed(file, f"true or false in {name} of group {index}", group[name])
    return plain


def _number(file: Path, what: str, value: Any) -> float:
    """A number, which may be saved as a tensor of one value."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _malformed(file, f"a number in {what}", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _malformed(file: Path, expected: str, found: Any) -> OptimizerStateError:
    what = f"{type(found).__name__} {shown(found, 40)}" if not isinstance(found, Tensor) else "a tensor"
    return OptimizerStateError(
        f"{file}: expected {expected}, found {' '.join(what.split())}; save `optimizer.state_dict()` again"
    )


def optimizer_family(
    file: Path, groups: list[dict[str, Any]], states: Mapping[SavedKey, dict[str, Any]]
) -> Literal["torch", "bitsandbytes"]:
    """Which library's Adam wrote the state; anything that is no Adam is refused."""
    keys = set().union(*(_flat_keys(state) for state in states.values()))
    options = {key for group in groups for key in group}
    found = f"state keys {_listed(keys)}, group keys {_listed(options - {'params', 'param_names'})}"
    refusal = f"{file}: expected the state of {_SUPPORTED}, found {{}} ({found})"
    if {"lr", "betas", "eps", "weight_decay"} - options:
        raise OptimizerStateError(refusal.format("another optimizer"))
    if "state1" in keys:
        _refuse_foreign_bitsandbytes(refusal, keys, groups)
        return "bitsandbytes"
    if not keys >= _ADAM_STATE or keys - _ADAM_STATE - {"max_exp_avg_sq"}:
        raise OptimizerStateError(refusal.format("another optimizer"))
    # RAdam, and other relatives, have the same moments but not Adam's `amsgrad` option.
    if "amsgrad" not in options or "momentum_decay" in options:
        raise OptimizerStateError(refusal.format("a relative of Adam with another step"))
    return "torch"


def _refuse_foreign_bitsandbytes(refusal: str, keys: set[str], groups: list[dict[str, Any]]) -> None:
    if "state2" not in keys:
        raise OptimizerStateError(refusal.format("a one-moment bitsandbytes optimizer such as Lion or SGD"))
    if "unorm_vec" in keys:
        raise OptimizerStateError(refusal.format("bitsandbytes' LAMB or an update-norm limit"))
    if "gnorm_vec" in keys:
        raise OptimizerStateError(refusal.format("bitsandbytes' percentile clipping"))
    if keys & {"max1", "max2", "new_max1", "new_max2"}:
        raise OptimizerStateError(refusal.format("bitsandbytes' older 8-bit states, which are not blockwise"))
    if any(
        (isinstance(group["betas"], (list, tuple)) and len(group["betas"]) > _ADAM_BETAS)
        or group.get("alpha")
        for group in groups
    ):
        raise OptimizerStateError(refusal.format("bitsandbytes' AdEMAMix"))


def _listed(keys: set[Any]) -> str:
    names = sorted(shown(key, 40) for key in keys)
    return f"[{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}]"


def _flat_keys(state: Mapping[str, Any]) -> set[str]:
    """The keys of one parameter's state, those in a nested mapping (bitsandbytes) included."""
    nested = [_flat_keys(value) if isinstance(value, Mapping) else {key} for key, value in state.items()]
    return set().union(*nested)


def check_optimizer_settings(file: Path, groups: list[dict[str, Any]]) -> None:
    """Refuse impossible hyper-parameters; torch checks only an optimizer's defaults, not its groups."""
    for index, group in enumerate(groups):
        betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
        fine = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        if not (fine and 0 <= eps < math.inf and 0 <= decay < math.inf):
            raise OptimizerStateError(
                f"{file}: expected two betas in [0, 1), and eps and weight_decay of at least 0, found "
                f"{betas}, {eps} and {decay} in group {index}"
            )
