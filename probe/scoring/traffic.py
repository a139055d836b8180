"""What passes put through a model: how much of it is padding, and what there was no memory for."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Traffic:
    """Counts over the passes of a policy; shared by all that are derived from it.

    Attributes:
        useful: tokens of prompts and responses that went through the model.
        padded: positions that did, padding included.
        most: positions of the largest microbatch that may still be tried, where a larger one was too much; else None.
    """

    useful: int = 0
    padded: int = 0
    most: int | None = None

    def count(self, useful: int, padded: int) -> None:
        """A microbatch went through."""
        self.useful += useful
        self.padded += padded

    def too_much(self, padded: int) -> None:
        """A microbatch of so many positions did not fit: from here on none is larger than half of it."""
        if self.most is None or padded // 2 < self.most:
            self.most = max(padded // 2, 1)
            logger.warning(
                "out of memory with %d tokens at a time: going on with at most %d", padded, self.most
            )
