"""Responses on their way to their ends, by `generate`: what goes on of several batches goes on together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from probe.config.batches import GenerationConfig
from probe.rollouts.generation import left_padded, pad_id
from probe.rollouts.inverse_cdf import InverseCdfSampler, StopRule, uniforms
from probe.scoring.policy import Policy


@dataclass
class Response:
    """One response under way.

    Attributes:
        prompt: ids of its prompt's tokens.
        ids: its tokens so far.
        logprobs: theirs, nats.
        entropies: of the distributions that they were drawn from, nats.
        over: whether it gets no more tokens.
        truncated: whether the cap has ended it.
        continuous: whether continuous batching has drawn it.
    """

    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    over: bool = False
    truncated: bool = False
    continuous: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and what there is of the response."""
        return (*self.prompt, *self.ids)


@dataclass(frozen=True)
class Decoding:
    """Responses that are drawn together.

    Attributes:
        policy: that they are drawn from.
        tokenizer: its tokenizer.
        settings: of the sampler.
        seed: of the uniform numbers; response `i` has the stream `i`.
        eos_ids: that end a response.
        responses: all of them.
    """

    policy: Policy
    tokenizer: Any
    settings: GenerationConfig
    seed: int
    eos_ids: tuple[int, ...]
    responses: list[Response]

    def uniforms_to_come(self, entries: Sequence[int]) -> Tensor:
        """`(b, steps)` uniform numbers of the tokens that the entries may still get, 0 where fewer are left."""
        cap = self.settings.max_new_tokens
        rows = uniforms(self.seed, entries, cap)
        have = [len(self.responses[i].ids) for i in entries]
        out = torch.zeros(len(entries), cap - min(have), dtype=rows.dtype)
        for row, n in enumerate(have):
            out[row, : cap - n] = rows[row, n:]
        return out


def by_generate(decoding: Decoding, entries: Sequence[int], alike: bool, report: Callable[[], None]) -> None:
    """Draw the entries' responses by `generate`.

    A batch is left where the rows that are over have cost as much as beginning again does (`StopRule`). Those that go
    on wait until there is a batch of them, and are read again, prompt and response. Each draws the tokens that it
    would have drawn: a token is a function of what stands before it and of its own uniform number.

    Args:
        decoding: what is drawn.
        entries: numbers of its responses, longest prompts first.
        alike: only prompts of one length may be in a batch, which then is not left (padding reaches the model).
        report: called after each batch.
    """
    size = decoding.settings.batch_size
    fresh = _batches(decoding, entries, size, alike)
    batch = next(fresh, None)
    going_on: list[int] = []
    while batch is not None or going_on:
        if batch is None or len(going_on) >= size:
            going_on.sort(key=lambda i: -len(decoding.responses[i].tokens))
            rows, going_on = going_on[:size], going_on[size:]
        else:
            rows, batch = batch, next(fresh, None)
        _generate(decoding, rows, leave=not alike)
        going_on += [i for i in rows if not decoding.responses[i].over]
        report()


def _batches(decoding: Decoding, entries: Sequence[int], size: int, alike: bool) -> Iterator[list[int]]:
    """The entries, at most `size` at a time; with `alike`, only prompts of one length together."""
    runs = groupby(entries, key=lambda i: len(decoding.responses[i].prompt)) if alike else [(0, entries)]
    for _, run in runs:
        together = list(run)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def _generate(decoding: Decoding, entries: list[int], leave: bool) -> None:
    """Draw more tokens of these responses: all that are left, or with `leave` as many as are worth it."""
    policy, settings = decoding.policy, decoding.settings
    responses = [decoding.responses[i] for i in entries]
    input_ids, attention_mask = left_padded(
        [r.tokens for r in responses], pad_id(decoding.tokenizer, decoding.eos_ids), policy.device
    )
    have = torch.tensor([len(r.ids) for r in responses])
    uniform = decoding.uniforms_to_come(entries)
    sampler = InverseCdfSampler(uniform, settings)
    stop = StopRule(
        decoding.eos_ids,
        input_ids.shape[1] - have,
        settings.max_new_tokens - have,
        settings.stop_strings,
        decoding.tokenizer,
        leave,
    )
    with torch.no_grad(), policy.autocast():
        policy.model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[sampler],
            stopping_criteria=[stop],
            max_new_tokens=uniform.shape[1],
            synced_gpus=False,  # a sharded model's forwards go in lockstep
        )
    tokens, logprobs, entropies = sampler.collect()
    for row, response in enumerate(responses):
        response.over = bool(stop.length[row] > 0)
        response.truncated = response.over and not bool(stop.ended[row])
        n = int(stop.length[row]) if response.over else tokens.shape[1]
        response.ids += tokens[row, :n].tolist()
        response.logprobs += logprobs[row, :n].tolist()
        response.entropies += entropies[row, :n].tolist()
