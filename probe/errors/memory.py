"""Memory that did not suffice: how its many errors are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from probe.text import first_line, text_of

Result = TypeVar("Result")
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch has one of its own
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(s in text_of(error).lower() for s in _SIGNS)


def unless_out_of_memory(run: Callable[[], Result]) -> Result | OutOfMemory:
    """What a call gives, or what it says where memory did not suffice; its tensors are let go before this returns."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(f"{first_line(error):.200}")


class OutOfMemory(str):
    """The first line of an error that says that memory did not suffice."""

    __slots__ = ()
