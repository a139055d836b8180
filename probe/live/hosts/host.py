"""What is the same in every trainer: numbers wait until it has counted the step, and alarms reach all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from probe.live.outlets import Log
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
        self._waiting: list[tuple[dict[str, float], int]] = []
        self._ended: tuple[int, int] | None = (
            None  # the watch's last step, and what the trainer logs it under
        )

    def clear(self) -> None:
        """Another training begins; an exception may have ended an earlier one without a word."""
        self.detach()
        self.watch, self._waiting, self._ended = None, [], None

    def keep(self, numbers: Mapping[str, float], step: int) -> None:
        """The watch's log: keep numbers until `hand_on`."""
        self._waiting.append((dict(numbers), step))

    def hand_on(self, send: Log, counted: int) -> None:
        """Log what has been kept since the last time, each under the trainer's number of its step.

        An alarm may be one of an earlier step than the one that has just ended: it was raised between the two, by an
        entropy that the training has logged.

        Args:
            send: logs numbers by name, at a step.
            counted: what the trainer logs the step under that has just ended.
        """
        if self.watch is None:
            return
        if self._ended is None or self._ended[0] != self.watch.step:
            self._ended = self.watch.step, counted
        last, under = self._ended
        waiting, self._waiting = self._waiting, []
        for numbers, step in waiting:
            send(numbers, under - (last - step))

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
