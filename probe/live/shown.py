"""What a person sees of a watch: a page, and itself in a notebook."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe.distributed.ranks import rank_and_size
from probe.errors.exceptions import ConfigError
from probe.files.atomic import atomic_write_bytes
from probe.live.schedule import Schedule
from probe.live.settings import WatchSettings
from probe.logs.document import environment
from probe.report.html.training import training_page


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
        if not self.history:
            raise ConfigError(
                f"report: expected at least one probed step, found none in {self.step} steps; call it later"
            )
        if rank_and_size()[0] == 0:
            page = training_page(
                self.history, self.step, self.schedule.share, asdict(self.settings), environment()
            )
            atomic_write_bytes(path, page.encode("utf-8"))
        return Path(path)
