"""The rollout batch: what was sampled (or read from a file), before it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PromptExample:
    """One prompt of a data set.

    Attributes:
        text: the prompt after template and chat template; it is tokenised as it is.
        row: all columns of the data set's row, for rewards (the reference answer stands under `answer`).
        index: position in the data set.
        add_special_tokens: whether the tokenizer adds its own (BOS); false after a chat template, which has them.
        ids: token ids, where they are known already: then `text` is only for reading.
    """

    text: str
    row: Mapping[str, Any]
    index: int
    add_special_tokens: bool = True
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RolloutBatch:
    """`B` responses of at most `T` tokens, right-padded; all tensors on the CPU.

    Attributes:
        prompts: the prompt texts, length `B`.
        completions: the response texts, length `B`.
        prompt_ids: the prompt token ids, ragged, length `B`.
        completion_ids: response token ids, `(B, T)` int64; entries outside `mask` mean nothing.
        mask: `(B, T)` bool, true where the policy itself sampled the token (the EOS that ends a response included,
            padding and forced tokens excluded). Each row is a run of true followed by false.
        truncated: `(B,)` bool, true where the cap on tokens ended the response.
        group: `(B,)` int64, equal for responses of the same draw of a prompt (a GRPO group).
        rewards: `(B,)` float64, NaN where no reward applies, or None.
        advantages: `(B,)` float64, or None.
        old_logprobs: `(B, T)` float64 log-probs under the policy that sampled, for the PPO ratio, or None.
        sampling_logprobs: `(B, T)` float64, those that the engine which sampled gave, NaN where it gave none, or None.
        rows: the data-set rows the prompts came from, length `B` (empty mappings where unknown).
        source: `sampled`, or the path of the file.
        bias_flags: reasons why numbers from this batch are biased (`truncated_support`, `retokenized`, ...).
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    completion_ids: Tensor
    mask: Tensor
    truncated: Tensor
    group: Tensor
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    source: str = "sampled"
    bias_flags: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        B, T = self.completion_ids.shape
        found = {
            "prompts": len(self.prompts),
            "completions": len(self.completions),
            "prompt_ids": len(self.prompt_ids),
            "mask": tuple(self.mask.shape),
            "truncated": tuple(self.truncated.shape),
            "group": tuple(self.group.shape),
        }
        expected = {
            "prompts": B,
            "completions": B,
            "prompt_ids": B,
            "mask": (B, T),
            "truncated": (B,),
            "group": (B,),
        }
        wrong = [f"{name} {found[name]}" for name in expected if found[name] != expected[name]]
        if wrong:
            raise ValueError(f"a rollout batch of completion_ids {(B, T)} does not fit: {', '.join(wrong)}")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise ValueError("mask: expected each row to be a run of true followed by false, found a gap")

    def __len__(self) -> int:
        """The number of sequences, `B`."""
        return int(self.completion_ids.shape[0])

    @property
    def lengths(self) -> Tensor:
        """Response lengths `T_i` in tokens, `(B,)` int64."""
        return self.mask.sum(dim=1)

    def subset(self, indices: Tensor) -> RolloutBatch:
        """The batch of the sequences `indices`, `(n,)` int64, repetitions allowed."""
        take = indices.tolist()
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[indices]
            for name in (
                "completion_ids",
                "mask",
                "truncated",
                "group",
                "rewards",
                "advantages",
                "old_logprobs",
                "sampling_logprobs",
            )
        }
        for name in ("prompts", "completions", "prompt_ids"):
            parts[name] = tuple(getattr(self, name)[i] for i in take)
        parts["rows"] = tuple(self.rows[i] for i in take) if self.rows else ()
        return replace(self, **parts)
