"""Seconds per part of a computation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds spent in named parts."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measures(self, name: str) -> Iterator[None]:
        """Note the seconds of a block, unless it raises."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
