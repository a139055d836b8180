"""The prompts that E is drawn from: texts, message lists, or the rows of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from probe.data.batch import PromptExample
from probe.data.prompts import check_messages
from probe.data.rendering import Rendering, render_messages
from probe.errors.exceptions import DataError
from probe.live.say import say
from probe.rollouts.draw import stream_seed
from probe.rollouts.generation import encode_prompts
from probe.scoring.room import check_prompts, fitting_prompts

MOST_PROMPTS = 1024
"""Prompts kept of a larger data set."""


@runtime_checkable
class _Indexed(Protocol):
    """What has items by position."""

    def __getitem__(self, index: int, /) -> Any: ...


def prompt_examples(prompts: Iterable[Any], tokenizer: Any, seed: int = 0) -> list[PromptExample]:
    """The prompts that E is drawn from: all of them, or 1,024 drawn at random where there are more.

    Args:
        prompts: texts, lists of messages, examples, or the rows of a data set with a column `prompt`.
        tokenizer: renders chat templates.
        seed: of the draw.

    Raises:
        DataError: there are none, or one cannot be used.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise DataError(
            f"prompts: expected a list of texts or of message lists, found {type(prompts).__name__}; put a single one "
            "into a list"
        )
    examples: list[PromptExample] = []
    for index, prompt in enumerate(few_of(prompts, seed)):
        where, row = f"prompts[{index}]", {}
        if isinstance(prompt, PromptExample):
            examples.append(prompt)
            continue
        if isinstance(prompt, Mapping):
            if "prompt" not in prompt:
                raise DataError(f"{where}: expected a column `prompt`, found {', '.join(map(str, prompt))}")
            row = dict(prompt)
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            if not prompt.strip():
                raise DataError(f"{where}: expected a prompt, found an empty text")
            examples.append(PromptExample(prompt, row, index))
        else:
            messages = check_messages(prompt, where)
            text = render_messages(tokenizer, messages, where, Rendering().of_row(row, where))
            examples.append(PromptExample(text, row, index, False))
    if not examples:
        raise DataError("prompts: expected at least one, found an empty list")
    return examples


def few_of(prompts: Iterable[Any], seed: int = 0) -> Iterable[Any]:
    """The prompts, or 1,024 of them drawn at random where there are more: rendering a whole data set takes long.

    Args:
        prompts: what has a length and items by position; anything else is left as it is.
        seed: of the draw.
    """
    if isinstance(prompts, Sized) and isinstance(prompts, _Indexed) and len(prompts) > MOST_PROMPTS:
        generator = torch.Generator().manual_seed(stream_seed(seed, "prompts kept"))
        kept = torch.randperm(len(prompts), generator=generator)[:MOST_PROMPTS].sort().values.tolist()
        return [prompts[i] for i in kept]
    return prompts


def prompts_with_room(
    examples: Sequence[PromptExample], model: nn.Module, tokenizer: Any, max_new_tokens: int
) -> list[PromptExample]:
    """The prompts that leave room for a response; it is said how many do not.

    Args:
        examples: all of them.
        model: whose positions are counted.
        tokenizer: encodes them.
        max_new_tokens: tokens of a response.

    Raises:
        RolloutError: none does.
        DataError: one has tokens that the model does not know.
    """
    encoded = encode_prompts(tokenizer, examples)
    fitting = fitting_prompts(model, encoded, max_new_tokens) or range(len(examples))
    if len(fitting) < len(examples):
        say(
            f"{len(examples) - len(fitting)} of {len(examples)} prompts are left out: with a response of "
            f"{max_new_tokens} tokens they are longer than the model's positions",
            warn=True,
        )
    check_prompts(model, [encoded[i] for i in fitting], max_new_tokens)
    return [examples[i] for i in fitting]
