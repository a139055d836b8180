"""Words, findings and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Word = Literal["trustworthy", "caution", "unresolved", "invalid"]
WORDS: tuple[Word, ...] = ("trustworthy", "caution", "unresolved", "invalid")
"""From best to worst. The position is the code under which loggers that take only numbers get the verdict."""
MATERIAL = 0.1
"""What changes a result by more than a tenth is reported: curvature (as in the definition of `eta_10`), the
difference between prediction and measurement, the noise floor, responses cut off by the token limit."""
UNITS = {"_tok": "nats per token", "": "nats per response"}
PER = {"_tok": "per token", "": "per response"}


@dataclass(frozen=True)
class Verdict:
    """How far a result can be believed.

    Attributes:
        word: one of `WORDS`.
        reasons: sentences with the numbers found and, where there is one, the remedy; those of the worst word
            first. Never empty.
    """

    word: Word
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        word: how bad it is.
        sentence: what was found, against which limit, and what to do.
        minor: whether it is about the estimand beside the headline one, and stands behind others of its word.
    """

    word: Word
    sentence: str
    minor: bool = False

    @property
    def rank(self) -> int:
        """Position of the word in `WORDS`."""
        return WORDS.index(self.word)
