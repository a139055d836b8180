"""What the passes of a run cost, in units of one forward and backward of the trainable weights over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

COSTS = {
    "score": 0.4,
    "gradient on E for all objectives": 2.2,
    "gradient on E": 1.4,
    "gradient on U": 1.0,
    "forward mode": 1.3,
    "coupling": 1.3,
    "influence": 1.3,
    "curvature": 4.0,
    "sample": 0.0,
}
"""By the beginning of a pass's name, the first that fits, rounded from `benchmarks/whole_probe.py`: a forward; a
backward for all objectives of an attribution (3 or 4), for two (X for both estimands) and for one (the loss); values
and tangents together, as they are taken once over U for every state of a coupling and every row of an influence matrix;
nested forward mode. Sampling is left out, as it is in what they are compared with."""


@dataclass(frozen=True)
class PassRecord:
    """A pass that a run has made.

    Attributes:
        what: its name, such as `score E after the step`; the batch is a word of it.
        responses: that it went over.
    """

    what: str
    responses: int

    @property
    def units(self) -> float:
        """What it costs, in forwards and backwards over those responses.

        Raises:
            KeyError: no cost is known for it.
        """
        for beginning, units in COSTS.items():
            if self.what.startswith(beginning):
                return units
        raise KeyError(f"expected a pass with one of the names {', '.join(COSTS)}, found {self.what!r}")


def passes_over(records: Sequence[PassRecord], batch: Literal["E", "U"], size: int) -> float:
    """How many forwards and backwards over a whole batch the passes over it amount to.

    Args:
        records: of a run.
        batch: which.
        size: its responses.

    >>> records = [PassRecord("score E", 100), PassRecord("gradient on E", 50), PassRecord("gradient on U", 8)]
    >>> round(passes_over(records, "E", 100), 6), passes_over(records, "U", 8)
    (1.1, 1.0)
    """
    return sum(one.units * one.responses for one in records if goes_over(one.what, batch)) / size


def goes_over(what: str, batch: Literal["E", "U"]) -> bool:
    """Whether a pass of that name goes over that batch.

    >>> goes_over("score U along X", "U"), goes_over("score E", "U")
    (True, False)
    """
    return batch in what.split()
