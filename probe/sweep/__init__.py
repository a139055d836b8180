"""Sweeps: a probe over a grid of learning rates, batch sizes, seeds and checkpoints, resumable, with plots.

Files: `settings` and `grid` (what is swept), `loop`, `store` (the folder), `table` (one row per point), `curves` and
`fits` (errors and slopes), `plots`, `result` (for a notebook).

>>> from probe.sweep import run_sweep
>>> table = run_sweep("quickstart", eta_factors=[0.25, 1, 4], output_folder="sweeps/eta")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from probe.imports import at_first_use

if TYPE_CHECKING:
    from probe.sweep.loop import run_sweep
    from probe.sweep.result import Sweep, load_sweep
    from probe.sweep.settings import IncompleteSweepError, SweepConfig

_HOME = {
    "SweepConfig": "probe.sweep.settings",
    "IncompleteSweepError": "probe.sweep.settings",
    "Sweep": "probe.sweep.result",
    "load_sweep": "probe.sweep.result",
    "run_sweep": "probe.sweep.loop",
}

__all__ = ["IncompleteSweepError", "Sweep", "SweepConfig", "load_sweep", "run_sweep"]

__getattr__ = at_first_use(__name__, _HOME)
"""The command line needs only the settings, without pandas and matplotlib."""
