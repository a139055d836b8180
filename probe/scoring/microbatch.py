"""Microbatches: teacher-forced inputs of a few sequences, in an order that keeps padding small."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from probe.data.batch import RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """`b` sequences, right-padded to `L`; `n` response tokens in all.

    Attributes:
        input_ids: prompt and response without its last token (which predicts nothing), `(b, L)`.
        attention_mask: `(b, L)` int64.
        sequence: index in the rollout batch of each response token, `(n,)`, CPU.
        position: position `t` in the response of each response token, `(n,)`, CPU.
        row: microbatch row whose hidden state predicts the token, `(n,)`, CPU.
        column: `prompt_len - 1 + t`, the position of that hidden state, `(n,)`, CPU.
        labels: the response tokens, `(n,)`, CPU.
        size: `b`.
        useful: positions that are no padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence: Tensor
    position: Tensor
    row: Tensor
    column: Tensor
    labels: Tensor
    size: int
    useful: int

    @property
    def padded(self) -> int:
        """`b L`."""
        return self.input_ids.numel()


START = 1 / 16
"""What it costs to put a microbatch through a model at all, as a share of a full one: where a budget is large enough,
twice of it brings little, so that this share is small."""


def split(batch: RolloutBatch, sequences: int | None, tokens: int | None) -> list[list[int]]:
    """The sequences of each microbatch, longest first; empty responses are left out.

    With a budget of tokens, the split of all that keep to it with the least padding, a microbatch's own cost counted
    (`START`). It depends on the lengths only, so that two passes over the same batch see the same shapes, which is what
    makes the arithmetic of rescoring cancel.

    Args:
        batch: any.
        sequences: most sequences of a microbatch; None for any number.
        tokens: most positions, padding included; a sequence that is longer is alone. None for any number.
    """
    inputs = input_lengths(batch)
    order = torch.argsort(inputs, descending=True, stable=True)
    order = order[batch.lengths[order] > 0]
    indices, longest = order.tolist(), inputs[order].tolist()
    if tokens is None:
        size = sequences or max(len(indices), 1)
        sizes = [size] * -(-len(indices) // size)
    else:
        sizes = _least_work(
            longest, [at_a_time(length, sequences, tokens) or 1 for length in longest], tokens
        )
    ends = np.cumsum([0, *sizes]).tolist()
    return [indices[start:end] for start, end in pairwise(ends)]


def input_lengths(batch: RolloutBatch) -> Tensor:
    """Positions that each sequence takes in a model, `(B,)`: the last token predicts nothing."""
    return torch.tensor([len(ids) for ids in batch.prompt_ids]) + batch.lengths - 1


def _least_work(longest: list[int], most: list[int], tokens: int) -> list[int]:
    """Sizes of the microbatches that sequences in falling order of length are cut into.

    The best cut of those from `i` on begins with `s` sequences, which cost `s longest[i]` and a start, and goes on with
    the best cut of those from `i + s` on: the least of these sums, for every `i` from the last to the first.

    Args:
        longest: positions of each sequence, falling.
        most: sequences of the largest microbatch that begins with each.
        tokens: of a full microbatch.
    """
    rest = np.zeros(len(longest) + 1)
    size = [0] * len(longest)
    for i in reversed(range(len(longest))):
        reach = min(most[i], len(longest) - i)
        costs = longest[i] * np.arange(1, reach + 1) + rest[i + 1 : i + reach + 1]
        size[i] = 1 + int(costs.argmin())
        rest[i] = costs[size[i] - 1] + START * tokens
    sizes, at = [], 0
    while at < len(longest):
        sizes.append(size[at])
        at += size[at]
    return sizes


def at_a_time(length: int, sequences: int | None, tokens: int | None) -> int | None:
    """How many sequences of so many positions go through the model at a time; None for any number. See `split`.

    >>> at_a_time(30, None, 64), at_a_time(100, 8, 64), at_a_time(10, 2, None)
    (2, 1, 2)
    """
    limits = (sequences, None if tokens is None else max(tokens // max(length, 1), 1))
    return min((limit for limit in limits if limit is not None), default=None)


def collate(batch: RolloutBatch, indices: list[int], device: torch.device) -> MicroBatch:
    """Build the microbatch of the sequences `indices`, whose responses are not empty.

    Raises:
        ValueError: a prompt has no token, so that nothing predicts the first response token.
    """
    rows, prompts = torch.tensor(indices), [batch.prompt_ids[i] for i in indices]
    if not all(prompts):
        empty = next(i for i, prompt in zip(indices, prompts, strict=True) if not prompt)
        raise ValueError(f"prompt {empty}: expected at least one token (a BOS at least), found none")
    responses, lengths = batch.completion_ids[rows], batch.mask[rows].sum(dim=1)
    before = torch.tensor([len(prompt) for prompt in prompts])
    inputs = before + lengths - 1  # the last token predicts nothing
    columns = torch.arange(int(inputs.max()))
    attention_mask = columns < inputs.unsqueeze(1)
    input_ids = torch.zeros(attention_mask.shape, dtype=torch.int64)
    input_ids[columns < before.unsqueeze(1)] = torch.tensor([token for prompt in prompts for token in prompt])
    row, position = (torch.arange(responses.shape[1]) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    labels, column = responses[row, position], before[row] - 1 + position
    goes_in = position < lengths[row] - 1
    input_ids[row[goes_in], column[goes_in] + 1] = labels[goes_in]
    return MicroBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.long().to(device),
        sequence=rows[row],
        position=position,
        row=row,
        column=column,
        labels=labels,
        size=len(indices),
        useful=int(inputs.sum()),
    )
