"""The exceptions of the package: each message says what was expected, what was found and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from probe.errors.remedies import Audience, Message, Remedy
from probe.text import shown


class ProbeError(Exception):
    """Base class. The command line prints its message as one line and exits with code 2.

    Attributes:
        results: the result mapping where a run came to its end but could not be published, else None.
        message: what is said; its text has the words of a run.
    """

    results: dict[str, Any] | None = None

    def __init__(self, *parts: str | Remedy) -> None:
        """Args: `parts` of the message, remedies among them."""
        self.message = Message(parts)
        super().__init__(str(self.message))

    def say_to(self, audience: Audience) -> None:
        """Put the message into the words of those who read it."""
        self.args = (self.message.words(audience),)


class ConfigError(ProbeError, ValueError):
    """A configuration key is unknown, has the wrong type or an impossible value."""


class CheckpointError(ProbeError):
    """A checkpoint, adapter, tokenizer or base model is missing, unreadable or has non-finite weights."""


class OptimizerStateError(ProbeError):
    """The saved optimizer state is missing, unsafe to load, or does not match the model's parameters."""


class DataError(ProbeError):
    """A data set, a rollout file, a prompt template or a reward cannot be used."""


class RolloutError(ProbeError):
    """Sampling gave nothing to probe, or its settings do not describe the policy that is scored."""


class NumericalError(ProbeError):
    """A number that should be finite or consistent is not."""


class MemoryExhaustedError(ProbeError):
    """A pass over the model needs more memory than there is, and no other way is left or allowed."""


class RanksApartError(ProbeError):
    """One of several processes has gone, or is not where the others are.

    Attributes:
        said_by_others: another process says so.
    """

    said_by_others = False


class ForwardCutOffError(RanksApartError):
    """A forward of a policy that is sharded over processes has failed on one, while the others wait for its part.

    Nothing can go on: what this process sent next, the others would take for that part.
    """


class LogError(ProbeError):
    """A log or result file cannot be written or read."""


@contextmanager
def in_words_of(audience: Audience) -> Iterator[None]:
    """Errors of the package that pass here in the words of those who read them."""
    try:
        yield
    except ProbeError as error:
        error.say_to(audience)
        raise


def require(condition: bool, key: str, expected: str, found: Any) -> None:
    """Raise `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, found {shown(found, 200)}")


def nearest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message that points to the most similar of `names`, else says something else or nothing.

    >>> nearest("exact_numbr", ["exact_number", "gsm8k"])
    '; did you mean exact_number?'
    >>> nearest("x", ["exact_number", "gsm8k"], "there are two")
    '; there are two'
    """
    return did_you_mean(closest(name, names), otherwise)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`; None where none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def did_you_mean(name: str | None, otherwise: str = "") -> str:
    """The end of an error message that asks whether `name` was meant; where that is None, see `nearest`."""
    hint = otherwise if name is None else f"did you mean {name}?"
    return f"; {hint}" if hint else ""
