"""What reading an optimizer that ranks have saved in parts has in common, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from probe.errors.exceptions import OptimizerStateError
from probe.errors.memory import is_out_of_memory
from probe.loading.foreign import check_torch_file
from probe.text import first_line


def check_total(folder: Path, files: Iterable[Path], most: int) -> None:
    """Refuse files that have more bytes together than the model allows.

    Args:
        folder: of the files.
        files: that are read.
        most: bytes that they can rightly have.

    Raises:
        OptimizerStateError: they have more.
    """
    there = sum(file.stat().st_size for file in files)
    if there > most:
        raise OptimizerStateError(f"{folder}: expected at most {most} bytes for this model, found {there}")


def read_part(file: Path, most: int, expected: str, remedy: str, stand_in: type | None = None) -> Any:
    """What torch.save wrote, on the CPU, without running code in it.

    Args:
        file: any.
        most: bytes that it can rightly have.
        expected: what is said of a file that cannot be read.
        remedy: what to do then.
        stand_in: the class of objects in the place of those whose own is not looked up; None refuses these.

    Raises:
        OptimizerStateError: it cannot be read so.
    """
    check_torch_file(file, most)
    try:
        stand_ins: list[Any] = []
        if stand_in is not None:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
            stand_ins = [(type("StandIn", (stand_in,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = (
            first_line(error)[:160]
            if name is None
            else f"a pickle that needs {name[1]}, which could run code"
        )
        raise OptimizerStateError(f"{file}: expected {expected}, found {found}; {remedy}") from error


@contextmanager
def of_another_kind(before: str, after: str) -> Iterator[None]:
    """Say that a folder is not what it seems to be where what is in it does not fit together.

    Args:
        before: of the message, up to the reason.
        after: the rest of it.

    Raises:
        OptimizerStateError: it does not.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error):.160}"
        raise OptimizerStateError(f"{before}{reason}{after}") from error
