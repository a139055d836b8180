"""Sampling responses from the policy that is scored (exactly in float32; a half-precision model's logits are rounded).

transformers' `generate` runs the decoding loop (caches, padding, stopping); the token is chosen here, by inverting
the cumulative distribution of `softmax(logits / temperature)` at a uniform number that belongs to the sequence and
the step. So the draw does not depend on how sequences are batched, no hidden `top_k` or repetition penalty can enter,
and the global random state is neither read nor advanced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import MinPLogitsWarper, StopStringCriteria, TopKLogitsWarper, TopPLogitsWarper

from probe.config import GenerationConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.errors import DataError, RolloutError
from probe.finite import require_finite_weights
from probe.scoring.passes import Policy, Progress
from probe.scoring.room import check_prompts
from probe.scoring.scores import TokenScores

NEUTRAL = {
    "do_sample": False,  # the token is chosen by `_InverseCdfSampler`; "greedy" then picks that token
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
"""Generation settings under which `generate` passes the model's own logits on."""
SAMPLING_GAP_LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest root mean square difference, in nats per token, between log-probs while sampling and when scored."""


_Row = tuple[list[int], list[float], list[float], bool]
"""Of one response: token ids, their log-probs, the entropies they were drawn with, whether the cap ended it."""
_PADDING_MATTERS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What was found out about a model; it belongs to the architecture."""


@dataclass(frozen=True)
class SampledTokens:
    """What sampling itself saw, for the check that sampling equals scoring.

    Attributes:
        logprob: log-prob of each sampled token at the time, `(B, T)` float64, 0 outside the mask.
        entropy: entropy of the distribution it was drawn from, `(B, T)` float64.
    """

    logprob: Tensor
    entropy: Tensor


