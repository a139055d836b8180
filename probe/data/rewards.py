"""Rewards of responses: the registered ones, and any reward function written for TRL by `module:function`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.data.names import nearest
from probe.errors import DataError
from probe.imports import UserImportError, import_module
from probe.text import error_text, shown

RewardFunction = Callable[..., Sequence[float | None]]
"""`fn(prompts=[...], completions=[...], **columns)`: one number for each completion, or None where the reward
does not apply. Prompts and completions are texts, or lists of messages where the prompt is one (TRL's
conversational format); every column of the data set comes as a list of the same length."""

# A minus counts as a sign only where it cannot be a subtraction, a range or a hyphen.
_SIGN = r"(?:(?<![\w.)])[-\u2212]\$?)?"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(_SIGN + _DIGITS + _EXPONENT, re.ASCII)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAGGED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
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


def exact_number(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 where the number a completion gives equals the reference answer, else 0.

    The number is the last one inside the last `<answer>...</answer>`, or in the whole text where there is no
    such pair of tags. Thousands separators, `$`, `%`, a period at the end and trailing zeros make no
    difference.

    Args:
        prompts: not looked at.
        completions: `n` texts (or lists of messages).
        columns: `answer` holds the `n` reference answers; the last number of each counts.

    Raises:
        DataError: there is no column `answer`, or a reference without a number.

    >>> exact_number(["?"] * 3, ["It costs $1,200.", "1200.0 or 7", "none"], answer=["1200"] * 3)
    [1.0, 0.0, 0.0]
    """
    references = [_reference_number(answer) for answer in _answers(columns, "exact_number")]
    return [float(_given_number(c) == r) for c, r in zip(completions, references, strict=True)]


def gsm8k(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """`exact_number` for GSM8K, whose reference answers are worked solutions with the result after `####`.

    Args:
        prompts: not looked at.
        completions: `n` texts (or lists of messages).
        columns: `answer` holds the `n` reference solutions.

    Raises:
        DataError: there is no column `answer`, or a reference without `####` and a number behind it.

    >>> gsm8k(["?"], ["3 times 4 is 12, so the answer is 12."], answer=["3 * 4 = 12 #### 12"])
    [1.0]
    """
    results = []
    for answer in _answers(columns, "gsm8k"):
        _, mark, result = str(answer).rpartition("####")
        if not mark:
            raise DataError(
                f"reward gsm8k: expected a reference answer with the result after ####, found "
                f"{str(answer)[:80]!r}; for plain numbers set batch_config.reward: exact_number"
            )
        results.append(result)
    return exact_number(prompts, completions, answer=results)


def tag_format(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 where a completion is one `<think>...</think>` and then one `<answer>...</answer>`, else 0.

    Nothing but white space may stand around the two, and no further tag inside them.

    Args:
        prompts: not looked at.
        completions: `n` texts (or lists of messages).
        columns: not looked at.

    >>> tag_format(["?", "?"], ["<think>2</think> <answer>4</answer>", "<answer>4</answer>"])
    [1.0, 0.0]
    """
    return [float(_is_tagged(_text(completion))) for completion in completions]


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


def _text(completion: Any) -> str:
    """The text of a completion, which may be a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def _answers(columns: Mapping[str, Any], reward: str) -> list[Any]:
    """The column with the reference answers."""
    if "answer" not in columns:
        raise DataError(
            f"reward {reward}: expected the reference answers in the column answer, found the columns "
            f"{', '.join(sorted(columns)) or 'none'}; set batch_config.answer_column"
        )
    return columns["answer"]


def _reference_number(answer: Any) -> Decimal:
    """The number of a reference answer."""
    number = _last_number(str(answer))
    if number is None:
        raise DataError(f"expected a reference answer with a number, found {str(answer)[:80]!r}")
    return number


def _given_number(completion: Any) -> Decimal | None:
    """The number that a completion answers with, None where there is none."""
    text = _text(completion)
    tagged = _ANSWER.findall(text)
    return _last_number(tagged[-1] if tagged else text)


def _last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly (a float would make 0.1 + 0.2 differ from 0.3)."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    return Decimal(numbers[-1].replace(",", "").replace("$", "").replace("\u2212", "-"))


def _is_tagged(text: str) -> bool:
    """Whether a text is one pair of think tags and one pair of answer tags, each once."""
    return _TAGGED.fullmatch(text) is not None and len(_TAG.findall(text)) == 4
