"""What is the same in every trainer: numbers wait until it has counted the step, and alarms reach all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from probe.live.notes import Notes
from probe.live.outlets import LogTo
from probe.live.ranks import follow_first_rank
from probe.live.watch import Watch, conclude


class Outlets(Protocol):
    """The host's logs."""

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""

    def show(self, notes: Notes, step: int) -> None:
        """Show what is more than numbers."""


class HostedWatch:
    """A watch inside of a trainer.

    Attributes:
        watch: the running probe; None before training begins, or where it could not be attached.
    """

    def __init__(self, has_alarm: bool) -> None:
        """Args: `has_alarm`, whether an alarm can change anything of the training."""
        self.watch: Watch | None = None
        self._has_alarm = has_alarm
        self._waiting: list[tuple[dict[str, float] | Notes, int]] = []
        self._ended: tuple[int, int] | None = (
            None  # the watch's last step, and what the trainer logs it under
        )

    def clear(self) -> None:
        """Another training begins; an exception may have ended an earlier one without a word."""
        self.detach()
        self.watch, self._waiting, self._ended = None, [], None

    @property
    def log(self) -> LogTo:
        """The watch's log: it keeps everything until `hand_on`."""
        return LogTo(
            lambda numbers, step: self._waiting.append((dict(numbers), step)),
            lambda notes, step: self._waiting.append((notes, step)),
        )

    def hand_on(self, outlets: Outlets, counted: int) -> None:
        """Log what has been kept since the last time, each under the trainer's number of its step.

        An alarm may be one of an earlier step than the one that has just ended: it was raised between the two, by an
        entropy that the training has logged.

        Args:
            outlets: the host's logs.
            counted: what the trainer logs the step under that has just ended.
        """
        if self.watch is None:
            return
        if self._ended is None or self._ended[0] != self.watch.step:
            self._ended = self.watch.step, counted
        last, under = self._ended
        waiting, self._waiting = self._waiting, []
        for one, step in waiting:
            under_step = under - (last - step)
            if isinstance(one, Notes):
                outlets.show(one, under_step)
            else:
                outlets.send(one, under_step)

    def asks_to_stop(self) -> bool:
        """Whether an alarm ends the training, on whatever rank it was raised. Call it on all ranks."""
        if self.watch is None:
            return False
        if self._has_alarm:
            follow_first_rank(self.watch)
        return self.watch.should_stop

    def end_step(self, outlets: Outlets, counted: int, is_last: bool) -> bool:
        """Log what a step has brought. Call it on all ranks.

        Args:
            outlets: the host's logs.
            counted: what the trainer logs the step under.
            is_last: whether the training ends here in any case.

        Returns:
            Whether it ends here. Then its end has been shown, as trainers close their logs before callbacks hear of it.
        """
        self.hand_on(outlets, counted)
        ends = self.asks_to_stop() or is_last
        if ends:
            self.conclude(outlets, counted)
        return ends

    def conclude(self, outlets: Outlets, counted: int) -> None:
        """Show what the training comes to; see `hand_on`."""
        if self.watch is not None:
            conclude(self.watch)
            self.hand_on(outlets, counted)

    def detach(self) -> None:
        """Remove the hooks; the history stays."""
        if self.watch is not None:
            self.watch.detach()
