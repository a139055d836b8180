"""Responses of a rollout file: tokens, ends, log-probs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from probe.data.prompts import check_messages
from probe.errors.exceptions import DataError, RolloutError
from probe.rollouts.cells import ROUNDING, as_float, is_number, padded, read_ids
from probe.rollouts.ends import EndRules, Response, end_exact, end_texts
from probe.rollouts.retokenized import Recovery
from probe.rollouts.stated_ends import stated_ends
from probe.rollouts.tables import RolloutTable

logger = logging.getLogger(__name__)

TOKEN_MASKS = ("completion_mask", "tool_mask", "response_mask", "loss_mask")
"""Columns that say of each token of the response whether the policy sampled it."""


def read_responses(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, rules: EndRules, vocabulary: int
) -> tuple[list[Response], list[str]]:
    """The responses by their exact ids where there are some, else by their text; and the batch's flags."""
    exact = "completion_ids" in table.columns
    stated = stated_ends(table)
    if exact:
        ids = read_ids(table, "completion_ids", vocabulary)
        logged = table.column("completion") if "completion" in table.columns else [None] * len(ids)
        texts = [_logged_text(value, own, tokenizer) for value, own in zip(logged, ids, strict=True)]
    else:
        values = table.column("completion")
        texts = [_completion_text(value, f"{table.where(i)}, completion") for i, value in enumerate(values)]
        ids = [[int(t) for t in own] for own in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if not any(ids):
        raise RolloutError(
            f"{table.path}: expected a response with tokens, found all {len(ids)} of them empty"
        )
    _check_ends(table, ids, rules.eos_ids, "completion_ids" if exact else "completion")
    responses = [Response(list(own), text) for own, text in zip(ids, texts, strict=True)]
    if exact:
        end_exact(responses, stated, rules, tokenizer)
    else:
        recovery = Recovery(tokenizer)
        for response in responses:
            response.doubts += recovery.doubts(response.text, response.ids)
        end_texts(table.path, responses, stated, rules, tokenizer)
    flags = [] if exact else ["retokenized"]
    longer = sum(response.longer for response in responses)
    if longer:
        flags.append("unknown_cap")
        logger.warning(
            "%s: %d of %d responses have more than generation.max_new_tokens = %d tokens and count as "
            "cut off unless they end with EOS; set it to the cap they were sampled with, or add a column "
            "truncated",
            table.path,
            longer,
            len(ids),
            rules.max_new_tokens,
        )
    if any("no_end" in response.doubts for response in responses):
        flags.append("ended_without_eos")
    return responses, flags


def _check_ends(table: RolloutTable, ids: list[list[int]], eos_ids: Sequence[int], name: str) -> None:
    """Refuse what the policy cannot have sampled: what follows an EOS, and what a mask leaves out.

    Padding after EOS cannot be told from sampled tokens by its id, so it must not be there.
    """
    for i, own in enumerate(ids):
        first = next((t for t, token in enumerate(own[:-1]) if token in eos_ids), None)
        if first is not None:
            raise DataError(
                f"{table.where(i)}: expected {name} to end with their first EOS ({own[first]}), found "
                f"{len(own) - first - 1} tokens after it; cut padding off"
            )
    for mask_name in TOKEN_MASKS:
        if mask_name not in table.columns:
            continue
        for i, mask in enumerate(table.column(mask_name)):
            if mask is not None and (len(mask) != len(ids[i]) or not all(mask)):
                raise DataError(
                    f"{table.where(i)}: expected {mask_name} to be 1 for each of the {len(ids[i])} completion_ids, "
                    "found others; tokens that the policy did not sample cannot be part of a response here"
                )


def _completion_text(value: Any, where: str) -> str:
    """The text of a logged completion: a text, or one message of the assistant with nothing but text."""
    if isinstance(value, str):
        return value
    messages = check_messages(value, where)
    if len(messages) > 1 or set(messages[0]) != {"role", "content"} or messages[0]["role"] != "assistant":
        found = ", ".join(f"{message['role']} ({', '.join(message)})" for message in messages)
        raise DataError(
            f"{where}: expected one assistant message with role and content, found {found}; its text is not "
            "all that the policy sampled, add a column completion_ids with the sampled tokens"
        )
    return messages[0]["content"]


def _logged_text(value: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion whose ids are known."""
    return value if isinstance(value, str) else str(tokenizer.decode(ids, skip_special_tokens=True))


def read_logprobs(table: RolloutTable, name: str, ids: list[list[int]], gaps: bool = False) -> Tensor | None:
    """A column of log-probs, `(B, T)` float64 with 0 where there is no token, NaN for null where `gaps` are allowed."""
    if name not in table.columns:
        return None
    values = table.column(name)
    for i, (logprobs, own) in enumerate(zip(values, ids, strict=True)):
        if gaps and isinstance(logprobs, list):
            values[i] = logprobs = [math.nan if x is None else x for x in logprobs]
        if not isinstance(logprobs, list) or not all(is_number(value) for value in logprobs):
            raise DataError(
                f"{table.where(i)}: expected {name} to be a list of numbers, found {logprobs!r:.60}"
            )
        if len(logprobs) != len(own):
            raise DataError(
                f"{table.where(i)}: expected {name} for {len(own)} tokens, found {len(logprobs)}; add "
                "a column completion_ids with the tokens they belong to, EOS included"
            )
        wrong = [
            value
            for value in logprobs
            if not (gaps and math.isnan(as_float(value))) and not -math.inf < as_float(value) <= ROUNDING
        ]
        if wrong:
            raise DataError(
                f"{table.where(i)}: expected {name} to be finite and not above 0, found {wrong[0]!s:.60}"
            )
    return padded(values, torch.float64)[0]


def read_loss_tokens(table: RolloutTable) -> float | None:
    """The column `loss_tokens`."""
    if "loss_tokens" not in table.columns:
        return None
    found = set(table.column("loss_tokens"))
    number = next(iter(found))
    if len(found) != 1 or not is_number(number) or not 0 < as_float(number) < math.inf:
        raise DataError(
            f"{table.path}: expected one positive number in all rows of the column loss_tokens, found "
            f"{', '.join(f'{x!s:.60}' for x in list(found)[:3])}"
        )
    return float(number)
