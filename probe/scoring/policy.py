"""The policy as passes see it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.distributed.lockstep import is_apart
from probe.distributed.ranks import ALONE, Ranks
from probe.errors.memory import is_out_of_memory
from probe.loading import trainable_parameters
from probe.scoring.head import OutputHead
from probe.scoring.lora import added_in_place
from probe.scoring.microbatch import MicroBatch, collate, positions, split, worth_sharing
from probe.scoring.prompts import can_share_prompts, forward
from probe.scoring.room import check_batch
from probe.scoring.traffic import Kind, Traffic
from probe.shards import forward_types, is_sharded
from probe.snapshot import Places, replaced, stand_ins

T = TypeVar("T")
DEFAULT_TOKENS = 2048
"""Positions that go through a model at a time where nothing else is said."""


@dataclass(frozen=True)
class Policy:
    """A causal LM as the probe sees it: `pi = softmax(logits / temperature)`.

    Attributes:
        model: a transformers causal LM, possibly wrapped by peft, in evaluation mode.
        temperature: `tau`.
        microbatch_size: sequences that go through the model at a time; None for as many as the tokens allow.
        tokens_per_microbatch: positions that do, padding included; None for as many as the sequences have, or
            `DEFAULT_TOKENS` where nothing says how many these are.
        share_prompts: whether prompts go through the model once for all of their responses in a microbatch, where the
            model allows it and it is less work.
        traffic: what went through it, and what it had no memory for.
        ranks: the processes that passes are shared out to; each holds the whole policy, or a part of every weight.
        head_chunk_tokens: tokens whose logits are held at a time.
        autocast: a context manager factory for mixed precision (Fabric's `autocast`).
        values: values that stand in for some of the model's parameters, by name; the parameters themselves are not
            touched (`probe.snapshot.standing_in`); parts of sharded ones are moved for a pass, and put back. Dual
            numbers are allowed, which makes a pass forward-mode.
    """

    model: nn.Module
    temperature: float = 1.0
    microbatch_size: int | None = 2
    head_chunk_tokens: int = 256
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    values: Mapping[str, Tensor] | None = None
    tokens_per_microbatch: int | None = None
    share_prompts: bool = True
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    ranks: Ranks = field(default=ALONE, compare=False)

    def at(self, values: Mapping[str, Tensor]) -> Policy:
        """The policy with other values in the place of its parameters, which stay as they are.

        Args:
            values: by parameter name; each is brought to the parameter's device and type.

        Raises:
            ValueError: a name is not one of a parameter.
        """
        named = dict(self.model.named_parameters())
        unknown = sorted(set(values) - set(named))
        if unknown:
            raise ValueError(f"expected values for parameters of the model, found {unknown[:10]}")
        own = {name: v.to(named[name]) for name, v in values.items()}
        return replace(self, values={**(self.values or {}), **own})

    def moved(self, direction: Mapping[str, Tensor], scale: float) -> Policy:
        """The policy at `theta + scale * direction`, `theta` being the values it has now; by parameter name."""
        here = self.point(direction)
        return self.at({n: here[n] + scale * v.to(here[n]) for n, v in direction.items()})

    def point(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of some parameters, those that stand in for them included; detached, not copied."""
        named = {n: p.detach() for n, p in self.model.named_parameters()} | dict(self.values or {})
        return {name: named[name] for name in names}

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in the model's order; `D` numbers in all."""
        return trainable_parameters(self.model)

    @property
    def half_precision(self) -> bool:
        """Whether any of the model's weights, or its forwards, are in 16 bits."""
        if forward_types(self.model) & {torch.bfloat16, torch.float16}:
            return True
        with self.autocast():
            return torch.is_autocast_enabled(self.device.type)

    @cached_property
    def _places(self) -> Places:
        """Where `values` go, and the forwards of LoRA layers; found once, and not for every microbatch."""
        return [*stand_ins(self.model, self.values or {}), *added_in_place(self.model)]

    def in_other_shapes(self, batch: RolloutBatch) -> Policy:
        """The policy with microbatches of half the size of the largest that it makes of a batch, for other rounding.

        Half of what the batch fills, which may be less than the limits. Where most positions are of sequences that are
        alone, pairs.

        Args:
            batch: any.
        """
        parts, share = self.split(batch), self._shares(batch)
        filled = [positions(batch, part, share) for part in parts]
        alone = sum(size for part, size in zip(parts, filled, strict=True) if len(part) == 1)
        if 2 * alone >= sum(filled):
            return replace(self, microbatch_size=2, tokens_per_microbatch=None)
        most = max(map(len, parts)) // 2
        return replace(self, microbatch_size=most, tokens_per_microbatch=max(max(filled) // 2, 1))

    def split(self, batch: RolloutBatch, kind: Kind = "forward") -> list[list[int]]:
        """The sequences of each microbatch of a batch.

        Args:
            batch: any.
            kind: of the pass.

        Raises:
            DataError: the model has no room for one of them.
        """
        check_batch(self.model, batch)
        return split(batch, *self.limits(kind), self._shares(batch, kind))

    def _shares(self, batch: RolloutBatch, kind: Kind = "forward") -> bool:
        """Whether prompts go through the model once where it is less work; not before a sharded model's backward."""
        return (
            self.share_prompts
            and worth_sharing(batch)
            and not (kind == "backward" and is_sharded(self.model))
            and can_share_prompts(self.model, self.autocast, batch)
        )

    def own_parts(self, batch: RolloutBatch, kind: Kind = "forward") -> list[list[int]]:
        """Those of `split` that are this rank's; a batch is cut the same way whatever the number of ranks."""
        parts = self.split(batch, kind)
        if self.ranks.size == 1:
            return parts
        share = self._shares(batch, kind)
        own = self.ranks.shares([positions(batch, part, share) for part in parts])[self.ranks.rank]
        return [parts[i] for i in own]

    def limits(self, kind: Kind) -> tuple[int | None, int | None]:
        """Most sequences and most positions of a microbatch of a kind of pass; None for any number."""
        tokens = self.tokens_per_microbatch
        if self.microbatch_size is None and tokens is None:
            tokens = DEFAULT_TOKENS
        limits = [limit for limit in (tokens, self.traffic.room.get(kind)) if limit is not None]
        return self.microbatch_size, min(limits, default=None)

    def microbatches(self, batch: RolloutBatch) -> Iterator[MicroBatch]:
        """The sequences of a batch as inputs of the model; see `split`."""
        return (collate(batch, rows, self.device, self._shares(batch)) for rows in self.split(batch))

    def each(
        self, batch: RolloutBatch, run: Callable[[MicroBatch], T], kind: Kind = "forward"
    ) -> Iterator[T]:
        """What `run` gives for the microbatches of a batch that are this rank's.

        One that memory does not suffice for is run again in two halves, and none of later passes of its kind is larger
        than these: nothing is lost but time. Scores of the same sequences in other shapes differ by rounding.

        Args:
            batch: any.
            run: leaves nothing behind where it fails.
            kind: of the pass.

        Raises:
            DataError: the model has no room for a sequence.
            torch.OutOfMemoryError: memory does not suffice for one sequence.
        """
        waiting, room = deque(self.own_parts(batch, kind)), dict(self.traffic.room)
        share = self._shares(batch, kind)
        while waiting:
            indices = waiting.popleft()
            inputs = collate(batch, indices, self.device, share)
            try:
                found = run(inputs)
            except (RuntimeError, MemoryError) as error:
                cut_off = is_apart(self.model) or (kind == "backward" and is_sharded(self.model))
                if len(indices) == 1 or not is_out_of_memory(error) or cut_off:
                    # smaller microbatches were no help, so that they say nothing about what fits
                    self.traffic.room = room
                    raise
            else:
                self.traffic.count(inputs.useful, inputs.padded)
                yield found
                continue
            # only here, where nothing of what was tried is held any more
            self.traffic.too_much(kind, inputs.padded)
            half = (len(indices) + 1) // 2
            waiting.extendleft([indices[half:], indices[:half]])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def hidden_states(self, head: OutputHead, inputs: MicroBatch) -> Tensor:
        """Hidden states `(n, D_model)` that predict the microbatch's `n` response tokens."""
        ids, mask = inputs.input_ids, inputs.attention_mask
        connected = torch.is_grad_enabled() and is_sharded(self.model)
        with head.capture(connected) as captured, self.autocast(), replaced(self._places):
            if inputs.prompts is None:
                output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            else:
                output = forward(self.model, inputs.prompts, ids, mask)
        with self.autocast():
            head.check(captured[-1], output.logits)
        hidden = captured[-1]  # on the output layer's device, which need not be the inputs'
        if connected:  # a backward of a sharded model begins at what the model gives back
            hidden = hidden + (0.0 * output.logits.double().sum()).to(hidden.dtype)  # which does not overflow
        return hidden[inputs.row.to(hidden.device), inputs.column.to(hidden.device)]
