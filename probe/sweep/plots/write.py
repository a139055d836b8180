"""The plots of a sweep: which ones its table is good for, as PNG files and as TensorBoard figures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from probe.errors.exceptions import LogError
from probe.files.atomic import atomic_write_bytes
from probe.files.failures import write_error, writer_errors_raised_once
from probe.sweep.curves import (
    POLICY,
    SIZES,
    coordinates,
    estimands,
    eta_curves,
    finished,
    grouped,
    reference_rows,
)
from probe.sweep.plots.batch import batch_figure
from probe.sweep.plots.checkpoints import checkpoint_figure
from probe.sweep.plots.eta import eta_figure
from probe.sweep.plots.style import plot_style
from probe.sweep.store import EVENTS, SweepFolder
from probe.sweep.summary import varying_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_NAME = 60
"""Characters of a checkpoint's name in the names of files."""


def write_plots(table: pd.DataFrame, folder: SweepFolder) -> list[Path]:
    """Write every plot whose axis varies; plots of an earlier session are replaced.

    Args:
        table: see `probe.sweep.table`.
        folder: the sweep's folder.

    Returns:
        The PNG files.

    Raises:
        LogError: a file cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder.clear_plots()
    files = []
    try:
        with plot_style(), writer_errors_raised_once(), SummaryWriter(str(folder.path / EVENTS)) as events:
            for name, figure in figures(table):
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png")
                files.append(atomic_write_bytes(folder.path / f"{name}.png", buffer.getvalue()))
                events.add_figure(f"sweep/{name}", figure, close=False)
    except OSError as error:
        with suppress(LogError):
            folder.clear_events()  # they end in the middle
        raise write_error(folder.path, error) from error
    return files


def figures(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The figures of a table with the names of their files, one at a time."""
    rows = finished(table)
    names = _checkpoint_names(rows)
    curves = [(shared, curve) for shared, curve in eta_curves(table) if estimands(curve)]
    for shared, curve in curves:
        name = _file_name("eta", shared, [s for s, _ in curves], names)
        yield name, eta_figure(curve, _with_seeds(_title(shared, names), curve))
    reference = reference_rows(table)
    for axis in varying_sizes(table):
        groups = [
            (s, g) for s, g in grouped(reference, ("checkpoint",)) if g[axis].nunique() > 1 and estimands(g)
        ]
        for shared, group in groups:
            name = _file_name(f"batch_size_{axis}", shared, [s for s, _ in groups], names)
            yield name, batch_figure(group, axis, _reference_title(group, names))
    if rows["checkpoint"].nunique() > 1 and estimands(reference):
        yield "checkpoints", checkpoint_figure(reference, _reference_title(reference, names))


def _checkpoint_names(rows: pd.DataFrame) -> dict[str, str]:
    """Short names of the checkpoints: their own, with a rank where two have the same."""
    short = dict(zip(rows["checkpoint"], rows["checkpoint_name"], strict=True))
    taken = list(short.values())
    return {
        path: f"{name}_{list(short).index(path)}" if taken.count(name) > 1 else str(name)
        for path, name in short.items()
    }


def _file_name(
    prefix: str, shared: Mapping[str, Any], all_shared: list[dict[str, Any]], names: Mapping[str, str]
) -> str:
    """A file name that says by what this figure differs from the others of its kind."""
    parts = [prefix]
    for key, value in shared.items():
        if len({str(other[key]) for other in all_shared}) > 1:
            parts.append(_short(value, names) if key == "checkpoint" else f"{key}{value}")
    return re.sub(r"[^\w.+-]", "_", "_".join(parts))


def _short(checkpoint: str, names: Mapping[str, str]) -> str:
    """A checkpoint's name, or its rank and the end of the name where a file name has no room for all of it."""
    name = names[checkpoint]
    return name if len(name) <= LONGEST_NAME else f"{list(names).index(checkpoint)}_{name[-LONGEST_NAME:]}"


def _title(shared: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """What the rows of a figure have in common."""
    name = names[shared["checkpoint"]] if "checkpoint" in shared else ""
    sizes = coordinates(shared, [key for key in SIZES if key in shared])
    return ", ".join(part for part in (name, sizes) if part)


def _reference_title(rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    """What rows at the reference learning rate have in common, and that rate."""
    shared = {key: rows[key].iloc[0] for key in POLICY if rows[key].nunique(dropna=False) == 1}
    eta, factor = rows["learning_rate"], rows["eta_factor"]
    rate = f"learning rate {eta.iloc[0]:.3g}"
    if eta.nunique() > 1:
        rate = (
            f"{factor.iloc[0]:g} x each policy's learning rate"
            if factor.nunique() == 1
            else "the learning rates nearest to each policy's own"
        )
    return _with_seeds(", ".join(part for part in (_title(shared, names), rate) if part), rows)


def _with_seeds(title: str, rows: pd.DataFrame) -> str:
    """A title with the number of repetitions, where there are any."""
    seeds = rows["seed"].nunique()
    return f"{title}, {seeds} seeds" if seeds > 1 else title
