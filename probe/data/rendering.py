"""Conversations as texts: the tokenizer's chat template with the options, tools and continuation of a training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from probe.config.batches import BatchConfig
from probe.errors.exceptions import DataError
from probe.errors.remedies import Remedy
from probe.imports import UserImportError, import_module
from probe.limits import TEMPLATE_SECONDS, time_limit
from probe.text import all_well_formed, error_text, shown

_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"} | {
    "raise_exception",
    "strftime_now",
}
"""What `apply_chat_template` itself gives to a template."""
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""Tags of transformers' own, which mark what the assistant says."""


@dataclass(frozen=True)
class Rendering:
    """How a chat template is applied.

    Attributes:
        options: further arguments of the template (`enable_thinking`, ...); None where nothing is known of them.
        tools: functions or JSON schemas that the template describes; None where there are none.
        continue_final_message: whether a conversation that ends with a message of the assistant is continued inside of
            it; None where nothing says, which continues it.
    """

    options: Mapping[str, Any] | None = None
    tools: tuple[Any, ...] | None = None
    continue_final_message: bool | None = None

    def is_certain(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> bool:
        """Whether a conversation that was rendered elsewhere has only this rendering, as far as anything says.

        It may have others where its template has options of its own and none are given, and where it ends with a
        message of the assistant and nothing says whether that was continued.
        """
        if messages[-1]["role"] == "assistant" and self.continue_final_message is None:
            return False
        return self.options is not None or not template_options(str(tokenizer.chat_template))

    def of_row(self, row: Mapping[str, Any], where: str) -> Rendering:
        """The rendering of one row: its columns `chat_template_kwargs` and `tools` come before the configuration's.

        Args:
            row: of the data set, or of a rollout table.
            where: start of an error message.

        Raises:
            DataError: a column holds something else.
        """
        options = _plain(row.get("chat_template_kwargs"), f"{where}, chat_template_kwargs")
        tools = _plain(row.get("tools"), f"{where}, tools")
        found = self
        if options is not None:
            if not isinstance(options, dict):
                raise DataError(
                    f"{where}, chat_template_kwargs: expected a mapping of template options, found {shown(options)}"
                )
            found = replace(found, options={**(self.options or {}), **options})
        if tools is not None:
            if isinstance(tools, list):
                tools = [_plain(tool, f"{where}, tools") if isinstance(tool, str) else tool for tool in tools]
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise DataError(f"{where}, tools: expected a list of JSON schemas, found {shown(tools)}")
            found = replace(found, tools=tuple(tools) or None)
        return found


def rendering_of(config: BatchConfig) -> Rendering:
    """The rendering that a configuration asks for.

    Raises:
        DataError: a tool cannot be imported.
    """
    tools = None if not config.tools else tuple(_tool(tool) for tool in config.tools)
    return Rendering(config.chat_template_kwargs, tools, config.continue_final_message)


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    rendering: Rendering | None = None,
) -> str:
    """The text of a conversation up to the point where the policy goes on.

    A conversation that ends with a message of the assistant is continued inside that message, as TRL's
    `apply_chat_template` does it, unless `continue_final_message` is false; any other is followed by the start of the
    assistant's turn.

    Args:
        tokenizer: has the chat template.
        messages: each with `role` and `content`, both texts.
        where: start of an error message.
        rendering: options and tools of the template; by default none.

    Raises:
        DataError: there is no chat template, or it refuses the messages.
    """
    rendering = Rendering() if rendering is None else rendering
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: expected a tokenizer with a chat template, found none; ",
            Remedy.PROMPTS_AS_TEXTS,
        )
    prefilled = messages[-1]["role"] == "assistant" and rendering.continue_final_message is not False
    endless = DataError(
        f"{where}: expected a chat template that is done within {TEMPLATE_SECONDS:g} seconds, found one that is not; "
        "use another tokenizer (",
        Remedy.TOKENIZER,
        "), or set use_chat_template: false",
    )
    try:
        with time_limit(TEMPLATE_SECONDS, endless):
            text = tokenizer.apply_chat_template(
                messages,
                tools=None if rendering.tools is None else list(rendering.tools),
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                **(rendering.options or {}),
            )
    except DataError:
        raise
    except Exception as error:  # templates are programs: they raise what they like
        root = error.__cause__ or error
        reason = f"{type(root).__name__}: {' '.join(str(root).split())[:300]}"
        raise DataError(f"{where}: the chat template failed with {reason}") from error
    return str(text)


@cache
def template_options(template: str) -> tuple[str, ...]:
    """The names of options that a chat template has beside what every template is given.

    >>> template_options("{% if enable_thinking %}{{ messages[0]['content'] + bos_token }}{% endif %}")
    ('enable_thinking',)
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except TemplateError:
        return ()
    found = meta.find_undeclared_variables(parsed) - set(environment.globals)
    return tuple(sorted(name for name in found if name not in _GIVEN and not name.endswith("_token")))


def _plain(value: Any, where: str) -> Any:
    """A value of JSON, parsed where it is a text, without the empty fields that Arrow adds to make all rows alike."""
    if isinstance(value, str):
        try:
            value = all_well_formed(json.loads(value))
        except ValueError as error:
            raise DataError(f"{where}: expected JSON, found {value[:60]!r} ({error})") from error
    return without_empty(value)


def without_empty(value: Any) -> Any:
    """A value of JSON without the empty fields that Arrow adds to make all rows alike."""
    if isinstance(value, Mapping):
        return {name: without_empty(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_empty(part) for part in value]
    return value


def _tool(tool: Any) -> Any:
    """A tool of the configuration: a JSON schema as it is, or the function that `module:function` names."""
    if isinstance(tool, Mapping) or callable(tool):
        return tool
    module_name, _, name = str(tool).partition(":")
    try:
        function = getattr(import_module(module_name), name) if module_name and name else None
    except (UserImportError, AttributeError) as error:
        raise DataError(f"batch_config.tools: {error_text(error)}") from error
    if not callable(function):
        raise DataError(
            f"batch_config.tools: expected JSON schemas or module:function, found {shown(tool)} of type "
            f"{type(tool).__name__}"
        )
    return function
