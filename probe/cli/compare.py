"""Compares two runs, prints what was found and writes it."""

from __future__ import annotations

from pathlib import Path

from probe.files.atomic import atomic_write_bytes, ensure_replaceable
from probe.files.strict_json import dump_bytes
from probe.report.compare import compare
from probe.report.comparison import Comparison


def execute(a: str, b: str, unpaired: bool = False, results_path: str | None = None) -> Comparison:
    """Compare two logs.

    Args:
        a: the log of run A.
        b: the log of run B.
        unpaired: whether independent errors are taken where E differs.
        results_path: the JSON file to write; None for none.

    Raises:
        ProbeError: whatever went wrong, in one line.
    """
    path = None if results_path is None else Path(results_path)
    if path is not None:
        ensure_replaceable(path)
    found = compare(a, b, unpaired)
    print(found, end="")
    if path is not None:
        atomic_write_bytes(path, dump_bytes(found.as_mapping()))
    return found
