"""Telling that memory did not suffice from every other failure."""

from __future__ import annotations

from probe.text import text_of

SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
"""What the messages of torch's allocators and of the system say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch has one of its own
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(s in text_of(error).lower() for s in SIGNS)
