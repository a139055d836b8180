"""Sampling by inverse CDF: every sequence has a random stream of its own, and a rule for where its response ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import MinPLogitsWarper, StopStringCriteria, TopKLogitsWarper, TopPLogitsWarper

from probe.config.batches import GenerationConfig
from probe.errors.exceptions import RolloutError
from probe.errors.remedies import Remedy


def uniforms(seed: int, indices: Sequence[int], steps: int) -> Tensor:
    """`(len(indices), steps)` uniform numbers in float64; row `i` depends on `seed` and on its index only."""
    rows = []
    for i in indices:
        # torch's Mersenne twister wants well-mixed seeds: neighbouring indices go through SplitMix64 first.
        rows.append(
            torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(_mix(seed, i)))
        )
    return torch.stack(rows)


def _mix(seed: int, index: int) -> int:
    """SplitMix64 of a pair of integers, as a non-negative 63-bit seed."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) % 2**64
    return (z ^ (z >> 31)) >> 1


@dataclass(frozen=True)
class Drawn:
    """The next token of every row.

    Attributes:
        token: `(b,)`.
        logprob: of the token, `(b,)`, nats.
        entropy: of the distribution at the temperature, before any truncation of its support, `(b,)`, nats.
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor


class InverseCdf:
    """Draws the next token of every row from logits and a uniform number."""

    def __init__(self, settings: GenerationConfig) -> None:
        self._temperature = settings.temperature
        self._warpers: list[Callable[..., Any]] = []
        if settings.top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k=settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=settings.top_p))
        if settings.min_p > 0:
            self._warpers.append(MinPLogitsWarper(min_p=settings.min_p))

    def draw(self, scores: Tensor, uniform: Tensor) -> Drawn:
        """The token whose interval of the cumulative distribution holds the row's uniform number.

        Args:
            scores: logits `(b, V)` as the model gives them.
            uniform: `(b,)` float64 in [0, 1).

        Raises:
            RolloutError: a logit is NaN or infinite.
        """
        dtype = torch.promote_types(scores.dtype, torch.float32)
        logits = scores.to(dtype) / self._temperature
        if not bool(torch.isfinite(logits).all()):
            raise RolloutError(
                "expected finite logits while sampling, found NaN or infinity; check the weights and ",
                Remedy.WEIGHT_TYPE,
            )
        logp = torch.log_softmax(logits, dim=-1)
        entropy = -(logp.exp() * logp).sum(-1)
        support = logits
        for warper in self._warpers:
            support = warper(None, support)
        cdf = torch.softmax(support.double(), dim=-1).cumsum(-1)
        u = uniform.to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp_max(cdf.shape[-1] - 1)
        return Drawn(token, logp.gather(-1, token.unsqueeze(-1)).squeeze(-1), entropy)


def only(scores: Tensor, token: Tensor) -> Tensor:
    """Scores under which greedy decoding takes these tokens."""
    return torch.full_like(scores, float("-inf")).scatter(-1, token.unsqueeze(-1), 0.0)


class InverseCdfSampler(LogitsProcessor):
    """Chooses the next token of every row and leaves it as the only one with a finite score.

    Args:
        uniform: `(b, steps)` float64, a number for each token to come.
        settings: temperature and truncation of the support.
    """

    def __init__(self, uniform: Tensor, settings: GenerationConfig) -> None:
        self._uniform = uniform
        self._inverse = InverseCdf(settings)
        self._steps: list[Drawn] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores under which greedy decoding takes the drawn tokens."""
        drawn = self._inverse.draw(scores, self._uniform[:, len(self._steps)])
        self._steps.append(drawn)
        return only(scores, drawn.token)

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(tokens, log-probs, entropies)`, each `(b, steps)` on the CPU."""
        steps = [(d.token, d.logprob, d.entropy) for d in self._steps]
        tokens, logprobs, entropies = (torch.stack(x, dim=1).cpu() for x in zip(*steps, strict=True))
        return tokens, logprobs.double(), entropies.double()


PREFILL = 0.25
"""Work of reading a token that is there, in units of a row's work for one more token."""
RESTART = 64
"""Work of beginning again with another batch, in the same unit."""
_NO_TOKEN = 2**62
"""`StopStringCriteria` matches nothing with ids that the tokenizer does not have."""


class StopRule(StoppingCriteria):
    """Ends a response at EOS, a stop string or its own cap, and records after how many tokens.

    The record is what the mask is made from: token ids cannot tell a sampled EOS from padding when they are equal.

    With `leave`, generation also stops where rows that are over have cost as much as it takes to begin again with those
    that are not: so whatever the lengths, at most twice of what was wasted is spent.

    Args:
        eos_ids: that end a response.
        starts: `(b,)` column of `input_ids` that each response begins at; some of it may be there already.
        room: `(b,)` tokens that each response may still get.
        stop_strings: that end a response with the token that completes one.
        tokenizer: for these.
        leave: whether rows are taken up elsewhere.
    """

    def __init__(
        self,
        eos_ids: tuple[int, ...],
        starts: Tensor,
        room: Tensor,
        stop_strings: list[str],
        tokenizer: Any,
        leave: bool = False,
    ) -> None:
        self.eos_token_id = torch.tensor(eos_ids)  # its presence makes `generate` pad finished rows
        self._starts, self._room = starts, room
        self._strings = StopStringCriteria(tokenizer, stop_strings) if stop_strings else None
        self._leave = leave
        self._steps = self._idle = 0
        self.length = torch.zeros(len(starts), dtype=torch.int64)
        self.ended = torch.zeros(len(starts), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which responses are over; all of them where generation stops."""
        self._steps += 1
        over = torch.isin(input_ids[:, -1], self.eos_token_id.to(input_ids.device))
        if self._strings is not None:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            # a prompt's end and a response's start do not add up
            outside = columns < self._starts.to(input_ids.device).unsqueeze(1)
            over = over | self._strings(input_ids.masked_fill(outside, _NO_TOKEN), scores).to(over.device)
        going = self.length == 0
        self.ended |= going & over.cpu()
        self.length[going & (self.ended | (self._steps >= self._room))] = self._steps
        done = self.length > 0
        alive = int((~done).sum())
        self._idle += len(done) - alive
        if self._leave and self._idle >= PREFILL * alive * input_ids.shape[1] + RESTART:
            return torch.ones_like(done).to(input_ids.device)
        return done.to(input_ids.device)
