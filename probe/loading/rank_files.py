"""Optimizer states in one file of every rank, `optim_world_size_N_rank_R.pt`, as verl writes them under FSDP2.

The moments in them are DTensors: each file has this rank's part, and says of which tensor and where it was cut. Torch's
safe loading knows them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from probe.errors.exceptions import OptimizerStateError
from probe.imports import errors_only
from probe.loading.foreign import check_folder
from probe.loading.rank_parts import check_total, of_another_kind, read_part

FILE = re.compile(r"optim_world_size_(\d+)_rank_(\d+)\.pt")
REMEDY = "copy the files of all ranks, or train with FSDP2, whose states have the shapes of the parameters"


def has_rank_files(folder: Path) -> bool:
    """Whether a folder has such files.

    Args:
        folder: any.
    """
    return bool(_files(folder))


def read_rank_files(folder: Path, most: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The optimizer's `state_dict`, whole and on the CPU, and what there is to say of it.

    Args:
        folder: with a file of each rank.
        most: bytes that they can rightly have together.

    Raises:
        OptimizerStateError: a file is missing, damaged or too large, or its tensors are not cut as FSDP2 cuts them.
    """
    check_folder(folder)
    files = _files(folder)
    sizes = sorted({size for size, _ in files})
    if len(sizes) > 1 or len(files) != sizes[0] or {rank for _, rank in files} != set(range(len(files))):
        found = [file.name for file in files.values()][:8]
        raise OptimizerStateError(f"{folder}: expected a file of each rank, found {found}; {REMEDY}")
    check_total(folder, files.values(), most)
    # torch warns that nobody has connected the processes of a mesh, which nobody will
    with errors_only("torch.distributed.device_mesh"):
        parts = [
            read_part(files[sizes[0], rank], most, "tensors and plain values", REMEDY)
            for rank in range(sizes[0])
        ]
    with of_another_kind(f"{folder}: expected parts of one optimizer's state, found ", f"; {REMEDY}"):
        whole = _whole(parts)
    return whole, (f"the state was put together from the files of {sizes[0]} ranks",)


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files of a folder by number of ranks and rank."""
    found = {}
    for file in folder.glob("optim_world_size_*_rank_*.pt"):
        if (match := FILE.fullmatch(file.name)) is not None:
            found[int(match[1]), int(match[2])] = file
    return dict(sorted(found.items()))


def _whole(parts: Sequence[Any]) -> Any:
    """Mappings of parts as one mapping of what they are parts of; what is no shard is the first rank's."""
    first = parts[0]
    if isinstance(first, DTensor):
        return _joined(parts)
    if isinstance(first, Mapping):
        if any(not isinstance(part, Mapping) or part.keys() != first.keys() for part in parts):
            raise ValueError("entries that not all ranks have")
        return {key: _whole([part[key] for part in parts]) for key in first}
    return first


def _joined(parts: Sequence[Any]) -> Tensor:
    """The tensor that each rank has a part of."""
    first = parts[0]
    cuts = [
        (dim, placement) for dim, placement in enumerate(first.placements) if isinstance(placement, Shard)
    ]
    if any(type(placement) not in (Shard, Replicate) for placement in first.placements) or len(cuts) > 1:
        raise ValueError(f"a tensor that is cut as {first.placements}")
    if not cuts:
        return first._local_tensor  # type: ignore[no-any-return]
    ((dim, placement),) = cuts
    # of ranks that have the same parts (HSDP) the first ones
    mesh = first.device_mesh.mesh.movedim(dim, 0).reshape(first.device_mesh.mesh.shape[dim], -1)[:, 0]
    own = [parts[rank]._local_tensor for rank in mesh.tolist()]
    found = sum(x.numel() for x in own)
    if found != first.numel() or not all(x.is_contiguous() for x in own):
        raise ValueError(f"parts of {found} numbers of a tensor of shape {tuple(first.shape)}")
    whole = torch.cat(own, dim=placement.dim)
    if whole.shape != first.shape:
        raise ValueError(f"parts of shape {tuple(whole.shape)} of a tensor of shape {tuple(first.shape)}")
    return whole
