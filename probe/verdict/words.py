"""Words, findings and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.errors.remedies import Audience, Message, Remedy

Word = Literal["trustworthy", "caution", "unresolved", "invalid"]
WORDS: tuple[Word, ...] = ("trustworthy", "caution", "unresolved", "invalid")
"""From best to worst. The position is the code under which loggers that take only numbers get the verdict."""
MATERIAL = 0.1
"""What changes a result by more than a tenth is reported: curvature (as in the definition of `eta_10`), the
difference between prediction and measurement, the noise floor, responses cut off by the token limit."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        word: how bad it is.
        message: what was found, against which limit, and what to do.
        minor: whether it is about the estimand beside the headline one, and stands behind others of its word.
    """

    word: Word
    message: Message
    minor: bool = False

    @property
    def rank(self) -> int:
        """Position of the word in `WORDS`."""
        return WORDS.index(self.word)


def caution(*parts: str | Remedy) -> Finding:
    """Something that limits what may be concluded."""
    return Finding("caution", Message(parts))


def unresolved(*parts: str | Remedy) -> Finding:
    """A change that is not told from zero."""
    return Finding("unresolved", Message(parts))


def invalid(*parts: str | Remedy) -> Finding:
    """A number that is wrong, or may be wrong by nobody knows how much."""
    return Finding("invalid", Message(parts))


@dataclass(frozen=True)
class Verdict:
    """How far a result can be believed.

    Attributes:
        word: one of `WORDS`.
        messages: sentences with the numbers found and, where there is one, the remedy; those of the worst word
            first. Never empty.
    """

    word: Word
    messages: tuple[Message, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences in the words of a run."""
        return self.in_words_of("run")

    def in_words_of(self, audience: Audience) -> tuple[str, ...]:
        """The sentences for those who read them."""
        return tuple(message.words(audience) for message in self.messages)
