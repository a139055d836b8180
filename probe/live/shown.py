"""What a person sees of a watch: a page, and itself in a notebook."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe.distributed.ranks import rank_and_size
from probe.errors.exceptions import ConfigError
from probe.files.atomic import atomic_write_bytes
from probe.live.lines import probe_line
from probe.live.schedule import Schedule
from probe.live.settings import WatchSettings
from probe.logs.document import environment
from probe.report.html.training import number_of, outlook_of, training_page
from probe.report.notebook import Figures, card
from probe.report.training_figures import training_figures
from probe.text import first_line, printable

SHOWN = ("H_orig_tok", "deltaH1_tok", "deltaH_true_tok")
"""Numbers of a probe that a notebook shows."""
LAST = 8
"""Probes that it shows."""


class ShownWatch:
    """The part of a `Watch` that shows it; see there for the attributes."""

    settings: WatchSettings
    schedule: Schedule

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per probe."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Number of optimizer steps seen."""
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """Whether the hooks are there."""
        raise NotImplementedError

    @property
    def error(self) -> BaseException | None:
        """The exception that switched the probe off, or None."""
        raise NotImplementedError

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the training so far as one self-contained HTML page; it can be called at any time, and again.

        Of several processes the first one writes.

        Args:
            path: the file, replaced as a whole.

        Returns:
            The path.

        Raises:
            ConfigError: no step was probed yet.
            LogError: the file cannot be written.
        """
        self._require_probe("report")
        if rank_and_size()[0] == 0:
            page = training_page(
                self.history, self.step, self.schedule.share, asdict(self.settings), environment()
            )
            atomic_write_bytes(path, page.encode("utf-8"))
        return Path(path)

    def plot(self) -> Figures:
        """The figures of the training so far: the entropy, and what was forecast of it.

        Raises:
            ConfigError: no step was probed yet.
        """
        self._require_probe("plot")
        return Figures(training_figures(self.history))

    def _require_probe(self, what: str) -> None:
        """Refuse what there is nothing for.

        Raises:
            ConfigError: no step was probed yet.
        """
        if not self.history:
            raise ConfigError(
                f"{what}: expected at least one probed step, found none in {self.step} steps; call it later"
            )

    def __repr__(self) -> str:
        lines = [f"Watch: {len(self.history)} of {self.step} steps probed"]
        if self.error is not None:
            lines[0] += f"; switched off by {first_line(self.error)}"
        elif not self.active:
            lines[0] += "; detached"
        if self.history:
            lines.append(probe_line(self.history[-1]))
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        """How the training stands, for a notebook."""
        lines = repr(self).splitlines()
        rows = [
            [
                str(entry["step"]),
                *(number_of(entry, name) for name in SHOWN),
                entry.get("verdict", ""),
                outlook_of(entry),
            ]
            for entry in self.history[-LAST:]
        ]
        heads = ("step", "entropy", "predicted", "measured", "verdict", "outlook")
        caption = f"The last {len(rows)} probes, nats per token" if len(rows) > 1 else "nats per token"
        return card("", lines, heads, rows, caption)
