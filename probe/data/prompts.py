"""Prompts: named, hub and local data sets, put through a template and the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from probe.config.batches import BatchConfig
from probe.data.batch import PromptExample
from probe.data.named import NamedDataset, named_dataset
from probe.data.rendering import Rendering, render_messages, rendering_of, without_empty
from probe.data.rows import load_rows
from probe.errors.exceptions import DataError, nearest

_MESSAGE_KEYS = ("role", "content")


def load_prompts(config: BatchConfig, tokenizer: PreTrainedTokenizerBase) -> list[PromptExample]:
    """All prompts of the configured data set and split, in its order.

    A prompt column holds texts, or lists of messages (TRL's conversational format), which go through the chat
    template. Each example's row has the reference answer under `answer` and, where the prompt was made with
    the chat template, the messages under `prompt`, so that reward functions get what they would get from TRL.

    Slices and sums of splits are written as for `datasets` (`train[:100]`). A single file is one split,
    whatever its name.

    Args:
        config: data set, columns, template and limits.
        tokenizer: renders the chat template and counts tokens.

    Raises:
        DataError: the data set, the split or a column is not there, it is empty, a prompt is empty, too long
            or not a text, or the tokenizer has no chat template where one is needed.
    """
    if config.system_prompt is not None and not config.use_chat_template:
        raise DataError("batch_config.system_prompt: expected use_chat_template: true with it, found false")
    named = named_dataset(config)
    rows = load_rows(config, named)
    prompt_column = _prompt_column(config, named, list(rows[0]))
    answer_column = _answer_column(config, named, list(rows[0]))
    examples = []
    rendering = rendering_of(config)
    for index, row in enumerate(rows):
        where = f"{config.dataset_name}, row {index}, column {prompt_column!r}"
        own = rendering.of_row(row, f"{config.dataset_name}, row {index}")
        text, messages = _render(row[prompt_column], config, named, tokenizer, where, own)
        columns = dict(row)
        if answer_column is not None:
            columns["answer"] = row[answer_column]
        if messages is not None:
            columns["prompt"] = messages
        # A chat template writes the special tokens itself.
        examples.append(PromptExample(text, columns, index, add_special_tokens=messages is None))
    from_files = (
        config.E_rollouts is not None or config.U_rollouts is not None
    )  # whose prompts may be messages
    if rendering != Rendering() and not from_files and all(e.add_special_tokens for e in examples):
        raise DataError(
            "batch_config.chat_template_kwargs, tools, continue_final_message: expected prompts that go through the "
            f"chat template with them, found texts in {config.dataset_name}; set use_chat_template: true"
        )
    if config.max_prompt_tokens is not None:
        check_prompt_tokens([_count_tokens(tokenizer, e) for e in examples], config.max_prompt_tokens)
    return examples


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages, without the empty fields that Arrow adds to make all of them alike.

    Args:
        value: what stands in the column.
        where: start of an error message.

    Raises:
        DataError: it is not a list of mappings with a text for `role` and for `content` (which a call of tools need not
            have), or it is empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a text or a list of messages, found {_brief(value)}")
    for message in value:
        # A turn that calls tools need not say anything.
        needed = (
            _MESSAGE_KEYS[:1] if isinstance(message, Mapping) and message.get("tool_calls") else _MESSAGE_KEYS
        )
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in needed):
            raise DataError(
                f"{where}: expected messages with a text as role and as content, found {_brief(message)}"
            )
    return [without_empty(message) for message in value]


def check_prompt_tokens(lengths: Sequence[int], limit: int) -> None:
    """Refuse prompts that are longer than `batch_config.max_prompt_tokens`.

    Args:
        lengths: tokens of each prompt.
        limit: the most that is allowed.

    Raises:
        DataError: one is longer; the message says how many are, and which is the longest.
    """
    longer = [index for index, length in enumerate(lengths) if length > limit]
    if longer:
        worst = max(longer, key=lambda index: lengths[index])
        raise DataError(
            f"batch_config.max_prompt_tokens: expected at most {limit} tokens, found {len(longer)} of "
            f"{len(lengths)} prompts with more (prompt {worst} has {lengths[worst]}); raise the limit or "
            "leave these prompts out"
        )


def _render(
    value: Any,
    config: BatchConfig,
    named: NamedDataset,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    rendering: Rendering,
) -> tuple[str, list[dict[str, Any]] | None]:
    """The text of a prompt, and the messages it was made from where the chat template was used."""
    template = config.prompt_template if config.prompt_template is not None else named.template
    if not isinstance(value, str):
        messages = check_messages(value, where)
        if template is not None:
            raise DataError(
                f"{where}: expected a text to put into the prompt template, found a list of messages"
            )
        if config.system_prompt is not None and messages[0]["role"] == "system":
            raise DataError(
                f"{where}: expected no system message beside batch_config.system_prompt, found one"
            )
    else:
        if not value.strip():
            raise DataError(f"{where}: expected a prompt, found an empty text")
        # Not str.format: prompts and templates may hold braces of their own.
        text = value if template is None else template.replace("{prompt}", value)
        if not config.use_chat_template:
            return text, None
        messages = [{"role": "user", "content": text}]
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return render_messages(tokenizer, messages, where, rendering), messages


def _count_tokens(tokenizer: PreTrainedTokenizerBase, example: PromptExample) -> int:
    """Number of tokens of a prompt."""
    return len(tokenizer(example.text, add_special_tokens=example.add_special_tokens)["input_ids"])


def _prompt_column(config: BatchConfig, named: NamedDataset, columns: list[str]) -> str:
    """The column with the prompts."""
    if config.prompt_column is None and named.prompt_column is None:
        for name in ("prompt", "question"):
            if name in columns:
                return name
        raise DataError(
            f"batch_config.prompt_column: expected a column prompt or question in {config.dataset_name}, "
            f"found {', '.join(columns)}; set the column's name"
        )
    return _require_column(
        "prompt_column", config.prompt_column or named.prompt_column or "", columns, config
    )


def _answer_column(config: BatchConfig, named: NamedDataset, columns: list[str]) -> str | None:
    """The column with the reference answers, None where there is none."""
    name = config.answer_column or named.answer_column
    if name is None:
        return "answer" if "answer" in columns else None
    return _require_column("answer_column", name, columns, config)


def _require_column(key: str, name: str, columns: list[str], config: BatchConfig) -> str:
    """A column's name, if it is there."""
    if name not in columns:
        raise DataError(
            f"batch_config.{key}: expected a column {name!r} in {config.dataset_name}, found "
            f"{', '.join(columns)}{nearest(name, columns)}"
        )
    return name


def _brief(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
