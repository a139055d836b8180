"""Microbatches: teacher-forced inputs of a few sequences, in an order that keeps padding small."""

from __future__ import annotations

from dataclasses import dataclass

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


def split(batch: RolloutBatch, sequences: int | None, tokens: int | None) -> list[list[int]]:
    """The sequences of each microbatch, longest first; empty responses are left out.

    The split depends on the lengths only, so that two passes over the same batch see the same shapes, which is
    what makes the arithmetic of rescoring cancel.

    Args:
        batch: any.
        sequences: most sequences of a microbatch; None for any number.
        tokens: most positions, padding included; a sequence that is longer is alone. None for any number.
    """
    lengths = batch.lengths
    totals = torch.tensor([len(ids) for ids in batch.prompt_ids]) + lengths
    order = torch.argsort(totals, descending=True, stable=True)
    order = order[lengths[order] > 0]
    indices, longest = order.tolist(), (totals[order] - 1).tolist()
    found, start = [], 0
    while start < len(indices):
        size = at_a_time(longest[start], sequences, tokens) or len(indices)
        found.append(indices[start : start + size])
        start += size
    return found


def at_a_time(length: int, sequences: int | None, tokens: int | None) -> int | None:
    """How many sequences of so many positions go through the model at a time; None for any number. See `split`.

    >>> at_a_time(30, None, 64), at_a_time(100, 8, 64), at_a_time(10, 2, None)
    (2, 1, 2)
    """
    limits = (sequences, None if tokens is None else max(tokens // length, 1))
    return min((limit for limit in limits if limit is not None), default=None)


def first_microbatch(batch: RolloutBatch, size: int) -> RolloutBatch:
    """The first `size` sequences whose responses are not empty: enough for a check, or the choice of a step size."""
    return batch.subset(torch.nonzero(batch.lengths > 0).flatten()[:size])


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