def sample_rollouts(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[PromptExample],
    settings: GenerationConfig,
    seed: int,
    group: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[RolloutBatch, SampledTokens]:
    """Draw one response per entry of `prompts` (repeat a prompt to draw several).

    The response of entry `i` is a function of the prompt, the weights, `seed` and `i` alone, up to the rounding of
    the logits: the batch size changes a token only where a uniform number falls within rounding of a boundary.
    The sampled EOS belongs to the response; nothing after it does.

    Args:
        policy: the policy.
        tokenizer: its tokenizer, with an EOS token.
        prompts: `B` entries.
        settings: temperature, cap on tokens, stop strings and batch size.
        seed: of the uniform numbers, one independent stream per entry.
        group: `(B,)` group of each entry; by default every entry is its own.
        progress: called after each batch.

    Returns:
        The batch, and the scores seen while sampling.

    Raises:
        ValueError: `policy.temperature` differs from the settings' (sampling would not equal scoring).
        DataError: no prompts, or a prompt without tokens, or with tokens that the model has no row for.
        RolloutError: a response may become longer than the model has positions for, or there is no EOS.
        NumericalError: a weight is NaN or infinite.
    """
    require_finite_weights(policy.model)
    if settings.temperature != policy.temperature:
        raise ValueError(f"expected one temperature, found {settings.temperature} and {policy.temperature}")
    prompt_ids = encode_prompts(tokenizer, prompts)
    check_prompts(policy.model, prompt_ids, settings.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    rows: dict[int, _Row] = {}
    alike = _padding_matters(policy, tokenizer, [prompt_ids[order[0]], prompt_ids[order[-1]]], settings)
    with own_generation_config(policy.model, tokenizer, settings) as eos_ids:
        for indices in _batches(order, prompt_ids, settings.batch_size, alike):
            rows.update(_sample_batch(policy, tokenizer, prompt_ids, indices, settings, seed, eos_ids))
            if progress is not None:
                progress(len(rows), len(prompts))
    return _assemble(tokenizer, prompts, prompt_ids, [rows[i] for i in range(len(prompts))], settings, group)


def check_sampling(policy: Policy, seen: SampledTokens, scores: TokenScores) -> float:
    """Root mean square difference of log-probs while sampling and when scored, nats per token.

    Args:
        policy: the policy, for its precision.
        seen: what `sample_rollouts` saw.
        scores: scores of the same batch.

    Raises:
        RolloutError: it is too large for rounding: the sampler and the scorer see different policies.
    """
    difference = (seen.logprob - scores.logprob)[scores.mask]
    gap, limit = float(difference.square().mean().sqrt()), _gap_limit(policy)
    if not gap <= limit:
        raise RolloutError(
            f"expected sampling and scoring to see the same policy, found log-probs that differ by {gap:.2g} nats "
            f"per token (root mean square, at most {limit} expected); the model's cached decoding changes its output "
            "(try checkpoint.attn_implementation: eager)"
        )
    return gap


def _gap_limit(policy: Policy) -> float:
    """The limit of `SAMPLING_GAP_LIMIT` for the coarsest type that the policy computes in, nats per token."""
    dtypes = {p.dtype for p in policy.model.parameters()} & set(SAMPLING_GAP_LIMIT)
    limit = max(SAMPLING_GAP_LIMIT[d] for d in dtypes)
    with policy.autocast():
        if torch.is_autocast_enabled(policy.device.type):
            limit = max(limit, SAMPLING_GAP_LIMIT[torch.bfloat16])
    return limit


def encode_prompts(tokenizer: Any, prompts: Sequence[PromptExample]) -> list[tuple[int, ...]]:
    """Token ids of the prompts.

    Raises:
        DataError: there are no prompts, or one has no tokens.
    """
    if not prompts:
        raise DataError("expected at least one prompt, found none")
    out = []
    for prompt in prompts:
        ids = prompt.ids
        if ids is None:
            ids = tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        if len(ids) == 0:
            raise DataError(
                f"prompt {prompt.index}: expected at least one token, found none in {prompt.text!r}"
            )
        out.append(tuple(int(i) for i in ids))
    return out


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: those of the model's generation config, and the tokenizer's EOS.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
    """
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = eos if isinstance(eos, (list, tuple)) else (eos,)
    return tuple(dict.fromkeys(int(i) for i in (*own, tokenizer.eos_token_id) if i is not None))


@contextmanager
def own_generation_config(
    model: Any, tokenizer: Any, settings: GenerationConfig
) -> Iterator[tuple[int, ...]]:
    """Give the model a generation config under which `generate` changes nothing about its logits, and put its own back.

    `generate` fills whatever a caller leaves unset from the model's own configuration (checkpoints ship with top_k,
    repetition penalties and the like), so the model's own is replaced for the time being.

    Yields:
        The ids that end a response.
    """
    eos_ids = end_ids(model, tokenizer)
    if not eos_ids:
        raise RolloutError("expected an EOS token, found none in the tokenizer or the generation config")
    neutral = transformers.GenerationConfig(
        **NEUTRAL,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=_pad_id(tokenizer, eos_ids),
        use_cache=True,
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # peft hands a generation config of its own on to the base model, where it has one
    holders = [m for m in (base, model) if m is base or "generation_config" in vars(m)]
    before = [m.generation_config for m in holders]
    try:
        for holder in holders:
            holder.generation_config = neutral
        yield eos_ids
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


def _padding_matters(
    policy: Policy, tokenizer: Any, prompts: Sequence[tuple[int, ...]], settings: GenerationConfig
) -> bool:
    """Whether a prompt's next tokens depend on the padding to its left, by sampling the shorter of two both ways.

    Attention masks padding out. The state of recurrent layers (Mamba, RWKV, Griffin) goes through it, and not every
    model keeps it from doing so.

    Args:
        policy: the policy.
        tokenizer: its tokenizer.
        prompts: token ids of the longest and of the shortest prompt.
        settings: of the sampler.
    """
    longest, shortest = prompts
    if len(longest) == len(shortest):
        return False
    if policy.model not in _PADDING_MATTERS:
        few = replace(settings, max_new_tokens=1)
        with own_generation_config(policy.model, tokenizer, few) as eos_ids:
            pad = _pad_id(tokenizer, eos_ids)
            padded, alone = (_next_log_probs(policy, batch, pad)[-1] for batch in (prompts, [shortest]))
        difference = float((padded - alone).square().mean().sqrt())
        _PADDING_MATTERS[policy.model] = not difference <= _gap_limit(policy)
    return _PADDING_MATTERS[policy.model]


def _next_log_probs(policy: Policy, prompts: Sequence[tuple[int, ...]], pad: int) -> Tensor:
    """Log-probs `(b, V)` of the first token of each response, nats, as `generate` computes them."""
    seen: list[Tensor] = []

    def keep(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(torch.log_softmax(scores.to("cpu", torch.float64), dim=-1))
        return scores

    input_ids, attention_mask = _left_padded(prompts, pad, policy.device)
    with torch.no_grad(), policy.autocast():
        policy.model.generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=[keep])  # type: ignore[operator]
    return seen[0]


def _left_padded(prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `(b, L)`; generation continues on the right, so padding stands on the left."""
    widest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), widest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, widest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, widest - len(ids) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _pad_id(tokenizer: Any, eos_ids: tuple[int, ...]) -> int:
    """The token that fills rows up."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]


def _batches(
    order: Sequence[int], prompt_ids: Sequence[tuple[int, ...]], size: int, alike: bool
) -> Iterator[list[int]]:
    """The entries in the given order, at most `size` at a time; with `alike`, only prompts of one length together."""
    runs = groupby(order, key=lambda i: len(prompt_ids[i])) if alike else [(0, order)]
    for _, run in runs:
        entries = list(run)
        for start in range(0, len(entries), size):
            yield entries[start : start + size]


def _sample_batch(
    policy: Policy,
    tokenizer: Any,
    prompt_ids: Sequence[tuple[int, ...]],
    indices: list[int],
    settings: GenerationConfig,
    seed: int,
    eos_ids: tuple[int, ...],
) -> dict[int, _Row]:
    """Sample the entries `indices`."""
    input_ids, attention_mask = _left_padded(
        [prompt_ids[i] for i in indices], _pad_id(tokenizer, eos_ids), policy.device
    )
    sampler = _InverseCdfSampler(uniforms(seed, indices, settings.max_new_tokens), settings)
    stop = _Stop(eos_ids, input_ids.shape[1], settings.stop_strings, tokenizer)
    with torch.no_grad(), policy.autocast():
        policy.model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[sampler],
            stopping_criteria=[stop],
        )
    tokens, logprobs, entropies = sampler.collect()
    out = {}
    for row, i in enumerate(indices):
        length = int(stop.length[row])
        finished = length > 0
        n = length if finished else tokens.shape[1]
        out[i] = (
            tokens[row, :n].tolist(),
            logprobs[row, :n].tolist(),
            entropies[row, :n].tolist(),
            not finished,
        )
    return out


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


class _InverseCdfSampler(LogitsProcessor):
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
        dtype = torch.promote_types(scores.dtype, torch.float32)
        logits = scores.to(dtype) / self._temperature
        if not bool(torch.isfinite(logits).all()):
            raise RolloutError(
                "expected finite logits while sampling, found NaN or infinity; check the weights and checkpoint.dtype"
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


class _Stop(StoppingCriteria):
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


def _assemble(
    tokenizer: Any,
    prompts: Sequence[PromptExample],
    prompt_ids: Sequence[tuple[int, ...]],
    rows: list[tuple[list[int], list[float], list[float], bool]],
    settings: GenerationConfig,
    group: Tensor | None,
) -> tuple[RolloutBatch, SampledTokens]:
    """Pad the rows into a batch."""
    B, T = len(rows), max(len(ids) for ids, *_ in rows)
    completion_ids = torch.zeros(B, T, dtype=torch.int64)
    mask = torch.zeros(B, T, dtype=torch.bool)
    logprob, entropy = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for i, (ids, l, h, _) in enumerate(rows):
        n = len(ids)
        completion_ids[i, :n], mask[i, :n] = torch.tensor(ids), True
        logprob[i, :n], entropy[i, :n] = (
            torch.tensor(l, dtype=torch.float64),
            torch.tensor(h, dtype=torch.float64),
        )
    batch = RolloutBatch(
        prompts=tuple(p.text for p in prompts),
        completions=tuple(tokenizer.batch_decode([ids for ids, *_ in rows], skip_special_tokens=True)),
        prompt_ids=tuple(prompt_ids),
        completion_ids=completion_ids,
        mask=mask,
        truncated=torch.tensor([cut for *_, cut in rows]),
        group=torch.arange(B) if group is None else group,
        rows=tuple(p.row for p in prompts),
        bias_flags=("truncated_support",) if settings.truncates_support else (),
    )
    return batch, SampledTokens(logprob, entropy)
