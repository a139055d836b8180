"""Files: written whole or not at all, strict JSON, and logs read back."""

from probe.files.atomic import (
    atomic_create_bytes,
    atomic_write_bytes,
    ensure_replaceable,
    ensure_writable,
    remove_leftovers,
)

__all__ = [
    "atomic_create_bytes",
    "atomic_write_bytes",
    "ensure_replaceable",
    "ensure_writable",
    "remove_leftovers",
]
