"""Sampling by inverse CDF: every sequence has a random stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class InverseCdfSampler(LogitsProcessor):
    """Chooses the next token of every row and leaves it as the only one with a finite score."""

    def __init__(self, uniform: Tensor, settings: GenerationConfig) -> None:
        self._uniform = uniform
        self._temperature = settings.temperature
        self._warpers: list[Callable[..., Any]] = []
        if settings.top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k=settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=settings.top_p))
        if settings.min_p > 0:
            self._warpers.append(MinPLogitsWarper(min_p=settings.min_p))
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores under which greedy decoding takes the drawn tokens."""
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
            support = warper(input_ids, support)
        token = self._invert(torch.softmax(support.double(), dim=-1), len(self._steps))
        self._steps.append((token, logp.gather(-1, token.unsqueeze(-1)).squeeze(-1), entropy))
        return torch.full_like(scores, float("-inf")).scatter(-1, token.unsqueeze(-1), 0.0)

    def _invert(self, probabilities: Tensor, step: int) -> Tensor:
        """The token whose interval of the cumulative distribution holds the row's uniform number."""
        cdf = probabilities.cumsum(-1)
        u = self._uniform[:, step].to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).squeeze(-1)
        return token.clamp_max(cdf.shape[-1] - 1)

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(tokens, log-probs, entropies)`, each `(b, steps)` on the CPU."""
        tokens, logprobs, entropies = (torch.stack(x, dim=1).cpu() for x in zip(*self._steps, strict=True))
        return tokens, logprobs.double(), entropies.double()


class StopRule(StoppingCriteria):
    """Ends a response at EOS or a stop string, and records after how many tokens.

    The record is what the mask is made from: token ids cannot tell a sampled EOS from padding when they are equal.
    """

    def __init__(
        self, eos_ids: tuple[int, ...], prompt_width: int, stop_strings: list[str], tokenizer: Any
    ) -> None:
        self.eos_token_id = torch.tensor(eos_ids)  # its presence makes `generate` pad finished rows
        self._prompt_width = prompt_width
        self._strings = StopStringCriteria(tokenizer, stop_strings) if stop_strings else None
        self.length = torch.zeros(0, dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which responses are over."""
        if len(self.length) == 0:
            self.length = torch.zeros(len(input_ids), dtype=torch.int64)
        done = torch.isin(input_ids[:, -1], self.eos_token_id.to(input_ids.device))
        if self._strings is not None:
            response = input_ids[
                :, self._prompt_width :
            ]  # a prompt's end and a response's start do not add up
            done = done | self._strings(response, scores).to(done.device)
        count = input_ids.shape[1] - self._prompt_width
        self.length = torch.where((self.length == 0) & done.cpu(), count, self.length)
        return (self.length > 0).to(input_ids.device)
