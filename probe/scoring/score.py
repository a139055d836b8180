"""Scoring a batch: log-prob and exact entropy of every response token.

Scores stream over microbatches, so that memory does not grow with the size of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.scoring.collector import Collector, Progress
from probe.scoring.features import FeatureBasis
from probe.scoring.head import OutputHead, token_log_probs, token_statistics
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores


def score_tokens(
    policy: Policy, batch: RolloutBatch, progress: Progress | None = None, basis: FeatureBasis | None = None
) -> TokenScores:
    """Teacher-forced log-prob and exact entropy of every response token, without gradients.

    Args:
        policy: the policy, at the weights to score with.
        batch: `B` responses.
        progress: called after each microbatch.
        basis: also give the features of states and tokens that control variates are made of.

    Returns:
        `(B, T)` arrays in float64 on the CPU. A value does not depend on the microbatch size beyond rounding.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: a score is not finite.
    """
    collector = Collector(batch, progress)
    with torch.no_grad():
        for chunk in scored_chunks(policy, batch, basis):
            collector.add(chunk.sequence, chunk.position, *chunk.values)
            collector.advance(chunk.finished)
    return collector.finish()


@dataclass(frozen=True)
class ScoredChunk:
    """Scores of `n` response tokens, as a pass comes by them.

    Attributes:
        sequence: index of each token's sequence, `(n,)`, CPU.
        position: its position in the response, `(n,)`, CPU.
        values: `(l, h)`, both `(n,)`, and with a basis the expected token features `(n, K)` and the state features
            `(n, K_state)` as well.
        finished: number of sequences that this chunk completes.
    """

    sequence: Tensor
    position: Tensor
    values: tuple[Tensor, ...]
    finished: int


def scored_chunks(
    policy: Policy, batch: RolloutBatch, basis: FeatureBasis | None = None
) -> Iterator[ScoredChunk]:
    """Run the policy over a batch and yield its scores a few tokens at a time, in whatever grad mode is on."""
    head = OutputHead(policy.model, policy.values)
    for inputs in policy.microbatches(batch):
        hidden = policy.hidden_states(head, inputs)
        for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
            states = hidden[rows.to(hidden.device)]
            labels = inputs.labels[rows].to(hidden.device)
            logp = token_log_probs(head.logits(states), policy.temperature)
            values: tuple[Tensor, ...] = token_statistics(logp, labels)
            if basis is not None:
                values = (*values, *basis.of(logp, states))
            last = int(rows[-1]) == len(inputs.labels) - 1
            yield ScoredChunk(
                inputs.sequence[rows], inputs.position[rows], values, inputs.size if last else 0
            )
