"""From hidden states to log-probs and entropies: the model's output head, a bounded number of tokens at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule

from probe.errors.exceptions import NumericalError
from probe.errors.remedies import Remedy
from probe.scoring.logit_tail import LogitTail, choose_tail, difference, possible_tails
from probe.shards import forward_type, is_shard, whole
from probe.snapshot import standing_in

logger = logging.getLogger(__name__)
HALF = (torch.float16, torch.bfloat16)
COMPARED = 2
"""Sequences of a forward whose last position the model's own logits are computed and compared at."""


def token_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs `(n, V)` of every token, `pi = softmax(logits / temperature)`, in nats.

    Args:
        logits: `(n, V)`, float32 or float64: half-precision logits cost 2e-2 nats per token.
        temperature: the sampling temperature `tau`.
    """
    return torch.log_softmax(logits / temperature, dim=-1)


def token_statistics(logp: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each row's distribution.

    Args:
        logp: `(n, V)` log-probs, see `token_log_probs`.
        labels: `(n,)` token ids.

    Returns:
        `(l, h)`, both `(n,)` in nats: `l = log pi(label)` and `h = -sum_v pi(v) log pi(v)` over the whole vocabulary.

    Example:
        >>> l, h = token_statistics(token_log_probs(torch.zeros(1, 4), temperature=1.0), torch.tensor([2]))
        >>> bool(torch.allclose(-l, h)) and round(h.item(), 6)  # both are log 4
        1.386294
    """
    logprob = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    return logprob, entropy


