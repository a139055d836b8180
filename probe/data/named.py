"""Data sets that are known by name."""

from __future__ import annotations

from dataclasses import dataclass

from probe.config.batches import BatchConfig
from probe.data import arithmetic
from probe.errors.exceptions import DataError

R1_TEMPLATE = (
    "Work on the question below in two parts. Put your reasoning between <think> and </think>, and then only "
    "the final result between <answer> and </answer>.\n\nQuestion: {prompt}\n\nResponse:\n"
)
"""Asks for reasoning and result in tags of their own; it reads the same with and without a chat template."""


@dataclass(frozen=True)
class NamedDataset:
    """What a data set's name stands for.

    Attributes:
        source: hub id, or None where the rows are built in.
        config: configuration of the hub data set.
        prompt_column: column with the prompt; None where it is looked for (`prompt`, then `question`).
        answer_column: column with the reference answer; None where it is `answer`, if there is one.
        template: text in which `{prompt}` is replaced, or None to take the column as it is.
        reward: what `batch_config.reward` is when it is not set; empty where there is none.
    """

    source: str | None
    config: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    template: str | None = None
    reward: tuple[str, ...] = ()


NAMED_DATASETS: dict[str, NamedDataset] = {
    "gsm8k_r1_template": NamedDataset(
        "openai/gsm8k", "main", "question", "answer", R1_TEMPLATE, ("gsm8k", "tag_format")
    ),
    "gsm8k": NamedDataset(
        "openai/gsm8k", "main", "question", "answer", "Question: {prompt}\nAnswer:", ("gsm8k",)
    ),
    "arithmetic": NamedDataset(
        None, None, "question", "answer", arithmetic.PROMPT_TEMPLATE, ("exact_number",)
    ),
}
"""The data sets with a name of their own; every other name is a hub id or a local file."""


def default_reward(config: BatchConfig) -> str | list[str]:
    """The reward that a configuration asks for: `batch_config.reward`, else the named data set's own.

    Raises:
        DataError: neither is there.

    >>> default_reward(BatchConfig(dataset_name="gsm8k_r1_template"))
    ['gsm8k', 'tag_format']
    """
    if config.reward is not None:
        return config.reward
    own = named_dataset(config).reward
    if not own:
        raise DataError(
            f"batch_config.reward: expected a reward, as data set {config.dataset_name!r} has none of its "
            "own, found none; set it to exact_number, tag_format, gsm8k or module:function"
        )
    return list(own) if len(own) > 1 else own[0]


def named_dataset(config: BatchConfig) -> NamedDataset:
    """What the data set's name stands for."""
    name = config.dataset_name
    return NAMED_DATASETS.get(name, NamedDataset(name))
