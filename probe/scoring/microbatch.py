"""Microbatches: teacher-forced inputs of a few sequences, in an order that keeps padding small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.scoring.prompts import SHARE, Prompts, distinct, shared_prompts


@dataclass(frozen=True)
class MicroBatch:
    """`b` sequences, right-padded to `L`; `n` response tokens in all.

    Attributes:
        input_ids: prompt and response without its last token (which predicts nothing), `(b, L)`; where prompts are
            shared from the prompt's last token on.
        attention_mask: `(b, L)` int64.
        prompts: where they are shared, without their last tokens.
        sequence: index in the rollout batch of each response token, `(n,)`, CPU.
        position: position `t` in the response of each response token, `(n,)`, CPU.
        row: microbatch row whose hidden state predicts the token, `(n,)`, CPU.
        column: the column of `input_ids` that it stands at, `(n,)`, CPU.
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
    prompts: Prompts | None = None

    @property
    def padded(self) -> int:
        """Positions that go through the model: `b L`, and those of shared prompts."""
        return self.input_ids.numel() + (0 if self.prompts is None else self.prompts.input_ids.numel())


START = 1 / 16
"""What it costs to put a microbatch through a model at all, as a share of a full one: where a budget is large enough,
twice of it brings little, so that this share is small."""


UNSHARED = 4
"""Positions without sharing that a budget of one with it may hold: a shared prompt's keys and values are there for each
of its responses, some hundredths of what a position takes otherwise."""


