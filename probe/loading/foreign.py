"""Files of a stranger: what would hang, or take all memory, is refused before a library opens it.

Libraries read what they find: a named pipe that nobody writes to, a device that never ends, a table that a few bytes
make endless. No code has to run for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from probe.errors.exceptions import CheckpointError, OptimizerStateError, ProbeError
from probe.limits import (
    FOLDER_ENTRIES,
    LARGEST_SETTING,
    PICKLE_BYTES,
    PICKLE_DEPTH,
    PICKLE_TUPLE,
    SETTINGS_BYTES,
    TABLE_BYTES,
)

_SETTINGS = ("config.json", "_config.json", "special_tokens_map.json", "added_tokens.json", ".jinja")
_TABLES = (".json", ".txt", ".model", ".tiktoken")
_ENDLESS = ("/dev/", "/proc/", "/sys/")
_LISTED = 10
_TORCH_LEGACY = 0x1950A86A20F9469CFC6C


def check_folder(folder: Path) -> None:
    """Refuse a folder with an entry that is no file or folder, or a file of settings beyond all measure.

    Args:
        folder: an existing folder, whose files are about to be read by libraries.

    Raises:
        CheckpointError: names the entry and what is wrong with it.
    """
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= FOLDER_ENTRIES:
                raise CheckpointError(
                    f"{folder}: expected the folder of a model, found more than {FOLDER_ENTRIES} entries; move the "
                    "model into a folder of its own"
                )
            try:
                info = entry.stat()
            except OSError:
                continue  # a link to nothing: nobody can open it either
            if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
                raise CheckpointError(
                    f"{entry.path}: expected a file, found {_kind(info.st_mode)}, whose reading may never end; "
                    "remove it"
                )
            if entry.is_symlink() and os.path.realpath(entry.path).startswith(_ENDLESS):
                raise CheckpointError(
                    f"{entry.path}: expected a file, found a link to {os.path.realpath(entry.path)}, a file of the "
                    "system's own; remove it"
                )
            limit = _limit(entry.name)
            if stat.S_ISREG(info.st_mode) and limit is not None and info.st_size > limit:
                raise CheckpointError(
                    f"{entry.path}: expected at most {limit} bytes, found {info.st_size}; take the file from where the "
                    "model was saved"
                )


def read_json_object(file: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file, whatever the file holds.

    Args:
        file: the file.
        expected: what it should be, for the message.

    Raises:
        CheckpointError: it cannot be read, is too large, is nested too deeply, or is no object.
    """
    limit = _limit(file.name) or SETTINGS_BYTES
    try:
        with file.open("rb") as handle:
            data = handle.read(limit + 1)
        if len(data) > limit:
            raise CheckpointError(f"{file}: expected {expected} of at most {limit} bytes, found more")
        content = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = "brackets nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{file}: expected {expected}, found {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected {expected} (a JSON object), found {type(content).__name__}")
    return content


def check_sizes(where: str, settings: Any) -> None:
    """Refuse settings with a number that no size or length has; building with it would take all memory.

    Args:
        where: start of the message.
        settings: content of a JSON file.

    Raises:
        CheckpointError: names the setting.
    """
    for name, value in walk(settings):
        if isinstance(value, int) and abs(value) > LARGEST_SETTING:
            shown = str(value) if abs(value) < 10**30 else "one of more than 30 digits"
            raise CheckpointError(
                f"{where}: expected numbers of at most {LARGEST_SETTING}, found {name}: {shown}; take the file from "
                "where the model was saved"
            )


def walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value in nested JSON, with the name of the nearest key."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from walk(entry, str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from walk(entry, name)
    else:
        yield name, value


def check_torch_file(file: Path, most: int | None) -> None:
    """Refuse a file of torch.save whose table of contents has no end, or whose content is larger than the file.

    torch's safe loading runs no code, but still builds, hashes and unpacks what it is told to.

    Args:
        file: an existing file.
        most: largest size in bytes that it can rightly have; None for any.

    Raises:
        OptimizerStateError: names what was found. Files that are no torch files at all are left to torch.
    """
    if not file.is_file():
        raise OptimizerStateError(f"{file}: expected a file, found {_kind(file.stat().st_mode)}")
    size = file.stat().st_size
    if most is not None and size > most:
        raise OptimizerStateError(
            f"{file}: expected at most {most} bytes for the optimizer of this model, found {size}; name the file with "
            "this model's optimizer in checkpoint.optimizer_path"
        )
    refusal = (
        f"{file}: expected a file that torch.save wrote, found {{}}; save `optimizer.state_dict()` again"
    )
    try:
        if not zipfile.is_zipfile(file):
            _check_legacy(file, refusal)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise OptimizerStateError(refusal.format(f"the compressed entry {packed[0]!r:.80}"))
            if sum(entry.file_size for entry in entries) > size:
                raise OptimizerStateError(refusal.format("entries that are larger than the file together"))
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > PICKLE_BYTES:
                        raise OptimizerStateError(
                            refusal.format(f"a table of contents of {entry.file_size} bytes")
                        )
                    with archive.open(entry) as handle:
                        check_pickle(handle, refusal)
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        return  # no torch file: torch says so in its own way


