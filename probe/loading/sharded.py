"""Checkpoints of torch.distributed.checkpoint: folders of `.distcp` files, as FSDP writes them, put together.

torch's own reader does the work, but for two things: it unpickles the table of contents, which can run any code, and
the plain values. Here the table may name the classes of such tables only, and values are read by torch's safe loading.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.utils import CheckpointException

from probe.errors.exceptions import OptimizerStateError
from probe.errors.memory import is_out_of_memory
from probe.limits import PICKLE_BYTES
from probe.loading.foreign import check_folder, check_pickle

TABLE = ".metadata"
"""The table of contents of such a folder."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "Path"),
}


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint.

    Args:
        folder: any path.
    """
    return (folder / TABLE).is_file()


def read_sharded(folder: Path, most: int) -> dict[str, Any]:
    """What was saved, whole and on the CPU.

    Args:
        folder: with the table of contents and the `.distcp` files that it names.
        most: bytes that it can rightly have.

    Raises:
        OptimizerStateError: a file is missing, damaged, too large, or needs code to be read.
    """
    check_folder(folder)
    table = _table(folder, most)
    content: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a torch.distributed that nobody has set up
            _load_state_dict(content, storage_reader=_Reader(folder, table), planner=_Planner(), no_dist=True)
    except (CheckpointException, Exception) as error:
        cause = _first_failure(error)
        if is_out_of_memory(cause):
            raise cause from error
        reason = " ".join(str(cause).split())[:200]
        raise OptimizerStateError(
            f"{folder}: expected a folder that torch.distributed.checkpoint wrote, found {type(cause).__name__}: "
            f"{reason}; copy all of its files"
        ) from error
    return content


def _first_failure(error: BaseException) -> BaseException:
    """What a rank has failed with, out of the exception that collects them."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _table(folder: Path, most: int) -> Metadata:
    """The table of contents; the files that it names are the folder's own, and hold as much as it says."""
    file = folder / TABLE
    data = file.read_bytes()
    refusal = f"{file}: expected the table of a sharded checkpoint, found {{}}; save it again"
    if len(data) > PICKLE_BYTES:
        raise OptimizerStateError(refusal.format(f"{len(data)} bytes"))
    check_pickle(io.BytesIO(data), refusal)
    try:
        table = _Table(io.BytesIO(data)).load()
    except Exception as error:
        reason = f"a pickle that is damaged or needs more, which could run code ({error!s:.120})"
        raise OptimizerStateError(refusal.format(reason)) from error
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise OptimizerStateError(refusal.format(type(table).__name__))
    names = {str(info.relative_path) for info in table.storage_data.values()}
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise OptimizerStateError(refusal.format(f"{name!r:.80}, which is no file in its folder"))
    there = sum((folder / name).stat().st_size for name in names)
    promised = sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for entry in table.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    if promised > there or there > most:
        raise OptimizerStateError(
            refusal.format(f"tensors of {promised} bytes in files of {there}, where at most {most} can be")
        )
    return table


class _Reader(FileSystemReader):
    """Reads by a table that has been checked."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self._checked = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table."""
        if self._checked.storage_meta is None:
            self._checked.storage_meta = StorageMeta()
        self._checked.storage_meta.load_id = self.load_id
        return self._checked


class _Planner(_EmptyStateDictLoadPlanner):
    """Puts everything together again; plain values by torch's safe loading."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """A value that is no tensor."""
        found = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved(found))


def _saved(value: Any) -> io.BytesIO:
    """A value that was read safely, as the planner takes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


class _Table(pickle.Unpickler):
    """Unpickles the classes of a table of contents, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that a table may have."""
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}"[:120])