def split(
    batch: RolloutBatch, sequences: int | None, tokens: int | None, share: bool = False
) -> list[list[int]]:
    """The sequences of each microbatch, longest first; empty responses are left out.

    With a budget of tokens, the split of all that keep to it with the least work, a microbatch's own cost counted
    (`START`). With `share`, sequences of one prompt stand together where that is less work. The split depends on the
    lengths and on which prompts are the same only, so that two passes over the same batch see the same shapes, which
    is what makes the arithmetic of rescoring cancel.

    Args:
        batch: any.
        sequences: most sequences of a microbatch; None for any number.
        tokens: most positions, padding included; a sequence that is longer is alone. None for any number.
        share: whether prompts go through the model once for all of their responses; see `worth_sharing`.
    """
    inputs = input_lengths(batch)
    order = torch.argsort(inputs, descending=True, stable=True)
    indices = order[batch.lengths[order] > 0].tolist()
    if tokens is None:
        size = sequences or max(len(indices), 1)
        sizes = [size] * -(-len(indices) // size)
        return _cut(indices, sizes)
    lengths = _Lengths.of(batch)
    orders = [indices]
    if share:
        orders.append(lengths.with_prompts_together(indices))
    cuts = [_least_work(lengths.at(order), sequences, tokens, share) for order in orders]
    best = min(range(len(cuts)), key=lambda k: (cuts[k][0], k))
    return _cut(orders[best], cuts[best][1])


def _cut(indices: list[int], sizes: list[int]) -> list[list[int]]:
    """The indices in parts of these sizes."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [indices[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True)
class _Lengths:
    """Of sequences, in some order.

    Attributes:
        prompt: number of its prompt, the same for sequences that share one.
        before: positions of the prompt without its last token.
        after: those from there on.
        last: the place before where its prompt was last; -1 where there is none.
    """

    prompt: np.ndarray[Any, Any]
    before: np.ndarray[Any, Any]
    after: np.ndarray[Any, Any]
    last: np.ndarray[Any, Any]

    @classmethod
    def of(cls, batch: RolloutBatch) -> _Lengths:
        """Of a batch, in its order."""
        return cls._of_all(batch.prompt_ids, batch.lengths.tolist())

    @classmethod
    def of_some(cls, batch: RolloutBatch, indices: list[int]) -> _Lengths:
        """Of some sequences of a batch, in the order given."""
        return cls._of_all(
            [batch.prompt_ids[i] for i in indices], batch.lengths[torch.tensor(indices)].tolist()
        )

    @classmethod
    def _of_all(cls, prompts: Sequence[tuple[int, ...]], after: list[int]) -> _Lengths:
        """Of prompts and the lengths of their responses."""
        before = np.array([len(ids) - 1 for ids in prompts])
        return cls._in_order(np.array(distinct(prompts)[1]), before, np.array(after))

    @classmethod
    def _in_order(cls, prompt: Any, before: Any, after: Any) -> _Lengths:
        """With the places of prompts."""
        last, places = np.empty(len(prompt), dtype=np.int64), dict[int, int]()
        for place, number in enumerate(prompt.tolist()):
            last[place] = places.get(number, -1)
            places[number] = place
        return cls(prompt, before, after, last)

    def at(self, order: list[int]) -> _Lengths:
        """In another order."""
        return _Lengths._in_order(self.prompt[order], self.before[order], self.after[order])

    def with_prompts_together(self, indices: list[int]) -> list[int]:
        """The sequences of one prompt beside each other: the prompts with the longest first, and so their sequences."""
        longest = np.zeros(self.prompt.max() + 1, dtype=np.int64)
        np.maximum.at(longest, self.prompt[indices], self.after[indices])
        return sorted(indices, key=lambda i: (-longest[self.prompt[i]], self.prompt[i], -self.after[i], i))

    def work(self, start: int, end: int, share: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Positions of the microbatches that begin at `start` and end at each place up to `end`, `(end - start,)`.

        Returns:
            With prompts shared where that is less work, and without.
        """
        count = np.arange(1, end - start + 1)
        before, after = self.before[start:end], self.after[start:end]
        plain = count * np.maximum.accumulate(before + after)
        if not share:
            return plain, plain
        first = self.last[start:end] < start
        shared = np.cumsum(first) * np.maximum.accumulate(before) + count * np.maximum.accumulate(after)
        return np.where(shared <= SHARE * plain, shared, plain), plain


def input_lengths(batch: RolloutBatch) -> Tensor:
    """Positions that each sequence takes in a model, `(B,)`: the last token predicts nothing."""
    return torch.tensor([len(ids) for ids in batch.prompt_ids]) + batch.lengths - 1


def _least_work(
    lengths: _Lengths, sequences: int | None, tokens: int, share: bool
) -> tuple[float, list[int]]:
    """Work and sizes of the microbatches that sequences, in this order, are cut into.

    The best cut of those from `i` on begins with `s` sequences, which cost their positions and a start, and goes on
    with the best cut of those from `i + s` on: the least of these sums, for every `i` from the last to the first.

    Args:
        lengths: in the order that is cut.
        sequences: most of a microbatch; None for any number.
        tokens: of a full microbatch.
        share: whether prompts go through the model once for all of their responses.
    """
    count = len(lengths.after)
    shortest = np.minimum.accumulate(lengths.after[::-1])[::-1]
    rest = np.zeros(count + 1)
    size = [0] * count
    for i in reversed(range(count)):
        least = int(shortest[i]) if share else int(lengths.before[i] + lengths.after[i])
        reach = min(count - i, max(tokens // max(least, 1), 1), sequences or count)
        positions, unshared = lengths.work(i, i + reach, share)
        fits = (positions <= tokens) & (unshared <= UNSHARED * tokens)
        fits[0] = True  # a sequence that is longer is alone
        costs = np.where(fits, positions + rest[i + 1 : i + reach + 1], np.inf)
        size[i] = 1 + int(costs.argmin())
        rest[i] = costs[size[i] - 1] + START * tokens
    sizes, at = [], 0
    while at < count:
        sizes.append(size[at])
        at += size[at]
    return float(rest[0]), sizes


def at_a_time(length: int, sequences: int | None, tokens: int | None) -> int | None:
    """How many sequences of so many positions go through the model at a time; None for any number. See `split`.

    >>> at_a_time(30, None, 64), at_a_time(100, 8, 64), at_a_time(10, 2, None)
    (2, 1, 2)
    """
    limits = (sequences, None if tokens is None else max(tokens // max(length, 1), 1))
    return min((limit for limit in limits if limit is not None), default=None)


def collate(batch: RolloutBatch, indices: list[int], device: torch.device, share: bool = False) -> MicroBatch:
    """Build the microbatch of the sequences `indices`, whose responses are not empty.

    Args:
        batch: that they are of.
        indices: of its sequences.
        device: of the inputs.
        share: whether prompts go through the model once for all of their responses, where that is less work.

    Raises:
        ValueError: a prompt has no token, so that nothing predicts the first response token.
    """
    rows, prompts = torch.tensor(indices), [batch.prompt_ids[i] for i in indices]
    if not all(prompts):
        empty = next(i for i, prompt in zip(indices, prompts, strict=True) if not prompt)
        raise ValueError(f"prompt {empty}: expected at least one token (a BOS at least), found none")
    responses, lengths = batch.completion_ids[rows], batch.mask[rows].sum(dim=1)
    together = None
    if share and _shares(batch, indices):
        each, of = distinct(prompts)
        together = shared_prompts(each, of, device)
        prompts = [prompt[-1:] for prompt in prompts]
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
        useful=int(inputs.sum()) + (0 if together is None else int(together.attention_mask.sum())),
        prompts=together,
    )


def worth_sharing(batch: RolloutBatch) -> bool:
    """Whether enough prompts have several responses that putting them through the model once can be less work."""
    once = {ids: len(ids) - 1 for ids in batch.prompt_ids}
    after = int(batch.lengths.sum())
    whole = sum(len(ids) - 1 for ids in batch.prompt_ids) + after
    return min(once.values(), default=0) > 0 and sum(once.values()) + after <= SHARE * whole


def _shares(batch: RolloutBatch, indices: list[int]) -> bool:
    """Whether it is less work to put the prompts of these sequences through the model once."""
    shared, plain = _Lengths.of_some(batch, indices).work(0, len(indices), True)
    return bool(shared[-1] < plain[-1])


def positions(batch: RolloutBatch, indices: list[int], share: bool) -> int:
    """Positions of the microbatch of these sequences, padding included."""
    return int(_Lengths.of_some(batch, indices).work(0, len(indices), share)[0][-1])