def _check_legacy(file: Path, refusal: str) -> None:
    """The format of before 1.6: a magic number, two pickles about the system, the content, and the storages' keys."""
    with file.open("rb") as handle:
        magic = handle.read(64)
        if _TORCH_LEGACY.to_bytes(10, "little") not in magic:
            return
        handle.seek(0)
        for _ in range(5):
            check_pickle(handle, refusal)


def check_pickle(handle: IO[bytes], refusal: str) -> None:
    """Go through the instructions of one pickle without following them, counting what values would stand for.

    A value's weight is the number of values in it, those in its parts included, as often as they occur.

    Args:
        handle: at the start of the pickle.
        refusal: of the message, with a place for what was found.

    Raises:
        OptimizerStateError: it is too long, too deep, or has a tuple that stands for too many values.
    """
    stack: list[tuple[int, int] | None] = []  # weight and depth; None is a mark
    memo: dict[int, tuple[int, int]] = {}
    start = handle.tell()
    try:
        for instruction, argument, position in pickletools.genops(handle):
            if (position or 0) - start > PICKLE_BYTES:
                raise OptimizerStateError(refusal.format("a table of contents without an end"))
            name = instruction.name
            if name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument or 0)] = _top(stack)
            elif name == "MEMOIZE":
                memo[len(memo)] = _top(stack)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument or 0)])
            elif name == "DUP":
                stack.append(_top(stack))
            else:
                _follow(stack, instruction)
            if stack and stack[-1] is not None:
                weight, depth = stack[-1]
                if depth > PICKLE_DEPTH:
                    raise OptimizerStateError(refusal.format("values nested without an end"))
                if name.startswith("TUPLE") and weight > PICKLE_TUPLE:
                    raise OptimizerStateError(refusal.format("a tuple that stands for too many values"))
    except (ValueError, IndexError, KeyError, TypeError, pickle.UnpicklingError):
        return  # no whole pickle: torch says so in its own way


def _follow(stack: list[tuple[int, int] | None], instruction: pickletools.OpcodeInfo) -> None:
    """Replace what an instruction takes from the stack by what it leaves there."""
    taken: list[tuple[int, int]] = []
    before = list(instruction.stack_before)
    if pickletools.markobject in before:
        while stack and stack[-1] is not None:
            taken.append(stack.pop())  # type: ignore[arg-type]
        stack.pop()
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        entry = stack.pop()
        if entry is not None:
            taken.append(entry)
    for left in instruction.stack_after:
        if left is pickletools.markobject:
            stack.append(None)
        else:
            # a container may hold itself later on; tuples, which are hashed, cannot
            stack.append((1 + sum(w for w, _ in taken), 1 + max((d for _, d in taken), default=0)))


def _top(stack: list[tuple[int, int] | None]) -> tuple[int, int]:
    return stack[-1] or (1, 1)


def _limit(name: str) -> int | None:
    """Largest size of a file of this name; None for files that may be of any size."""
    if name.endswith(".index.json"):
        return TABLE_BYTES
    if name.endswith(_SETTINGS):
        return SETTINGS_BYTES
    return TABLE_BYTES if name.endswith(_TABLES) else None


def _kind(mode: int) -> str:
    names = (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, "a folder"),
    )
    with contextlib.suppress(StopIteration):
        return next(name for test, name in names if test(mode))
    return "something else"


@contextlib.contextmanager
def rewritten(what: str, remedy: str) -> Iterator[None]:
    """Turn a library's error into one line with a remedy. Running out of memory stays what it is.

    Args:
        what: start of the line.
        remedy: its end.
    """
    try:
        yield
    except (ProbeError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            remedy = "it comes with code of its own: set checkpoint.trust_remote_code: true if you trust it"
        text = text if len(text) <= 400 else text[:400] + " ..."
        raise CheckpointError(f"{what}: {type(error).__name__}: {text}; {remedy}") from error


def some(items: list[str]) -> str:
    """The first of many names, and how many more there are.

    Args:
        items: the names.
    """
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
