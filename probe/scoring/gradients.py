"""Gradients of weighted sums of log-probs and entropies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.distributed.lockstep import Lockstep
from probe.errors.exceptions import NumericalError
from probe.errors.memory import is_out_of_memory
from probe.scoring.collector import Collector, Progress
from probe.scoring.fused_head import head_gradients
from probe.scoring.head import OutputHead
from probe.scoring.microbatch import MicroBatch
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores
from probe.scoring.together import together
from probe.shards import first_nonfinite, is_shard, part_like
from probe.snapshot import put_back_by

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
    with (
        _no_gradients_yet(parameters),
        together(policy, "gradients", lambda k, scale: totals.collect(k, policy.ranks.size, scale)) as step,
        torch.enable_grad(),
    ):
        head = OutputHead(policy.model)
        own = head.own(parameters)
        totals.begin_head(own)

        def add(inputs: MicroBatch) -> int:
            hidden = policy.hidden_states(head, inputs)
            through_head, of_head = _head_gradients(
                policy, head, hidden, inputs, weights, objectives, collector, own
            )
            _network_gradients(hidden, through_head, totals, step)
            for k, found in enumerate(of_head):
                totals.add_of_head(k, found)
            return inputs.size

        for size in policy.each(batch, add, "backward"):
            collector.advance(size)
    policy.ranks.add_up("gradients", totals.apart())
    return totals.finish(), collector.finish()


@contextmanager
def _no_gradients_yet(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put a sharded policy's gradients aside: a backward leaves its own there. The same objects come back."""
    sharded = any(is_shard(p) for p in parameters.values())
    held = [(p, p.grad) for p in parameters.values() if sharded]

    def restore() -> None:
        for p, grad in held:
            p.grad = grad

    with put_back_by(restore):
        for p, _ in held:
            p.grad = None
        yield


def _head_gradients(
    policy: Policy,
    head: OutputHead,
    hidden: Tensor,
    inputs: MicroBatch,
    weights: TokenWeights,
    objectives: int,
    collector: Collector,
    own: Mapping[str, Tensor],
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


def _network_gradients(
    hidden: Tensor, grads: list[Tensor], totals: _Totals, step: Lockstep | None = None
) -> None:
    """Carry the gradients by `hidden` down the network and add them to `totals`.

    Args:
        hidden: of a microbatch's tokens.
        grads: of each objective, by them.
        totals: to add to.
        step: the turns of a sharded policy, whose gradients each process has a part of.

    Raises:
        torch.OutOfMemoryError: there is no memory for the first; nothing has been added.
        NumericalError: there is none for a later one.
    """
    if not hidden.requires_grad:  # only the output layer is trainable
        return
    parameters = list(totals.parameters.values())
    for k, grad in enumerate(grads):
        if step is not None:
            exponent = round(math.log2(float16_scale(grad))) if hidden.dtype == torch.float16 else 0
            step.backward(hidden, grad, k, last=k == len(grads) - 1, exponent=exponent)
            continue
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
        self._of_head: list[dict[str, Tensor]] = [{} for _ in range(objectives)]

    def begin_head(self, own: Mapping[str, Tensor]) -> None:
        """Args: `own`, what the output layer runs with in the place of sharded parameters, on every process alike."""
        for name, x in own.items():
            if is_shard(self.parameters[name]):
                dtype = self.values[0][name].dtype
                for of_head in self._of_head:
                    of_head[name] = torch.zeros_like(x, dtype=dtype)

    def add_of_head(self, k: int, grads: Mapping[str, Tensor]) -> None:
        """Add gradients of the objective `k` by the output layer's own parameters; of sharded ones by all of them."""
        for name, grad in grads.items():
            (self._of_head[k] if name in self._of_head[k] else self.values[k])[name] += grad

    def collect(self, k: int, size: int, scale: float) -> None:
        """Take the gradients of the objective `k` from sharded parameters, where a backward has left their mean.

        Args:
            k: the objective.
            size: number of processes.
            scale: that the gradients were multiplied by.
        """
        for name, p in self.parameters.items():
            if p.grad is not None:
                total = self.values[k][name]
                total += p.grad.to(total.dtype) * ((size if is_shard(p) else 1) / scale)
                p.grad = None

    def apart(self) -> list[Tensor]:
        """What each process has a summand of: all but the gradients of sharded parameters."""
        whole = [x for values in self.values for x in values.values() if not is_shard(x)]
        return [*whole, *(x for of_head in self._of_head for x in of_head.values())]

    def add(self, k: int, names: Iterable[str], grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Add gradients of the objective `k`, which were multiplied by `scale`."""
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                self.values[k][name] += grad / scale if scale != 1.0 else grad

    def finish(self) -> list[dict[str, Tensor]]:
        """The gradients, checked."""
        for values, of_head in zip(self.values, self._of_head, strict=True):
            for name, grad in of_head.items():
                values[name] += part_like(grad, values[name])
            if (bad := first_nonfinite(values)) is not None:
                raise NumericalError(f"expected finite gradients, found NaN or infinity in that of {bad}")
        return [
            {name: total.to(self.parameters[name].dtype) for name, total in values.items()}
            for values in self.values
        ]


def _sum_type(parameter: nn.Parameter, exact: bool) -> torch.dtype:
    """The type that gradients of a parameter are summed in."""
    return torch.float64 if exact and parameter.device.type in ("cpu", "cuda") else parameter.dtype
