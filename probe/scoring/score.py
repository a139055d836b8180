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
from probe.scoring.fused_head import token_values
from probe.scoring.head import OutputHead, token_log_probs, token_statistics
from probe.scoring.microbatch import MicroBatch
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores
from probe.scoring.together import together
from probe.scoring.traffic import Kind


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
    collector = Collector(batch, progress, policy.ranks)
    with together(policy, "scores"), torch.no_grad():
        for chunk in scored_chunks(policy, batch, basis):
            collector.add(chunk.sequence, chunk.position, *chunk.values)
            collector.advance(chunk.finished)
    return collector.finish()


def score_rows(
    policy: Policy, batch: RolloutBatch, rows: Tensor, into: TokenScores, progress: Progress | None = None
) -> None:
    """Score some responses of a batch, into scores of all.

    Args:
        policy: at any point.
        batch: any.
        rows: of it; empty responses have no scores.
        into: of the batch, overwritten at these rows.
        progress: called after each microbatch.

    Raises:
        NumericalError: a score is not finite.
    """
    if bool(batch.mask[rows].any()):
        found = score_tokens(policy, batch.subset(rows), progress)
        into.logprob[rows], into.entropy[rows] = found.logprob, found.entropy


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
    policy: Policy, batch: RolloutBatch, basis: FeatureBasis | None = None, kind: Kind = "forward"
) -> Iterator[ScoredChunk]:
    """Run the policy over a batch and yield its scores, in whatever grad mode is on.

    With grad mode off the vocabulary goes by in tiles (`token_values`); nested derivatives, which need it on, take
    tables of a few tokens by the vocabulary.
    """
    head = OutputHead(policy.model, policy.values)

    def scored(inputs: MicroBatch) -> list[ScoredChunk]:
        hidden = policy.hidden_states(head, inputs)
        labels = inputs.labels.to(hidden.device)
        if not torch.is_grad_enabled():
            found = token_values(head, hidden, labels, policy.temperature, policy.head_chunk_tokens, basis)
            return [ScoredChunk(inputs.sequence, inputs.position, found, inputs.size)]
        return list(_by_tables(policy, head, inputs, hidden, labels, basis))

    for chunks in policy.each(batch, scored, kind):
        yield from chunks


def _by_tables(
    policy: Policy,
    head: OutputHead,
    inputs: MicroBatch,
    hidden: Tensor,
    labels: Tensor,
    basis: FeatureBasis | None,
) -> Iterator[ScoredChunk]:
    """The scores of a microbatch from log-probs of a few tokens by the whole vocabulary."""
    for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
        on_device = rows.to(hidden.device)
        states = hidden[on_device]
        logp = token_log_probs(head.logits(states), policy.temperature)
        values: tuple[Tensor, ...] = token_statistics(logp, labels[on_device])
        if basis is not None:
            values = (*values, *basis.of(logp, states))
        last = int(rows[-1]) == len(inputs.labels) - 1
        yield ScoredChunk(inputs.sequence[rows], inputs.position[rows], values, inputs.size if last else 0)
