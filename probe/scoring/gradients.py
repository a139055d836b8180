"""Gradients of weighted sums of log-probs and entropies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.errors.memory import is_out_of_memory
from probe.scoring.collector import Collector, Progress
from probe.scoring.fused_head import head_gradients
from probe.scoring.head import OutputHead
from probe.scoring.microbatch import MicroBatch
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores
from probe.scoring.together import together

EXACT_SUMS = 2**26
"""Up to so many numbers are summed over microbatches and ranks in float64: the sum hardly depends on their order, and
so on the number of ranks. Half a gigabyte at most; the gradients of larger models are summed in their own type."""
TokenWeights = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(sequence, position, l, h) -> (a, b)`: for `n` tokens, given their place in the batch and their detached scores
(all `(n,)`, CPU, float64), the constant weights `(K, n)` of `l` and of `h` in each of `K` objectives."""


def token_gradients(
    policy: Policy,
    batch: RolloutBatch,
    weights: TokenWeights,
    objectives: int,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Tensor]], TokenScores]:
    """Gradients of `sum_(i,t) a_k[i,t] l[i,t] + b_k[i,t] h[i,t]` for `k = 1..K`, the weights being constants.

    Since the weights are constants, the gradient of a chunk's logits is taken as soon as they exist: each chunk goes
    through the output head once, and the network below it is run once forward and `K` times backward.

    Args:
        policy: the policy; gradients are with respect to `policy.parameters`.
        batch: `B` responses.
        weights: gives the weights, see `TokenWeights`.
        objectives: `K`.
        progress: called after each microbatch.

    Returns:
        `K` dictionaries of gradients by parameter name (shape and type of the parameter; the parameters' own `.grad`
        is not touched), and the scores seen on the way.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: there is nothing to train, or a score or gradient is not finite.
    """
    parameters = policy.parameters
    if not parameters:
        raise NumericalError("expected trainable parameters, found none with requires_grad=True")
    totals = _Totals(parameters, objectives)
    collector = Collector(batch, progress, policy.ranks)
    head = OutputHead(policy.model)
    own = {n: p for n, p in parameters.items() if any(p is q for q in head.layer.parameters())}

    def add(inputs: MicroBatch) -> int:
        hidden = policy.hidden_states(head, inputs)
        through_head, of_head = _head_gradients(
            policy, head, hidden, inputs, weights, objectives, collector, own
        )
        _network_gradients(hidden, through_head, totals)
        for k, found in enumerate(of_head):
            totals.add(k, found, list(found.values()))
        return inputs.size

    with together(policy, "gradients"), torch.enable_grad():
        for size in policy.each(batch, add, "backward"):
            collector.advance(size)
    policy.ranks.add_up("gradients", [x for values in totals.values for x in values.values()])
    return totals.finish(), collector.finish()


def _head_gradients(
    policy: Policy,
    head: OutputHead,
    hidden: Tensor,
    inputs: MicroBatch,
    weights: TokenWeights,
    objectives: int,
    collector: Collector,
    own: Mapping[str, nn.Parameter],
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Gradients of each objective by `hidden`, `(n, D_model)` in float32 or better, and by parameters of the head."""
    of_head: list[dict[str, Tensor]] = [{} for _ in range(objectives)]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    grads = [torch.zeros_like(hidden, dtype=dtype) for _ in range(objectives)]
    for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
        on_device = rows.to(hidden.device)
        sequence, position = inputs.sequence[rows], inputs.position[rows]

        def constants(
            l: Tensor, h: Tensor, sequence: Tensor = sequence, position: Tensor = position
        ) -> tuple[Tensor, Tensor]:
            a, b = weights(sequence, position, *collector.add(sequence, position, l, h)[:2])
            return a.to(l), b.to(h)

        states, labels = hidden.detach()[on_device].to(dtype), inputs.labels[rows].to(hidden.device)
        found = head_gradients(head, states, labels, policy.temperature, constants, list(own.values()))
        for k, (by_states, *by_own) in enumerate(found):
            if by_states is not None:
                grads[k][on_device] = by_states
            for name, grad in zip(own, by_own, strict=True):
                if grad is not None:
                    of_head[k][name] = of_head[k][name] + grad if name in of_head[k] else grad
    return grads, of_head


def _network_gradients(hidden: Tensor, grads: list[Tensor], totals: _Totals) -> None:
    """Carry the gradients by `hidden` down the network and add them to `totals`.

    Raises:
        torch.OutOfMemoryError: there is no memory for the first; nothing has been added.
        NumericalError: there is none for a later one.
    """
    if not hidden.requires_grad:  # only the output layer is trainable
        return
    parameters = list(totals.parameters.values())
    for k, grad in enumerate(grads):
        scale = float16_scale(grad) if hidden.dtype == torch.float16 else 1.0
        try:
            found = torch.autograd.grad(
                hidden,
                parameters,
                grad_outputs=(grad * scale).to(hidden.dtype),
                retain_graph=k < len(grads) - 1,
                allow_unused=True,
            )
        except (RuntimeError, MemoryError) as error:
            if k == 0 or not is_out_of_memory(error):
                raise
            raise NumericalError(
                f"expected memory for {len(grads)} backwards of a microbatch, found it gone after {k}: something else "
                "has taken it meanwhile; run again with a smaller memory_config.tokens_per_microbatch"
            ) from error
        totals.add(k, totals.parameters, found, scale)


def float16_scale(grad: Tensor) -> float:
    """The power of two that brings the largest entry of a gradient to about 1.

    Weights are of the order of one over the number of tokens, or of an entropy in nats: float16 flushes the former to
    zero in the layers below and overflows on the latter. A power of two is undone without rounding.

    >>> float16_scale(torch.tensor([0.1, -0.26]))
    2.0
    """
    largest = float(grad.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0


class _Totals:
    """The gradients of the objectives, summed over microbatches."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], objectives: int) -> None:
        self.parameters = parameters
        exact = sum(p.numel() for p in parameters.values()) * objectives <= EXACT_SUMS
        self.values = [
            {name: torch.zeros_like(p, dtype=_sum_type(p, exact)) for name, p in parameters.items()}
            for _ in range(objectives)
        ]

    def add(self, k: int, names: Iterable[str], grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Add gradients of the objective `k`, which were multiplied by `scale`."""
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                self.values[k][name] += grad / scale if scale != 1.0 else grad

    def finish(self) -> list[dict[str, Tensor]]:
        """The gradients, checked."""
        for values in self.values:
            for name, total in values.items():
                if not bool(torch.isfinite(total).all()):
                    raise NumericalError(
                        f"expected finite gradients, found NaN or infinity in that of {name}"
                    )
        return [
            {name: total.to(self.parameters[name].dtype) for name, total in values.items()}
            for values in self.values
        ]


def _sum_type(parameter: nn.Parameter, exact: bool) -> torch.dtype:
    """The type that gradients of a parameter are summed in."""
    return torch.float64 if exact and parameter.device.type in ("cpu", "cuda") else parameter.dtype
