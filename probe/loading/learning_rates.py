"""The learning rates that the next step is taken with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.config.numbers import is_finite
from probe.errors.exceptions import OptimizerStateError
from probe.loading.checkpoint import read_trainer_state


def learning_rates(
    file: Path, groups: list[dict[str, Any]], override: float | None, trainer_state: Path | None
) -> tuple[list[float], int, tuple[str, ...]]:
    """The learning rate of every group, the reference group, and notes."""
    saved = [float(group["lr"]) for group in groups]
    if not all(is_finite(rate) and rate >= 0 for rate in saved):
        raise OptimizerStateError(f"{file}: expected finite learning rates of at least 0, found {saved}")
    reference = next((index for index, rate in enumerate(saved) if rate > 0), None)
    if reference is None:
        if override is not None:
            note = f"the saved learning rate is 0; {override:g} is used for all groups"
            return [override] * len(saved), 0, (note,)
        return _earlier_rates(file, groups, trainer_state)
    if override is None:
        return saved, reference, ()
    ratio = override / saved[reference]
    rates = [rate * ratio for rate in saved]
    rates[reference] = override
    note = f"learning rate {override:g} instead of the saved {saved[reference]:g}"
    return rates, reference, (note,) if override != saved[reference] else ()


def _earlier_rates(
    file: Path, groups: list[dict[str, Any]], trainer_state: Path | None
) -> tuple[list[float], int, tuple[str, ...]]:
    """What to step with where the schedule is at 0: the last rate above 0 in the trainer's log, else the initial one.

    Raises:
        OptimizerStateError: neither is known.
    """
    initial = [_positive(group.get("initial_lr")) for group in groups]
    reference = next((index for index, rate in enumerate(initial) if rate is not None), 0)
    first, logged = initial[reference], _last_logged_rate(trainer_state)
    rate, name = (logged, "the last one logged above 0") if logged is not None else (first, "initial_lr")
    if rate is None:
        raise OptimizerStateError(
            f"{file}: expected a learning rate above 0, found 0 in every group (the schedule had ended) and no earlier "
            "one; set probe_rework.learning_rate"
        )
    rates = [rate if own is None or first is None else rate * own / first for own in initial]
    note = f"the saved learning rate is 0 (the schedule had ended): the step is taken at {rate:g}, {name}"
    return rates, reference, (note,)


def _last_logged_rate(trainer_state: Path | None) -> float | None:
    """The last learning rate above 0 in the trainer's log."""
    if trainer_state is None:
        return None
    entries = read_trainer_state(trainer_state).get("log_history") or []
    rates = [
        _positive(entry.get("learning_rate"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]
    return next((rate for rate in reversed(rates) if rate is not None), None)


def _positive(value: Any) -> float | None:
    """A finite number above 0, or None."""
    return float(value) if is_finite(value) and value > 0 else None
