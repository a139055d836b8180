"""What a trainer of TRL's does with prompts and with the distribution it samples from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from probe.data.batch import PromptExample, RolloutBatch
from probe.errors.exceptions import DataError, in_words_of
from probe.from_checkpoint.fill import config_of_trainer
from probe.from_checkpoint.sampling_options import NEUTRAL_SAMPLING, changed_ends, changed_sampling
from probe.live.attribution import HostUpdate
from probe.live.prompts import few_of, prompt_examples
from probe.live.say import say
from probe.phases.update import loss_settings
from probe.rollouts.recording import update_rows
from probe.scoring.policy import Policy
from probe.text import error_text

IMAGES = ("image", "images")
"""Columns that TRL puts into prompts as pictures."""


def sampling_changes(trainer: Any) -> dict[str, Any]:
    """The options that make the trainer's sampling another distribution than softmax(logits / temperature).

    Args:
        trainer: with `args` of GRPO's kind; `generation_kwargs` there and the trainer's `generation_config` count too.

    Returns:
        Values by name; empty where the trainer samples from the policy itself, or not at all.
    """
    args = trainer.args
    if getattr(args, "max_completion_length", None) is None:
        return {}
    given = {name: getattr(args, name, None) for name in NEUTRAL_SAMPLING}
    kwargs = getattr(args, "generation_kwargs", None)
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    config = getattr(trainer, "generation_config", None)
    effective = {} if config is None else {name: getattr(config, name, None) for name in NEUTRAL_SAMPLING}
    # GRPO's own options and its keyword arguments are in the configuration already, unless another engine samples
    merged = {**given, **{name: x for name, x in effective.items() if x is not None}, **kwargs}
    changes = changed_sampling(merged) | changed_ends(kwargs, getattr(args, "max_completion_length", None))
    if "temperature" in kwargs and kwargs["temperature"] != getattr(args, "temperature", None):
        changes["temperature"] = kwargs["temperature"]
    return changes


def trainer_prompts(trainer: Any, prompts: Iterable[Any], tokenizer: Any, seed: int) -> list[PromptExample]:
    """The prompts as the trainer itself gives them to the policy.

    Trainers of TRL that sample have a tokenisation of their own, with tools, processors, content in parts and options
    of the chat template; E's prompts go through it one by one. Those that it cannot turn into text alone (pictures)
    are left out, and it is said how many.

    Args:
        trainer: any transformers trainer.
        prompts: texts, message lists, examples, or rows with a column `prompt`.
        tokenizer: for trainers without a tokenisation of their own.
        seed: of the draw where there are many prompts.

    Raises:
        DataError: none of the prompts can be used.
    """
    encode = getattr(trainer, "_tokenize_prompts", None)
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        return prompt_examples(prompts, tokenizer, seed)  # which says what is wrong
    examples: list[PromptExample] = []
    failed: list[str] = []
    for index, prompt in enumerate(few_of(prompts, seed)):
        try:
            with in_words_of("training"):
                if isinstance(prompt, PromptExample) or not callable(encode):
                    examples += prompt_examples([prompt], tokenizer, seed)
                else:
                    examples.append(_encoded(trainer, encode, prompt, tokenizer, index))
        except Exception as error:  # chat templates are programs: they raise what they like
            failed.append(f"prompts[{index}]: {error_text(error)}")
    if not examples:
        reason = failed[0] if failed else "there are none"
        raise DataError(
            f"prompts: expected at least one that can be given to the policy as text, found none ({reason}); give "
            "the probe prompts of its own: EntropyProbeTrainerCallback(trainer, prompts=[...])"
        )
    if failed:
        say(f"{len(failed)} of {len(failed) + len(examples)} prompts are left out ({failed[0]})", warn=True)
    if getattr(trainer, "tools", None):
        say(
            "the trainer's rollouts call tools; responses of E end where the first call would be answered",
            warn=True,
        )
    return examples


def _encoded(trainer: Any, encode: Any, prompt: Any, tokenizer: Any, index: int) -> PromptExample:
    """A prompt by the trainer's own tokenisation.

    Raises:
        DataError: it is empty, or has pictures in it.
    """
    row = dict(prompt) if isinstance(prompt, Mapping) else {}
    if isinstance(prompt, Mapping):
        if any(row.get(name) not in (None, []) for name in IMAGES):
            raise DataError("expected a prompt of text alone, found one with pictures")
        if "prompt" not in row:
            raise DataError(f"expected a column `prompt`, found {', '.join(map(str, row))}")
        prompt = row["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError("expected a prompt, found an empty text")
    if getattr(trainer, "environment_factories", None) is not None:
        raise DataError("expected a prompt of the data's own, found a trainer whose environments complete it")
    answer = encode([prompt])
    ids, pictures = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, None)
    if pictures is not None:
        raise DataError("expected a prompt of text alone, found one with pictures")
    numbers = tuple(int(i) for i in ids[0])
    if not numbers:
        raise DataError("expected at least one token, found none")
    return PromptExample(tokenizer.decode(list(numbers)), row, index, False, numbers)


def trainer_update(trainer: Any, policy: Policy) -> HostUpdate:
    """The batch that a GRPO training's present update is made from, of this process, with its loss.

    Args:
        trainer: TRL's GRPOTrainer, about to take the optimizer's step, or having just taken it.
        policy: that it trains.

    Raises:
        ProbeError: its loss is another one than the probe's.
        ValueError: the rollouts cannot be told, or have tokens that were not sampled.
    """
    rows = update_rows(trainer, 1, also=("ref_logprobs",))
    loss = loss_settings(policy, config_of_trainer(vars(trainer.args)))
    mask = _padded(rows, "completion_ids", torch.int64, -1) >= 0
    batch = RolloutBatch(
        prompts=tuple(row["prompt"] for row in rows),
        completions=tuple(row["completion"] for row in rows),
        prompt_ids=tuple(tuple(row["prompt_ids"]) for row in rows),
        completion_ids=_padded(rows, "completion_ids", torch.int64),
        mask=mask,
        truncated=torch.tensor([row["truncated"] for row in rows]),
        group=torch.tensor([row["group"] for row in rows]),
        advantages=torch.tensor([row["advantage"] for row in rows], dtype=torch.float64),
        old_logprobs=_numbers(rows, "old_logprobs"),
        sampling_logprobs=_numbers(rows, "sampling_logprobs"),
        loss_tokens=rows[0].get("loss_tokens"),
        source="the trainer's own",
    )
    return HostUpdate(batch, loss, _numbers(rows, "ref_logprobs"))


def _numbers(rows: list[dict[str, Any]], name: str) -> Tensor | None:
    """A column of numbers per token, `(B, T)` float64; None where the rows do not have it."""
    return _padded(rows, name, torch.float64) if name in rows[0] else None


def _padded(rows: list[dict[str, Any]], name: str, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """A column of lists as `(B, T)`; NaN for null."""
    values = [
        torch.tensor([float("nan") if x is None else x for x in row[name]], dtype=dtype) for row in rows
    ]
    return pad_sequence(values, batch_first=True, padding_value=fill)
