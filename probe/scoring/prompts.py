"""Prompts that go through a model once for all of their responses.

A response's states are functions of its prompt's keys and values, which a model with attention alone keeps in its
cache. So the prompts of a microbatch, each of them once, are one forward; its cache, repeated for every response, is
where the forward over the responses goes on. Derivatives go through both, and sums over responses that share a prompt
are what they are without sharing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.memory import is_out_of_memory
from probe.parameters import without_adapters
from probe.scoring.head import HALF, OutputHead
from probe.shards import forward_types

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Prompts are shared where that leaves at most this share of the positions: there are two forwards instead of one."""
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], float]] = WeakKeyDictionary()
"""The longest sequence that a model was tried with and gave the same, by how it computes; infinite where it did not."""


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
    before = prompts.lengths[prompts.of].unsqueeze(
        1
    )  # no position is beyond a sequence's own: padding repeats its last
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([prompts.attention_mask[prompts.of], attention_mask], dim=1),
        position_ids=before + torch.minimum(steps, attention_mask.sum(1, keepdim=True) - 1),
        past_key_values=cache,
        use_cache=True,
    )


def can_share_prompts(
    model: nn.Module, autocast: Callable[[], AbstractContextManager[object]], batch: RolloutBatch
) -> bool:
    """Whether a model gives the same with shared prompts: it has attention to all that comes before, and nothing else.

    Found out with two sequences of the batch, the longest among them; again for a batch with a longer one.

    Args:
        model: a transformers causal LM, possibly wrapped by peft, in evaluation mode.
        autocast: of the policy's forwards.
        batch: responses, of which one at least is not empty.
    """
    with autocast():
        mixed = torch.is_autocast_enabled(_device(model).type)
    how = (
        getattr(without_adapters(model).config, "_attn_implementation", None),
        next(model.parameters()).dtype,
        mixed or not forward_types(model).isdisjoint(HALF),
    )
    tried = _TRIED.setdefault(model, {})
    lengths = torch.tensor([len(ids) for ids in batch.prompt_ids]) + batch.lengths
    lengths[batch.lengths == 0] = 0
    if tried.get(how, 0.0) >= int(lengths.max()):
        return tried[how] < math.inf
    # the other one is of a short prompt, so that there is padding
    few = [
        int(lengths.argmax()),
        min(lengths.nonzero().flatten().tolist(), key=lambda i: len(batch.prompt_ids[i])),
    ]
    sequences = [(batch.prompt_ids[i], batch.completion_ids[i][batch.mask[i]].tolist()) for i in few]
    reason = _why_not(model) or _difference(model, autocast, sequences, 1e-2 if how[2] else 1e-4)
    tried[how] = float(lengths.max()) if reason is None else math.inf
    if reason is not None:
        logger.debug("prompts go through the model once for each of their responses: %s", reason)
    return reason is None


def _device(model: Any) -> torch.device:
    """Where inputs go."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def _why_not(model: nn.Module) -> str | None:
    """Why a model is not even tried; None where it is."""
    base = without_adapters(model)
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds - {"full_attention"} or (window and not kinds):
        return "not all of its layers attend to all that comes before"
    if getattr(base, "_is_stateful", False):
        return "it has a state that is not attention's"
    by_length = _rope_types(getattr(text, "rope_parameters", None)) & {"dynamic", "longrope"}
    if by_length:
        return f"its rotary embedding depends on the length of the sequence ({', '.join(by_length)})"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """Kinds of rotary embedding in a configuration, which has one, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    found = {str(parameters[key]) for key in ("rope_type", "type") if key in parameters}
    return found.union(*(_rope_types(value) for value in parameters.values()))


def _difference(
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[object]],
    sequences: Sequence[tuple[tuple[int, ...], list[int]]],
    tolerance: float,
) -> str | None:
    """How the states of these prompts and responses are other ones where prompts go first; None where they are not."""
    device, head = _device(model), OutputHead(model)
    prompts = shared_prompts([prompt for prompt, _ in sequences], range(len(sequences)), device)
    after = [[prompt[-1], *response[:-1]] for prompt, response in sequences]
    widest = max(map(len, after))
    ids = torch.tensor([row + [0] * (widest - len(row)) for row in after], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (widest - len(row)) for row in after], device=device)
    try:
        with torch.no_grad(), head.capture() as captured, autocast():
            forward(model, prompts, ids, mask)
            shared = captured[-1]
            for row, (prompt, response) in enumerate(sequences):
                whole = torch.tensor([[*prompt, *response[:-1]]], device=device)
                model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False)
                own = captured[-1][0, len(prompt) - 1 :].double()
                gap = float((shared[row, : len(own)].double() - own).norm() / own.norm().clamp_min(1e-30))
                if not gap <= tolerance:
                    return f"its states differ by {gap:.2g} of their size"
    except Exception as error:  # a model that takes no cache or no positions raises whatever it likes
        if is_out_of_memory(error):
            raise
        return f"it does not go on from a cache ({error})"
    return None
