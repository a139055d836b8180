"""Numbers of a configuration: finite, and of a size that a run can have."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from probe.errors.exceptions import require
from probe.limits import LARGEST_COUNT, LARGEST_SEED


def check_numbers(settings: Any, prefix: str, unbounded: tuple[str, ...] = ()) -> None:
    """Refuse numbers that are not finite, and whole numbers beyond what any run can have.

    Args:
        settings: a dataclass; its annotations say which of its fields are numbers or lists of them.
        prefix: put before the names of the fields in messages.
        unbounded: whole numbers that nothing is made so many times of; they are bounded as seeds are.

    Raises:
        ConfigError: one is.
    """
    for setting in fields(settings):
        found, hint = getattr(settings, setting.name), str(setting.type)
        for value in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if "float" in hint:
                require(is_finite(value), f"{prefix}{setting.name}", "a finite number", found)
            elif "int" in hint:
                seeds = "seed" in setting.name or setting.name in unbounded
                most = LARGEST_SEED if seeds else LARGEST_COUNT
                require(value <= most, f"{prefix}{setting.name}", f"an integer of at most {most}", found)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value; whole numbers can be too large for floating point.

    >>> is_finite(1), is_finite(float("nan")), is_finite(10**400), is_finite(True), is_finite("1")
    (True, False, False, False, False)
    """
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
