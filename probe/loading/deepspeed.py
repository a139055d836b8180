"""Optimizer states as DeepSpeed's ZeRO writes them, put together without DeepSpeed and without running code in them.

A checkpoint is a folder `global_stepN` with a file of every rank, `*zero_pp_rank_R_mp_rank_00_optim_states.pt`, and the
shapes of the parameters in `*_model_states.pt`. ZeRO-1 and ZeRO-2 lay the parameters of a group out in one line and cut
it into as many parts as there are ranks; `param_slice_mappings` says which piece of which parameter lies where in a
part. ZeRO-3 cuts every parameter into as many parts, of which the last ones are padded.

DeepSpeed's universal format (`ds_to_universal.py`) has a folder of every parameter instead, with whole moments.

The classes in these files (settings, loss scalers, addresses) are read as objects that hold what the file says of them,
by torch's safe loading: whatever their names belong to is not looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import OptimizerStateError
from probe.loading.foreign import check_folder
from probe.loading.rank_parts import check_total, of_another_kind, read_part
from probe.text import shown

PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
LATEST = "latest"
"""Beside the folders: the name of the newest."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SETTINGS = "zero/optimizer_state.pt"
"""In a folder in the universal format."""
MASTERS = (
    "ZeRO steps float32 copies of the weights; the probe steps the checkpoint's own, which are these rounded to the "
    "training's type"
)
REMEDY = "copy all of the folder's files, or save `optimizer.state_dict()` of a training without ZeRO"


def deepspeed_folder(folder: Path) -> Path | None:
    """The folder with the parts of a checkpoint: itself, or the newest one in it; None where there is none.

    Args:
        folder: of one checkpoint (`global_stepN`), or the one around it.
    """
    if _parts(folder) or _is_universal(folder):
        return folder
    latest = folder / LATEST
    inside = sorted(folder.glob("global_step*"))
    if latest.is_file() and latest.stat().st_size < 256:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        inside = [folder / name] if Path(name).name == name and name not in ("", ".", "..") else []
    found = [one for one in inside if _parts(one)] or [one for one in inside if _is_universal(one)]
    return found[0] if len(found) == 1 else None


