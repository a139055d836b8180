"""What passes put through a model: how much of it is padding, and what there was no memory for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)

Kind = Literal["forward", "forward mode", "nested forward mode", "backward"]
"""Passes of a kind need the same memory for the same tokens."""


@dataclass
class Traffic:
    """Counts over the passes of a policy; shared by all that are derived from it.

    Attributes:
        useful: tokens of prompts and responses that went through the model.
        padded: positions that did, padding included.
        room: by kind of pass, where a microbatch was too much: positions of the largest that may still be tried. Kinds
            are kept apart, so that what a derivative has no memory for does not change the shapes that scores are
            compared in.
    """

    useful: int = 0
    padded: int = 0
    room: dict[Kind, int] = field(default_factory=dict)

    def count(self, useful: int, padded: int) -> None:
        """A microbatch went through."""
        self.useful += useful
        self.padded += padded

    def too_much(self, kind: Kind, padded: int) -> None:
        """A microbatch of so many positions did not fit: from here on none of its kind is larger than half of it."""
        most = self.room.get(kind)
        if most is None or padded // 2 < most:
            self.room[kind] = max(padded // 2, 1)
            logger.warning(
                "out of memory (%s) with %d tokens at a time: going on with at most %d",
                kind,
                padded,
                self.room[kind],
            )
