"""Compares two runs, prints what was found and writes it."""

from __future__ import annotations

from pathlib import Path

from probe.cli.parser import Comparing
from probe.files.atomic import atomic_write_bytes, ensure_replaceable
from probe.files.strict_json import dump_bytes
from probe.report.compare import compare
from probe.report.comparison import Comparison


def execute(command: Comparing) -> Comparison:
    """Compare the logs of a command line.

    Raises:
        ProbeError: whatever went wrong, in one line.
    """
    path = None if command.results_path is None else Path(command.results_path)
    if path is not None:
        ensure_replaceable(path)
    found = compare(command.a, command.b, command.unpaired)
    print(found, end="")
    if path is not None:
        atomic_write_bytes(path, dump_bytes(found.as_mapping()))
    return found