def read_deepspeed(folder: Path, most: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state of the optimizer by parameter names, whole and on the CPU, and what there is to say of it.

    Args:
        folder: see `deepspeed_folder`.
        most: bytes that it can rightly have.

    Raises:
        OptimizerStateError: a file is missing, damaged or too large, or is of a training with tensor parallelism.
    """
    check_folder(folder)
    if _is_universal(folder):
        return _read_universal(folder, most), (
            f"the state was read from DeepSpeed's universal folder {folder.name}",
            MASTERS,
        )
    files = _parts(folder)
    ranks = sorted(rank for rank, _ in files)
    if any(model for _, model in files):
        raise OptimizerStateError(
            f"{folder}: expected parts of one replica, found those of tensor parallelism (mp_rank_01); {REMEDY}"
        )
    check_total(folder, files.values(), most)
    parts = [_read(files[rank, 0], most).get("optimizer_state_dict") for rank in ranks]
    before = f"{folder}: expected the optimizer states of DeepSpeed's ZeRO, found entries of another kind ("
    with of_another_kind(before, f"); {REMEDY}"):
        whole = _put_together(folder, parts, ranks, _shapes(folder, most))
    return whole, (f"the state was put together from DeepSpeed's files of {len(ranks)} ranks", MASTERS)


def _parts(folder: Path) -> dict[tuple[int, int], Path]:
    """The files of a folder by data-parallel and model-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for file in folder.glob("*_optim_states.pt"):
        if (match := PART.fullmatch(file.name)) is not None:
            place = int(match[1]), int(match[2])
            if place in found:
                raise OptimizerStateError(
                    f"{folder}: expected one file of each rank, found {found[place].name} and {file.name}"
                )
            found[place] = file
    return found


class Inert:
    """An object of a class that is not looked up: it holds what it was made with, and its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Args: whatever the file says."""
        self.made_with = args

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Like any object."""
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        """An entry of a class derived from a mapping."""

    def append(self, value: Any) -> None:
        """An entry of a class derived from a list."""

    def extend(self, values: Any) -> None:
        """Several."""


def _read(file: Path, most: int, mapping: bool = True) -> Any:
    """What torch.save wrote, with objects of other classes as inert ones."""
    content = read_part(file, most, "a file that DeepSpeed wrote", REMEDY, Inert)
    if mapping and not isinstance(content, dict):
        raise OptimizerStateError(f"{file}: expected a mapping, found {type(content).__name__}; {REMEDY}")
    return content


def _shapes(folder: Path, most: int) -> list[dict[str, torch.Size]]:
    """The shapes of the trained parameters by name, group by group."""
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise OptimizerStateError(
            f"{folder}: expected the shapes of the parameters in mp_rank_00_model_states.pt (ZeRO-3: "
            f"zero_pp_rank_0_mp_rank_00_model_states.pt), found no such file; {REMEDY}"
        )
    found = _read(files[0], most).get("param_shapes")
    if not isinstance(found, list) or not all(isinstance(group, dict) for group in found):
        raise OptimizerStateError(f"{files[0]}: expected param_shapes, found {shown(found, 60)}; {REMEDY}")
    return [{str(name): torch.Size(shape) for name, shape in group.items()} for group in found]


def _put_together(
    folder: Path, parts: Sequence[Any], ranks: Sequence[int], shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, Any]:
    """The state_dict of the whole optimizer."""
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError("no optimizer_state_dict")
    first = parts[0]
    counts = first["partition_count"]
    count = max(counts) if isinstance(counts, (list, tuple)) else int(counts)
    if len(ranks) != count or ranks[0] != 0 or ranks[-1] != count - 1:
        raise OptimizerStateError(
            f"{folder}: expected a file of each of {count} ranks, found those of {list(ranks)[:20]}; {REMEDY}"
        )
    if isinstance(first.get("base_optimizer_state"), list):
        raise OptimizerStateError(
            f"{folder}: expected a checkpoint with the optimizer's settings, found an elastic one, which has none; "
            "train with `elastic_checkpoint: false`"
        )
    third = "fp32_flat_groups" in first
    key = "optimizer_state_dict" if third else "base_optimizer_state"
    bases = [part[key] for part in parts]
    settings = _settings(bases[0])
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    lines = list(_of_zero_3(bases, shapes) if third else _of_zero_2(parts, bases, shapes))
    for number, (own, names) in enumerate(lines):
        of_group = settings[min(number, len(settings) - 1)] if not third else settings[own["group"]]
        for name, moments in names.items():
            steps = own["step"] if own["step"] is not None else of_group.get("step")
            state[name] = {"step": torch.tensor(float(steps)), **moments}  # type: ignore[arg-type]
        groups.append({"amsgrad": False, **of_group, "params": list(names)})
        groups[-1].pop("step", None)
    return {"state": state, "param_groups": groups}


def _settings(base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hyper-parameters of each group."""
    if any(group.get("bias_correction") is False for group in base["param_groups"]):
        raise ValueError("Adam without bias correction")
    return [{k: v for k, v in group.items() if k != "params"} for group in base["param_groups"]]


Line = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""What holds for a group (`step`, and the number of its settings), and its parameters' moments by name."""


def _of_zero_2(
    parts: Sequence[Mapping[str, Any]], bases: Sequence[Any], shapes: Sequence[Mapping[str, torch.Size]]
) -> Iterator[Line]:
    """The groups of ZeRO-1 and ZeRO-2."""
    for number, of_group in enumerate(shapes):
        own = [_flat_state(base, number) for base in bases]
        mapped: list[Any] = [part.get("param_slice_mappings") for part in parts]
        if all(isinstance(one, list) for one in mapped):
            places = [[(n, int(a.start), int(a.numel)) for n, a in one[number].items()] for one in mapped]
        else:
            places = _in_a_row(of_group, [len(state["exp_avg"]) for state in own])
        names: dict[str, dict[str, Tensor]] = {name: {} for name in of_group}
        for key in MOMENTS:
            pieces: dict[str, list[Tensor]] = {name: [] for name in of_group}
            for state, at in zip(own, places, strict=True):
                for name, start, size in at:
                    pieces[name].append(_piece(state[key], start, size))
            for name, shape in of_group.items():
                names[name][key] = _joined(pieces[name], shape.numel()).reshape(shape)
        yield {"step": own[0].get("step")}, names


def _in_a_row(shapes: Mapping[str, torch.Size], lengths: Sequence[int]) -> list[list[tuple[str, int, int]]]:
    """Where the pieces of parameters that follow each other lie in parts of some lengths: `(name, start, size)`."""
    places: list[list[tuple[str, int, int]]] = [[] for _ in lengths]
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    at = 0
    for name, shape in shapes.items():
        end = at + shape.numel()
        for k, last in enumerate(ends):
            begin = last - lengths[k]
            low, high = max(at, begin), min(end, last)
            if low < high or (low == high == at == end):
                places[k].append((name, low - begin, high - low))
        at = end
    if at > ends[-1]:
        raise ValueError(f"{at} numbers in parts of {ends[-1]}")
    return places


def _of_zero_3(
    bases: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, torch.Size]]
) -> Iterator[Line]:
    """The groups of ZeRO-3, of which each has one or several lines."""
    of_groups = [list(group["params"]) for group in bases[0]["param_groups"]]
    owner = {index: number for number, indices in enumerate(of_groups) for index in indices}
    order = sorted(owner)
    lines = [[base["state"][index] for index in order] for base in bases]
    named = [(name, shape) for group in shapes for name, shape in group.items()]
    found: dict[str, dict[str, Tensor]] = {name: {} for name, _ in named}
    numbers: dict[str, int] = {}
    ends = [sum(len(line["exp_avg"]) for line in lines[0][: k + 1]) for k in range(len(order))]
    for key in MOMENTS:
        whole = [_joined([line[key] for line in of_rank], ends[-1]) for of_rank in lines]
        at = 0
        for name, shape in named:
            size = math.ceil(shape.numel() / len(bases))
            pieces = [_piece(one, at, size) for one in whole]
            found[name][key] = _joined(pieces, size * len(bases))[: shape.numel()].reshape(shape)
            numbers[name] = owner[order[next(k for k, end in enumerate(ends) if at < end or size == 0)]]
            at += size
    for number in range(len(of_groups)):
        mine = {name: moments for name, moments in found.items() if numbers[name] == number}
        if mine:
            yield {"step": lines[0][0].get("step"), "group": number}, mine


