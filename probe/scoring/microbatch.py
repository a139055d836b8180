"""Microbatches: teacher-forced inputs of a few sequences, in an order that keeps padding small."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence: Tensor
    position: Tensor
    row: Tensor
    column: Tensor
    labels: Tensor
    size: int


def microbatches(batch: RolloutBatch, size: int, device: torch.device) -> Iterator[MicroBatch]:
    """Yield the sequences of `batch` in microbatches of `size`, longest first; empty responses are left out.

    The split depends on the lengths only, so that two passes over the same batch see the same shapes, which is
    what makes the arithmetic of rescoring cancel.
    """
    lengths = batch.lengths
    totals = torch.tensor([len(ids) for ids in batch.prompt_ids]) + lengths
    order = torch.argsort(totals, descending=True, stable=True)
    order = order[lengths[order] > 0]
    for start in range(0, len(order), size):
        yield collate(batch, order[start : start + size].tolist(), device)


def first_microbatch(batch: RolloutBatch, size: int) -> RolloutBatch:
    """The first `size` sequences whose responses are not empty: enough for a check, or the choice of a step size."""
    return batch.subset(torch.nonzero(batch.lengths > 0).flatten()[:size])


def collate(batch: RolloutBatch, indices: list[int], device: torch.device) -> MicroBatch:
    """Build the microbatch of the sequences `indices`, whose responses are not empty.

    Raises:
        ValueError: a prompt has no token, so that nothing predicts the first response token.
    """
    rows, columns, sequences, positions, labels, inputs = [], [], [], [], [], []
    lengths = batch.mask[indices].sum(dim=1).tolist()
    for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
        prompt = batch.prompt_ids[i]
        if not prompt:
            raise ValueError(f"prompt {i}: expected at least one token (a BOS at least), found none")
        response = batch.completion_ids[i, :length]
        inputs.append(torch.cat([torch.tensor(prompt, dtype=torch.int64), response[:-1]]))
        steps = torch.arange(length)
        rows.append(torch.full((length,), row))
        columns.append(steps + len(prompt) - 1)
        sequences.append(torch.full((length,), i))
        positions.append(steps)
        labels.append(response)
    widest = max(len(ids) for ids in inputs)
    input_ids = torch.zeros(len(indices), widest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return MicroBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        sequence=torch.cat(sequences),
        position=torch.cat(positions),
        row=torch.cat(rows),
        column=torch.cat(columns),
        labels=torch.cat(labels),
        size=len(indices),
    )
