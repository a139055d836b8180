"""Gradients by the output layer's weight alone, whether it is trained or not: what a cheap kernel between tokens knows.

For outputs `o = W s` of a hidden state `s`, `G = sum_e (d h_e / d o_e) s_e'` is the gradient by `W` of the entropies of
some tokens `e`, and the derivative of a log-prob along it is `(d l / d o) . (G s)`: a product of how alike the outputs'
gradients are and how alike the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.scoring.collector import Collector, Progress
from probe.scoring.head import OutputHead, token_log_probs, token_statistics
from probe.scoring.microbatch import MicroBatch
from probe.scoring.policy import Policy
from probe.scoring.together import together


def last_layer_gradient(policy: Policy, batch: RolloutBatch, progress: Progress | None = None) -> Tensor:
    """`G = 1 / B` times the gradient of the sum of the entropies of a batch's tokens by the output layer's weight.

    Args:
        policy: at the weights to differentiate at.
        batch: `B` responses.
        progress: called after each microbatch.

    Returns:
        `(V, D_model)` float32, nats per response.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: a score is not finite.
    """
    collector, found = Collector(batch, progress, policy.ranks), torch.zeros(0)

    def of_chunk(inputs: MicroBatch, rows: Tensor, states: Tensor, by_output: _ByOutput) -> Tensor:
        scores, of_h = by_output(1)
        collector.add(inputs.sequence[rows], inputs.position[rows], *scores)
        return of_h.T @ states / len(batch)

    for own in _each(policy, batch, "output layer's gradient", of_chunk, collector):
        found = found + own if found.numel() else own
    collector.finish()
    if policy.ranks.size > 1:
        shape = policy.ranks.gathered("shape of the output layer", tuple(found.shape))
        found = found if found.numel() else torch.zeros(next(s for s in shape if s != (0,)))
        policy.ranks.add_up("output layer's gradient", [found])
    return found


def last_layer_tangents(
    policy: Policy, batch: RolloutBatch, G: Tensor, progress: Progress | None = None
) -> Tensor:
    """Derivatives of the log-probs of a batch along a change `G` of the output layer's weight, `(B, T)` float64.

    Args:
        policy: at the weights to differentiate at.
        batch: `B` responses.
        G: `(V, D_model)`.
        progress: called after each microbatch.

    Raises:
        RolloutError: all responses are empty.
    """
    collector = Collector(batch, progress, policy.ranks)

    def of_chunk(inputs: MicroBatch, rows: Tensor, states: Tensor, by_output: _ByOutput) -> Tensor:
        _, of_l = by_output(0)
        dl = (of_l.double() * (states @ G.to(states).T).double()).sum(-1)
        collector.add(inputs.sequence[rows], inputs.position[rows], dl)
        return dl.sum()

    for _ in _each(policy, batch, "derivatives along the output layer", of_chunk, collector):
        pass
    return collector.arrays()[0]


_ByOutput = Callable[[int], tuple[tuple[Tensor, Tensor], Tensor]]
"""Gives `(l, h)` of some tokens, and the gradient of the first or the second by the layer's outputs."""


def _each(
    policy: Policy,
    batch: RolloutBatch,
    what: str,
    of_chunk: Callable[[MicroBatch, Tensor, Tensor, _ByOutput], Tensor],
    collector: Collector,
) -> Iterator[Tensor]:
    """Go over a batch a few tokens at a time; the sums over microbatches of what `of_chunk` gives."""
    with together(policy, what), torch.no_grad():
        head = OutputHead(policy.model, policy.values)

        def run(inputs: MicroBatch) -> tuple[int, Tensor]:
            hidden, total = policy.hidden_states(head, inputs), torch.zeros(())
            for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
                states, labels = hidden[rows.to(hidden.device)], inputs.labels[rows].to(hidden.device)
                states = states.to(torch.promote_types(states.dtype, torch.float32))

                def by_output(
                    which: int, states: Tensor = states, labels: Tensor = labels
                ) -> tuple[tuple[Tensor, Tensor], Tensor]:
                    outputs = head.outputs(states).detach()
                    with torch.enable_grad():
                        outputs.requires_grad_()
                        logp = token_log_probs(head.tail(outputs), policy.temperature)
                        found = token_statistics(logp, labels)
                        (gradient,) = torch.autograd.grad(found[which].sum(), outputs)
                    return found, gradient

                total = total + of_chunk(inputs, rows, states, by_output)
            return inputs.size, total

        for size, total in policy.each(batch, run):
            collector.advance(size)
            yield total