def _flat_state(base: Any, number: int) -> Mapping[str, Any]:
    """The state of a group's part."""
    (index,) = base["param_groups"][number]["params"]
    state: Mapping[str, Any] = base["state"][index]
    return state


def _joined(pieces: Sequence[Tensor], size: int) -> Tensor:
    """Pieces of lines, which have to make up so many numbers that are really there."""
    if sum(len(one) for one in pieces) != size or not all(one.is_contiguous() for one in pieces):
        raise ValueError(f"pieces that do not make up {size} numbers")
    return torch.cat(list(pieces))


def _piece(line: Tensor, start: int, size: int) -> Tensor:
    """A piece of a line of numbers, which has to lie in it."""
    if not isinstance(line, Tensor) or line.dim() != 1 or start < 0 or size < 0 or start + size > len(line):
        raise ValueError(f"a piece of {size} numbers from {start} on that does not lie in its line")
    return line[start : start + size]


def _is_universal(folder: Path) -> bool:
    """Whether a folder is in DeepSpeed's universal format."""
    return (folder / SETTINGS).is_file()


def _read_universal(folder: Path, most: int) -> dict[str, Any]:
    """The state_dict of a folder in the universal format, whose settings name no parameters."""
    files = {key: sorted(folder.glob(f"zero/*/{key}.pt")) for key in (*MOMENTS, "step")}
    check_total(folder, [file for some in files.values() for file in some], most)
    before = f"{folder}: expected DeepSpeed's universal format, found entries of another kind ("
    with of_another_kind(before, f"); {REMEDY}"):
        saved = _read(folder / SETTINGS, most)
        settings = _settings(saved)
        said = [{k: group.get(k) for k in ("lr", "betas", "eps", "weight_decay")} for group in settings]
        unclear = f"{len(said)} groups with different settings, and not which parameters are in them"
        if "fp32_flat_groups" in saved or any(one != said[0] for one in said):
            found = "moments of ZeRO-3 without their shapes" if "fp32_flat_groups" in saved else unclear
            raise OptimizerStateError(
                f"{folder}: expected moments by parameter, found {found}; name the folder that it was converted from"
            )
        state: dict[str, dict[str, Any]] = {file.parent.name: {} for file in files["exp_avg"]}
        for key, some in files.items():
            for file in some:
                state[file.parent.name][key] = _universal_tensor(file, most)
        for moments in state.values():
            steps = moments["step"] if "step" in moments else settings[0]["step"]
            moments["step"] = torch.tensor(float(steps))
    group = {"amsgrad": False, **settings[0], "params": list(state)}
    group.pop("step", None)
    return {"state": state, "param_groups": [group]}


def _universal_tensor(file: Path, most: int) -> Tensor:
    """The tensor in a file, alone or under `param`."""
    found = _read(file, most, mapping=False)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, (Tensor, int, float)):
        raise TypeError(f"{type(tensor).__name__} in {file.name}")
    return torch.as_tensor(tensor)
