"""Sweeps: a probe over a grid of learning rates, batch sizes, seeds and checkpoints, resumable, with plots.

Files: `grid` (what is swept), `run` (the loop), `store` (the folder), `table` (one row per point), `fits` (slopes),
`plots` with `figures_eta`, `figures_batch` and `figures_checkpoints`.

>>> from probe.sweep import run_sweep
>>> table = run_sweep("quickstart", eta_factors=[0.25, 1, 4], output_folder="sweeps/eta")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.sweep.loop import run_sweep
    from probe.sweep.settings import IncompleteSweepError, SweepConfig

_HOME = {
    "SweepConfig": "probe.sweep.grid",
    "IncompleteSweepError": "probe.sweep.grid",
    "run_sweep": "probe.sweep.loop",
}

__all__ = ["IncompleteSweepError", "SweepConfig", "run_sweep"]


def __getattr__(name: str) -> Any:
    """Import public names on first use: the command line needs only the grid, without pandas and matplotlib."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
