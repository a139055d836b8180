"""From hidden states to log-probs and entropies: the model's output head, a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import NumericalError


def token_statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each row's distribution, `pi = softmax(logits / temperature)`.

    Args:
        logits: `(n, V)`, float32 or float64: half-precision logits cost 2e-2 nats per token.
        labels: `(n,)` token ids.
        temperature: the sampling temperature `tau`.

    Returns:
        `(l, h)`, both `(n,)` in nats: `l = log pi(label)` and `h = -sum_v pi(v) log pi(v)` over the whole vocabulary.

    Example:
        >>> l, h = token_statistics(torch.zeros(1, 4), torch.tensor([2]), temperature=1.0)
        >>> bool(torch.allclose(-l, h)) and round(h.item(), 6)  # both are log 4
        1.386294
    """
    logp = torch.log_softmax(logits / temperature, dim=-1)
    logprob = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    return logprob, entropy


class OutputHead:
    """The map from the last hidden states to logits, as the model itself computes it.

    Hidden states are captured where they enter the model's output layer, so that only response positions go
    through the vocabulary product and only a chunk of their logits exists at a time. What a model does to the
    logits after that layer (soft-capping, scaling) is applied from its configuration; `check` compares the outcome
    with the model's own logits.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the output layer of `model` (a transformers causal LM, possibly wrapped by peft)."""
        layer = model.get_output_embeddings()  # type: ignore[operator]
        if layer is None:
            raise NumericalError(
                f"expected a causal language model with an output layer, found {type(model).__name__}, whose "
                "get_output_embeddings() is None; load it with AutoModelForCausalLM"
            )
        self.layer: nn.Module = layer
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        caps = [getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
        self._softcap: float | None = next((float(cap) for cap in caps if cap is not None), None)
        self._scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere multiplies
        self._scale /= float(getattr(text, "logits_scaling", None) or 1.0)  # Granite divides
        self._promoted: dict[str, Tensor] | None = None

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """While active, each forward of the model appends its `(b, L, D)` hidden states to the list yielded.

        The output layer itself then sees the last position only, so that the full logits are never made.
        """
        captured: list[Tensor] = []

        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(args[0])
            return (args[0][:, -1:], *args[1:])

        handle = self.layer.register_forward_pre_hook(keep_last)
        try:
            yield captured
        finally:
            handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., V)` of hidden states `(..., D)`, in float32 or better whatever the model's precision.

        The output layer, adapter on it included, runs with its weights in float32; those that are not are converted
        once per pass.
        """
        if self._promoted is None:
            tensors = {**dict(self.layer.named_parameters()), **dict(self.layer.named_buffers())}
            self._promoted = {
                name: t.to(torch.float32)
                for name, t in tensors.items()
                if t.dtype in (torch.float16, torch.bfloat16)
            }
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._tail(torch.func.functional_call(self.layer, self._promoted, (hidden.to(dtype),)))

    def _tail(self, logits: Tensor) -> Tensor:
        """What the model does to its logits after the output layer."""
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def check(self, hidden: Tensor, model_logits: Tensor) -> None:
        """Compare the output layer and tail, run at the last position in the model's own type, with the model's logits.

        Raises:
            NumericalError: the model's logits are not finite, or are not what this head computes.
        """
        own = model_logits.detach().to(torch.float64)
        if not bool(torch.isfinite(own).all()):
            raise NumericalError(
                "expected finite logits, found NaN or infinity in the model's output; check the weights and "
                "checkpoint.dtype (float16 overflows in many models, use bfloat16 or float32)"
            )
        with torch.no_grad():
            mine = self._tail(self.layer(hidden[:, -1:].detach())).to(own)
        half = min(torch.finfo(hidden.dtype).bits, torch.finfo(model_logits.dtype).bits) < 32
        tolerance = 1e-2 if half else 1e-4  # the tail itself rounds in half precision
        worst = float((own - mine).abs().max() / own.abs().max().clamp_min(1.0))
        if worst > tolerance:
            raise NumericalError(
                f"expected the model's logits to be its output layer applied to the hidden states, found a relative "
                f"difference of {worst:.2g}; the output head of {type(self.layer).__name__} is followed by a "
                "transformation this package does not know"
            )