class OutputHead:
    """The map from the last hidden states to logits, as the model itself computes it.

    Hidden states are captured where they enter the model's output layer, so that only response positions go
    through the vocabulary product and only a chunk of their logits exists at a time. Models differ in what they do to
    the logits after that layer (`LogitTail`). So `check`, which sees the model's own logits at a few positions of
    every forward, chooses the tail that gives them, before the first use, and refuses one that none gives.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
        """Find the output layer of `model` (a transformers causal LM, possibly wrapped by peft).

        Args:
            model: the model.
            values: values that stand in for parameters of the model, by name; see `Policy.at`.
        """
        layer = model.get_output_embeddings()  # type: ignore[operator]
        if layer is None:
            raise NumericalError(
                f"expected a causal language model with an output layer, found {type(model).__name__}, whose "
                "get_output_embeddings() is None; load it with AutoModelForCausalLM"
            )
        self.layer: nn.Module = layer
        self._type = forward_type(layer) or forward_type(model)
        config: Any = model.config
        self._tails = possible_tails(
            config.get_text_config() if hasattr(config, "get_text_config") else config
        )
        self._tail: LogitTail | None = None
        self._promoted: dict[str, Tensor] | None = None
        self.vocabulary = 0
        self.divides = False
        own: dict[int, str] = {
            id(p): name for name, p in layer.named_parameters()
        }  # tied weights by identity
        everywhere = model.named_parameters() if values else ()
        self._values = {
            own[id(p)]: values[n] for n, p in everywhere if values and n in values and id(p) in own
        }
        self._bring_together()

    def _bring_together(self) -> None:
        """Let the layer run with all of its weights where each process holds a part; all processes do it."""
        for name, p in self.layer.named_parameters():
            if is_shard(p):  # a part of a pass's values is in the parameter itself
                found = whole(p)
                found = found if self._type is None else found.to(self._type)
                self._values[name] = found.requires_grad_(p.requires_grad)

    def _run(self, hidden: Tensor) -> Tensor:
        """The layer's outputs; past the hooks by which a sharded one brings its weights together itself."""
        run: Any = self.layer.forward if isinstance(self.layer, FSDPModule) else self.layer
        return run(hidden)  # type: ignore[no-any-return]

    def own(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What the layer runs with in the place of those parameters that are its own, by their names."""
        mine = {id(p): self._values.get(name, p) for name, p in self.layer.named_parameters()}
        return {name: mine[id(p)] for name, p in parameters.items() if id(p) in mine}

    @contextmanager
    def capture(self, connected: bool = False) -> Iterator[list[Tensor]]:
        """While active, each forward of the model appends its `(b, L, D)` hidden states to the list yielded.

        The output layer itself then sees what `check` compares only, so that the full logits are never made.

        Args:
            connected: let gradients go on from there.
        """
        captured: list[Tensor] = []

        def keep_few(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(args[0])
            return (args[0][:COMPARED, -1:] if connected else _compared(args[0]), *args[1:])

        handle = self.layer.register_forward_pre_hook(keep_few)
        try:
            yield captured
        finally:
            handle.remove()

    @property
    def tail(self) -> LogitTail:
        """What the model does to the output layer's logits; the plain one before `check` has seen any."""
        return self._tail or self._tails[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., V)` of hidden states `(..., D)`, in float32 or better; see `outputs`."""
        return self.tail(self.outputs(hidden))

    def spans(self, width: int) -> list[tuple[int, int | None]]:
        """Bounds of the parts, of at most `width` tokens, that the layer is run in; one where it can't be divided."""
        if not self.divides or self.vocabulary <= width:
            return [(0, None)]
        starts = range(0, self.vocabulary, width)
        return [(start, min(start + width, self.vocabulary)) for start in starts]

    def outputs(self, hidden: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """What the output layer gives for hidden states `(..., D)`, in float32 or better whatever its precision.

        The layer, adapter on it included, runs with its weights in float32: those of 16 bits are converted part by
        part, or once per pass where it is run as a whole.

        Args:
            hidden: any.
            start: first token of the vocabulary.
            end: one after the last; None for the whole layer. A part can be had where the layer `divides`.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values = self.converted() if end is None else self._part(start, end)
        with torch.autocast(hidden.device.type, enabled=False), standing_in(self.layer, values):
            return self._run(hidden.to(dtype))

    def converted(self) -> dict[str, Tensor]:
        """What the layer runs with: stand-ins, and 16-bit weights in float32, converted once and kept."""
        if self._promoted is None:
            self._promoted = {
                name: t.to(torch.float32) if t.dtype in HALF else t
                for name, t in self._tensors().items()
                if t.dtype in HALF or name in self._values
            }
        return self._promoted

    def _tensors(self) -> dict[str, Tensor]:
        """The layer's parameters and buffers, or what stands in for them."""
        return {**dict(self.layer.named_parameters()), **dict(self.layer.named_buffers()), **self._values}

    def _part(self, start: int, end: int, convert: bool = True) -> dict[str, Tensor]:
        """What a part of the layer runs with: the rows of whatever has one for each token of the vocabulary."""
        found = {}
        for name, t in {**self._tensors(), **((convert and self._promoted) or {})}.items():
            rows = t[start:end] if t.dim() and t.shape[0] == self.vocabulary else t
            found[name] = rows.to(torch.float32) if convert and rows.dtype in HALF else rows
        return found

    def _can_be_divided(self, last: Tensor, output: Tensor, tolerance: float) -> bool:
        """Whether parts of the layer give parts of its output: tried at both ends of the vocabulary."""
        kind = type(self.layer).__name__
        if not all(t.is_floating_point() for t in self._tensors().values()):
            # of a quantised layer, which may prepare itself for good by what it is run with
            logger.debug("%s is run on the whole vocabulary: its weights are packed", kind)
            return False
        size = min(8, (self.vocabulary + 1) // 2)
        try:
            for start in (0, self.vocabulary - size):
                with standing_in(self.layer, self._part(start, start + size, convert=False)):
                    part = self._run(last)
                whole = output[..., start : start + size]
                if part.shape != whole.shape or not difference(part, whole) <= tolerance:
                    logger.debug("%s is run on the whole vocabulary: it can't be divided", kind)
                    return False
        except Exception as error:  # layers with sizes of their own raise whatever they like
            logger.debug("%s is run on the whole vocabulary: %s", kind, error)
            return False
        return True

    def check(self, hidden: Tensor, model_logits: Tensor) -> None:
        """Compare the output layer and tail, run on a few positions in the model's own type, with the model's logits.

        Raises:
            NumericalError: the model's logits are not finite, or are not what this head computes.
        """
        own = model_logits.detach().to(torch.float64)
        if not bool(torch.isfinite(own).all()):
            raise NumericalError(
                "expected finite logits, found NaN or infinity in the model's output; check the weights and ",
                Remedy.WEIGHT_TYPE,
                " (float16 overflows in many models, use bfloat16 or float32)",
            )
        with torch.no_grad():
            last = _compared(hidden)
            with standing_in(self.layer, self._values):
                output = self._run(last)
            half = min(torch.finfo(hidden.dtype).bits, torch.finfo(model_logits.dtype).bits) < 32
            tolerance = 1e-2 if half else 1e-4  # the tail itself rounds in half precision
            if self._tail is None:
                self._tail = choose_tail(self._tails, output, own, tolerance)
                self.vocabulary = output.shape[-1]
                self.divides = self._can_be_divided(last, output, tolerance)
            worst = difference(self._tail(output), own)
        if not worst <= tolerance:
            raise NumericalError(
                f"expected the model's logits to be its output layer applied to the hidden states, found a relative "
                f"difference of {worst:.2g}; the output layer of {type(self.layer).__name__} is followed by a "
                "transformation that is neither a scale nor a soft cap of its configuration"
            )


def _compared(hidden: Tensor) -> Tensor:
    """The positions `(k, 1, D)` that the model's own logits are made of: the last of the first sequences.

    Of values alone. Apart from one another in memory, or with tangents, torch would multiply each by a copy of the
    output layer's weights.
    """
    return forward_ad.unpack_dual(hidden[:COMPARED, -1:]).primal.detach().contiguous()
