"""Checkpoints of torch.distributed.checkpoint: folders of `.distcp` files, as FSDP writes them, put together.

torch's own reader does the work, but for two things: it unpickles the table of contents, which can run any code, and
the plain values. Here the table may name the classes of such tables only, and values are read by torch's safe loading.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
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
    refusal = f"{file}: expected the table of a sharded checkpoint, found {{}}; save it again"
    with file.open("rb") as handle:
        data = handle.read(PICKLE_BYTES + 1)
    if len(data) > PICKLE_BYTES:
        raise OptimizerStateError(refusal.format(f"more than {PICKLE_BYTES} bytes"))
    check_pickle(io.BytesIO(data), refusal)
    try:
        table = _Table(io.BytesIO(data)).load()
    except Exception as error:
        reason = f"a pickle that is damaged or needs more, which could run code ({error!s:.120})"
        raise OptimizerStateError(refusal.format(reason)) from error
    try:
        _check(table, folder, most, refusal)
    except (AttributeError, TypeError, KeyError) as error:
        raise OptimizerStateError(refusal.format(f"entries of another kind ({error!s:.120})")) from error
    return table  # type: ignore[no-any-return]


def _check(table: Any, folder: Path, most: int, refusal: str) -> None:
    """The table of contents promises what is there, and nothing is left open."""
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise OptimizerStateError(refusal.format(type(table).__name__))
    infos = list(table.storage_data.values())
    names = {str(info.relative_path) for info in infos}
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise OptimizerStateError(refusal.format(f"{name!r:.80}, which is no file in its folder"))
    there = sum((folder / name).stat().st_size for name in names)
    if any(info.transform_descriptors for info in infos):
        raise OptimizerStateError(refusal.format("entries that are packed"))
    if any(info.length < 0 for info in infos) or sum(info.length for info in infos) > there:
        raise OptimizerStateError(refusal.format("entries that are larger than the files together"))
    promised = 0
    for key, entry in table.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        sizes = [tuple(map(int, chunk.sizes)) for chunk in entry.chunks]
        whole = math.prod(map(int, entry.size))
        # what no chunk fills would stay whatever the memory held before
        if min((*entry.size, *(n for size in sizes for n in size)), default=0) < 0 or whole != sum(
            map(math.prod, sizes)
        ):
            raise OptimizerStateError(refusal.format(f"parts that do not make up {key!r:.80}"))
        corners = {tuple(chunk.offsets) for chunk in entry.chunks}
        inside = all(
            o >= 0 and o + n <= m
            for chunk in entry.chunks
            for o, n, m in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        )
        if len(corners) != len(sizes) or not inside:
            raise OptimizerStateError(
                refusal.format(f"parts of {key!r:.80} that lie over each other or outside")
            )
        promised += whole * entry.properties.dtype.itemsize
    if promised > there or there > most:
        raise OptimizerStateError(
            refusal.format(f"tensors of {promised} bytes in files of {there}, where at most {most} can be")
        )


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
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


class _Table(pickle._Unpickler):  # type: ignore[name-defined]
    """Unpickles the classes of a table of contents, and nothing else: the unpickler whose steps can be looked at."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Fill an object, and never a class or a function, which all that runs here would see."""
        filled = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(filled, type) or callable(filled):
            raise pickle.UnpicklingError(f"a change of {filled!r}"[:120])
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """A class that a table may have."""
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}"[:120])
