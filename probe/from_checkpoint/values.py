"""A trainer's option as a value of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probe.config.numbers import is_finite


@dataclass(frozen=True)
class Read:
    """An option that has an equivalent in the probe's configuration.

    Attributes:
        key: the equivalent.
        convert: from the option's value to that of `key`; `ValueError` says what was expected.
        only_sampled: whether it is about U as it is sampled, and says nothing about a U from a file.
    """

    key: str
    convert: Callable[[Any], Any]
    only_sampled: bool = False


def number(value: Any) -> float:
    """A finite number."""
    if not is_finite(value):
        raise ValueError("a finite number")
    return float(value)


def integer(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("an integer")
    return value


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def or_none(convert: Callable[[Any], Any], none: Any = None) -> Callable[[Any], Any]:
    """As `convert`; None becomes `none`."""
    return lambda value: none if value is None else convert(value)


def one_of(*names: str) -> Callable[[Any], str]:
    """One of these names."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return convert


def advantage_kind(value: Any) -> str:
    """`scale_rewards`, which earlier versions have as a truth value."""
    names = {"group": "grpo", "batch": "batch", "none": "dr_grpo", True: "grpo", False: "dr_grpo"}
    if not isinstance(value, (str, bool)) or value not in names:
        raise ValueError("group, batch or none")
    return names[value]


def top_k(value: Any) -> int:
    """The number of tokens that sampling keeps, 0 for all."""
    return max(integer(value), 0)  # -1 is off, too


def clipping(value: Any) -> float | None:
    """The largest gradient norm, None for no clipping."""
    return number(value) or None  # transformers' 0 is off


def mapping(value: Any) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise ValueError("a mapping")
    return value


def numbers(value: Any) -> list[float]:
    """A list of finite numbers."""
    if not isinstance(value, list):
        raise ValueError("a list of numbers")
    return [number(entry) for entry in value]


def texts(value: Any) -> list[str]:
    """A list of texts, or one text."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError("a text or a list of texts")
    return listed
