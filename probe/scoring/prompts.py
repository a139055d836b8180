"""Prompts that go through a model once for all of their responses.

A response's states are functions of its prompt's keys and values, which a model with attention alone keeps in its
cache. So the prompts of a microbatch, each of them once, are one forward; its cache, repeated for every response, is
where the forward over the responses goes on. Derivatives go through both, and sums over responses that share a prompt
are what they are without sharing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from probe.errors.memory import is_out_of_memory

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Prompts are shared where that leaves at most this share of the positions: there are two forwards instead of one."""
_SHARED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What was found out about a model; it belongs to the architecture."""
_PROMPTS, _RESPONSES = (5, 3), (4, 2)
"""Lengths that it is found out with."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a microbatch without their last tokens, left-padded to `P`, each of them once.

    Attributes:
        input_ids: `(u, P)`.
        attention_mask: `(u, P)` int64.
        of: the prompt of each of the microbatch's `b` sequences, `(b,)`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    of: Tensor

    @property
    def lengths(self) -> Tensor:
        """`(u,)`."""
        return self.attention_mask.sum(1)


def distinct(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each prompt once, in the order in which they come, and which of these each one is.

    >>> distinct([(7, 8), (9,), (7, 8)])
    ([(7, 8), (9,)], [0, 1, 0])
    """
    number = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    return list(number), [number[prompt] for prompt in prompts]


def shared_prompts(each: Sequence[tuple[int, ...]], of: Sequence[int], device: torch.device) -> Prompts:
    """Prompts of a microbatch, put together.

    Args:
        each: prompts of at least two tokens, each of them once.
        of: which of them each sequence has.
        device: of the inputs.
    """
    widest = max(map(len, each)) - 1
    ids = torch.zeros(len(each), widest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(each):
        ids[row, widest - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
        mask[row, widest - len(prompt) + 1 :] = 1
    return Prompts(ids.to(device), mask.to(device), torch.tensor(of, device=device))


def forward(model: nn.Module, prompts: Prompts, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """The model's output for what comes after the prompts.

    Args:
        model: that `can_share_prompts`.
        prompts: without their last tokens.
        input_ids: of each sequence, from its prompt's last token on, right-padded, `(b, R)`.
        attention_mask: `(b, R)` int64.
    """
    positions = (prompts.attention_mask.cumsum(1) - 1).clamp_min(0)
    cache = model(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        use_cache=True,
    ).past_key_values
    cache.batch_select_indices(prompts.of)
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([prompts.attention_mask[prompts.of], attention_mask], dim=1),
        position_ids=prompts.lengths[prompts.of].unsqueeze(1) + steps,
        past_key_values=cache,
        use_cache=True,
    )


def can_share_prompts(model: nn.Module, autocast: AbstractContextManager[object]) -> bool:
    """Whether a model gives the same with shared prompts: it has attention to all that comes before, and nothing else.

    Found out once for a model, with a few tokens.

    Args:
        model: a transformers causal LM, possibly wrapped by peft, in evaluation mode.
        autocast: of the policy's forwards.
    """
    if model not in _SHARED:
        reason = _why_not(model, autocast)
        _SHARED[model] = reason is None
        if reason is not None:
            logger.debug("prompts go through the model once for each of their responses: %s", reason)
    return _SHARED[model]


def _why_not(model: Any, autocast: AbstractContextManager[object]) -> str | None:
    """Why a model cannot share prompts; None where it can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds - {"full_attention"} or (window and not kinds):
        return "not all of its layers attend to all that comes before"
    if getattr(base, "_is_stateful", False):
        return "it has a state that is not attention's"
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_PROMPTS[0] + _PROMPTS[1] + 4 * _RESPONSES[0], device=device) * 7 + 3) % vocabulary
    each = [tuple(ids[: _PROMPTS[0]].tolist()), tuple(ids[_PROMPTS[0] :][: _PROMPTS[1]].tolist())]
    of, lengths = [0, 1, 0, 1], [*_RESPONSES, *_RESPONSES]
    responses = ids[-4 * _RESPONSES[0] :].reshape(4, -1)
    prompts = shared_prompts(each, of, device)
    mask = torch.arange(1 + _RESPONSES[0], device=device) <= torch.tensor(lengths, device=device).unsqueeze(1)
    after = torch.cat([torch.tensor([[each[k][-1]] for k in of], device=device), responses], dim=1)
    try:
        with torch.no_grad(), autocast:
            found = forward(model, prompts, after, mask.long()).logits.double()
            for row, (k, n) in enumerate(zip(of, lengths, strict=True)):
                whole = torch.tensor([*each[k], *responses[row, :n].tolist()], device=device).unsqueeze(0)
                plain = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
                own = plain[0, len(each[k]) - 1 :].double()
                tolerance = (
                    1e-2
                    if torch.finfo(plain.dtype).bits < 32 or torch.is_autocast_enabled(device.type)
                    else 1e-4
                )
                gap = float((found[row, : n + 1] - own).abs().max() / own.abs().max().clamp_min(1e-30))
                if not gap <= tolerance:
                    return f"with its cache its logits differ by {gap:.2g} of the largest"
    except Exception as error:  # a model that takes no cache or no positions raises whatever it likes
        if is_out_of_memory(error):
            raise
        return f"it does not go on from a cache ({error})"
    return None
