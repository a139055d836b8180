"""Reward functions: found by name, called, and checked."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence, Sized
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.data.rewards import RewardFunction, exact_number, gsm8k, tag_format
from probe.errors.exceptions import DataError, nearest
from probe.imports import UserImportError, import_module
from probe.text import error_text, shown

_PROMPT_HEAD = 60


def compute_rewards(rewards: Sequence[RewardFunction], batch: RolloutBatch) -> Tensor:
    """What `K` reward functions give a batch, `(B, K)` float64, in their own units; NaN where one does not apply.

    Each function is called once with the whole batch, as TRL does, so that rewards which compare responses work. It
    gets `prompts`, `completions`, `completion_ids` and every column of `batch.rows`, each as a list of `B`. Where a
    row's column `prompt` holds a list of messages, prompt and completion are passed as messages. Where the call fails,
    responses are tried one at a time to name the one it is about.

    Args:
        rewards: functions with TRL's signature, see `RewardFunction`.
        batch: the responses.

    Raises:
        DataError: a function fails, or returns anything but one finite number or None for each response; the message
            names the sample where it is one. Or none applies to any response.
    """
    samples = [_sample(batch, index) for index in range(len(batch))]
    columns = []
    for reward in rewards:
        try:
            values = _call_with(reward, samples)
        except DataError as error:
            raise _located(reward, samples, batch, error) from error
        columns.append([math.nan if value is None else value for value in values])
    found = torch.tensor(columns, dtype=torch.float64).T
    if bool(found.isnan().all()):
        names = ", ".join(_name_of(reward) for reward in rewards)
        raise DataError(
            f"reward {names}: expected a number for some response at least, found None for all {len(batch)} (the "
            "reward does not apply); add a reward that applies to these prompts"
        )
    return found


def resolve_rewards(spec: str | Sequence[str]) -> tuple[RewardFunction, ...]:
    """The reward functions that a configuration names.

    Args:
        spec: a registered name (`exact_number`, `gsm8k`, `tag_format`), `module:function` as in an import
            statement (the current directory counts, as with `python -m`), or a list of these.

    Raises:
        DataError: a name is not registered, a module or a function cannot be found, or the list is empty.

    >>> [reward.__name__ for reward in resolve_rewards(["exact_number", "tag_format"])]
    ['exact_number', 'tag_format']
    """
    if isinstance(spec, str):
        return (_resolve_name(spec),)
    if not spec:
        raise DataError("batch_config.reward: expected at least one reward, found an empty list")
    return tuple(_resolve_name(name) for name in spec)


def call_reward(
    reward: RewardFunction, prompts: list[Any], completions: list[Any], columns: Mapping[str, Any]
) -> list[float | None]:
    """Call a reward function and check what it returns.

    Args:
        reward: the function.
        prompts: `n` prompts.
        completions: `n` completions.
        columns: further keyword arguments; those that the function does not accept are left out.

    Returns:
        A finite number or None for each completion.

    Raises:
        DataError: the function is a coroutine, raises, or returns something else than `n` finite numbers or
            None.
    """
    name = _name_of(reward)
    if inspect.iscoroutinefunction(reward):
        raise DataError(
            f"reward {name}: expected a plain function, found a coroutine; wrap it in a function that runs it"
        )
    try:
        returned = reward(prompts=prompts, completions=completions, **_accepted(reward, columns))
        values = list(islice(returned, len(completions) + 1))  # a generator need not end
    except (DataError, KeyboardInterrupt):
        raise
    except BaseException as error:  # `sys.exit` in a reward is a fault of the reward, too
        raise DataError(
            f"reward {name} failed with {error_text(error)}; it was given prompts, completions "
            f"and the columns {', '.join(sorted(columns)) or 'none'}"
        ) from error
    if len(values) != len(completions):
        more = "more" if len(values) > len(completions) else len(values)
        found = len(returned) if isinstance(returned, Sized) else more
        raise DataError(f"reward {name}: expected {len(completions)} numbers, found {found}")
    return [_to_number(value, name) for value in values]


REWARDS: dict[str, RewardFunction] = {"exact_number": exact_number, "gsm8k": gsm8k, "tag_format": tag_format}
"""The registered rewards by the name that the configuration uses."""


def _sample(batch: RolloutBatch, index: int) -> dict[str, Any]:
    """What a reward is told of one response."""
    row = batch.rows[index] if batch.rows else {}
    prompt: Any = batch.prompts[index]
    completion: Any = batch.completions[index]
    if isinstance(row.get("prompt"), list):
        prompt, completion = row["prompt"], [{"role": "assistant", "content": completion}]
    ids = batch.completion_ids[index][batch.mask[index]].tolist()
    return {**row, "completion_ids": ids, "prompt": prompt, "completion": completion}


def _call_with(reward: RewardFunction, samples: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Call a reward with a list of samples; a column that a row lacks is None there."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    columns = {name: [sample.get(name) for sample in samples] for name in names}
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    # What TRL's trainer passes besides the columns, so that functions which name these arguments work here.
    extras = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    return call_reward(reward, prompts, completions, {**columns, **extras})


def _located(
    reward: RewardFunction, samples: Sequence[Mapping[str, Any]], batch: RolloutBatch, error: DataError
) -> DataError:
    """The error with the sample it is about, where one alone brings it about."""
    for index, sample in enumerate(samples):
        try:
            _call_with(reward, [sample])
        except DataError as own:
            return DataError(f"{_where(batch, index)}: {own}")
    return DataError(f"{error} (called with all {len(samples)} responses; each of them alone is accepted)")


def _where(batch: RolloutBatch, index: int) -> str:
    """A sample, for messages."""
    return f"sample {index} (prompt {batch.prompts[index][:_PROMPT_HEAD]!r})"


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for the trainer's logging functions."""


def _accepted(reward: RewardFunction, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a function takes: all of them where it has `**kwargs`."""
    own = {key: value for key, value in columns.items() if key not in ("prompts", "completions")}
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return own
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return own
    return {key: value for key, value in own.items() if key in parameters}


def _to_number(value: Any, name: str) -> float | None:
    """A returned reward as a float; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real):
        raise DataError(
            f"reward {name}: expected a number or None, found {shown(value)} of type {type(value).__name__}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"reward {name}: expected a finite number, found {number}")
    return number


def _name_of(reward: RewardFunction) -> str:
    """A name for messages."""
    return getattr(reward, "__name__", type(reward).__name__)


def _resolve_name(name: str) -> RewardFunction:
    """A registered reward, or one that is imported."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return _import_reward(name)
    raise DataError(
        f"batch_config.reward: expected one of {', '.join(REWARDS)}, or module:function, found "
        f"{name!r}{nearest(name, REWARDS)}"
    )


def _import_reward(spec: str) -> RewardFunction:
    """The function that `module:function` names."""
    module_name, _, attribute = spec.partition(":")
    if not re.fullmatch(r"\w+(?:\.\w+)*:\w+", spec):
        raise DataError(
            f"batch_config.reward: expected module:function (for example rewards:accuracy), found {spec!r}"
        )
    try:
        module = import_module(module_name)
    except UserImportError as error:
        raise DataError(f"batch_config.reward: {error}") from error.__cause__
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise DataError(
            f"batch_config.reward: module {module_name!r} ({module.__file__}) has no function "
            f"{attribute!r}{nearest(attribute, functions)}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise DataError(
            f"batch_config.reward: expected {spec} to be a function, found {type(function).__name__}"
        )
    return function
