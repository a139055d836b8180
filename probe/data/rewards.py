"""The built-in rewards of responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from probe.errors.exceptions import DataError

RewardFunction = Callable[..., Sequence[float | None]]
"""`fn(prompts=[...], completions=[...], **columns)`: one number for each completion, or None where the reward
does not apply. Prompts and completions are texts, or lists of messages where the prompt is one (TRL's
conversational format); every column of the data set comes as a list of the same length."""
_SIGN = r"(?:(?<![\w.)])[-\u2212]\$?)?"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(_SIGN + _DIGITS + _EXPONENT, re.ASCII)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAGGED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


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
