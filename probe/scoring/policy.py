"""The policy as passes see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.loading import trainable_parameters
from probe.scoring.head import OutputHead
from probe.scoring.microbatch import MicroBatch, microbatches
from probe.scoring.room import check_batch
from probe.snapshot import Places, replaced, stand_ins


@dataclass(frozen=True)
class Policy:
    """A causal LM as the probe sees it: `pi = softmax(logits / temperature)`.

    Attributes:
        model: a transformers causal LM, possibly wrapped by peft, in evaluation mode.
        temperature: `tau`.
        microbatch_size: sequences per pass.
        head_chunk_tokens: tokens whose logits are held at a time.
        autocast: a context manager factory for mixed precision (Fabric's `autocast`).
        values: values that stand in for some of the model's parameters, by name; the parameters themselves are not
            touched (`probe.snapshot.standing_in`). Dual numbers are allowed, which makes a pass forward-mode.
    """

    model: nn.Module
    temperature: float = 1.0
    microbatch_size: int = 2
    head_chunk_tokens: int = 256
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    values: Mapping[str, Tensor] | None = None

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
        """The policy at `theta + scale * direction`, `theta` being the values it has now.

        Args:
            direction: by parameter name.
            scale: in units of the direction.
        """
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
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters()):
            return True
        with self.autocast():
            return torch.is_autocast_enabled(self.device.type)

    @cached_property
    def _places(self) -> Places:
        """Where `values` go; found once, and not for every microbatch."""
        return stand_ins(self.model, self.values or {})

    def microbatches(self, batch: RolloutBatch) -> Iterator[MicroBatch]:
        """The sequences of a batch as inputs of the model.

        Raises:
            DataError: the model has no room for one of them.
        """
        check_batch(self.model, batch)
        return microbatches(batch, self.microbatch_size, self.device)

    def hidden_states(self, head: OutputHead, inputs: MicroBatch) -> Tensor:
        """Hidden states `(n, D_model)` that predict the microbatch's `n` response tokens."""
        arguments = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "use_cache": False,
        }
        with head.capture() as captured, self.autocast(), replaced(self._places):
            output = self.model(**arguments)
        with self.autocast():
            head.check(captured[-1], output.logits)
        hidden = captured[-1]  # on the output layer's device, which need not be the inputs'
        return hidden[inputs.row.to(hidden.device), inputs.column.to(hidden.device)]
