"""How responses are generated: plain sampling, and the tokens that end one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from probe.config.batches import GenerationConfig
from probe.data.batch import PromptExample
from probe.distributed.lockstep import lockstep
from probe.errors.exceptions import DataError, RolloutError
from probe.parameters import without_adapters
from probe.scoring.policy import Policy
from probe.shards import forward_types

NEUTRAL = {
    "do_sample": False,  # the token is chosen by `InverseCdfSampler`; "greedy" then picks that token
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
_PADDING_MATTERS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What was found out about a model; it belongs to the architecture."""


def gap_limit(policy: Policy) -> float:
    """The limit of `SAMPLING_GAP_LIMIT` for the coarsest type that the policy computes in, nats per token."""
    dtypes = forward_types(policy.model) & set(SAMPLING_GAP_LIMIT)
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
        pad_token_id=pad_id(tokenizer, eos_ids),
        use_cache=True,
    )
    base = without_adapters(model)
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


def padding_matters(
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
            pad = pad_id(tokenizer, eos_ids)
            padded, alone = (_next_log_probs(policy, batch, pad)[-1] for batch in (prompts, [shortest]))
        difference = float((padded - alone).square().mean().sqrt())
        _PADDING_MATTERS[policy.model] = not difference <= gap_limit(policy)
    return _PADDING_MATTERS[policy.model]


def _next_log_probs(policy: Policy, prompts: Sequence[tuple[int, ...]], pad: int) -> Tensor:
    """Log-probs `(b, V)` of the first token of each response, nats, as `generate` computes them."""
    seen: list[Tensor] = []

    def keep(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(torch.log_softmax(scores.to("cpu", torch.float64), dim=-1))
        return scores

    input_ids, attention_mask = left_padded(prompts, pad, policy.device)
    called = without_adapters(policy.model)
    step = lockstep(policy.model, policy.ranks, autocast=policy.autocast, called=called)
    with step, torch.no_grad(), policy.autocast():
        policy.model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, logits_processor=[keep], synced_gpus=False
        )
    return seen[0]


def left_padded(prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `(b, L)`; generation continues on the right, so padding stands on the left."""
    widest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), widest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, widest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, widest - len(ids) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def pad_id(tokenizer: Any, eos_ids: tuple[int, ...]) -> int:
    """The token that fills rows up."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
