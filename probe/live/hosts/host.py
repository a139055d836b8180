"""What is the same in every trainer: numbers wait until it has counted the step, and alarms reach all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from probe.live.ranks import follow_first_rank
from probe.live.watch import Watch


class HostedWatch:
    """A watch inside of a trainer.

    Attributes:
        watch: the running probe; None before training begins, or where it could not be attached.
    """

    def __init__(self, has_alarm: bool) -> None:
        """Args: `has_alarm`, whether an alarm can change anything of the training."""
        self.watch: Watch | None = None
        self._has_alarm = has_alarm
        self._waiting: list[dict[str, float]] = []

    def clear(self) -> None:
        """Another training begins; an exception may have ended an earlier one without a word."""
        self.detach()
        self.watch, self._waiting = None, []

    def keep(self, numbers: Mapping[str, float], step: int) -> None:
        """The watch's log: keep numbers until `take`."""
        self._waiting.append(dict(numbers))

    def take(self) -> list[dict[str, float]]:
        """What has been kept since the last time."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def asks_to_stop(self) -> bool:
        """Whether an alarm ends the training, on whatever rank it was raised. Call it on all ranks."""
        if self.watch is None:
            return False
        if self._has_alarm:
            follow_first_rank(self.watch)
        return self.watch.should_stop

    def detach(self) -> None:
        """Remove the hooks; the history stays."""
        if self.watch is not None:
            self.watch.detach()
