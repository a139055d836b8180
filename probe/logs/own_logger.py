"""The logger that a run has where the user gives none: TensorBoard's, in a folder named after checkpoint and time."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from probe.files.atomic import claim_folder

GROUP = "entropy_probe"
"""The folder of all runs, in that of the logs."""


class OwnLogger(TensorBoardLogger):
    """A TensorBoardLogger whose folder is named, and made, when something is first written.

    The name (`step_60_2025-01-15_14-30-25`, with `_2` where it is taken) is what TensorBoard shows of the run.

    Attributes:
        run: the name, before anybody has taken it.
    """

    def __init__(self, folder: Path, run: str | None = None, first: bool = True) -> None:
        """Nothing is made yet.

        Args:
            folder: of the logs.
            run: the name of the run; None as long as that is not known: Lightning's `version_0`, ... then.
            first: whether this process writes.
        """
        super().__init__(save_dir=folder, name=GROUP)
        self.run = run
        self._first = first

    @property
    def version(self) -> int | str:
        """The last part of the folder."""
        if self._version is None and self.run is not None:
            self._version = claim_folder(self.root_dir, self.run).name if self._first else self.run
        return super().version
