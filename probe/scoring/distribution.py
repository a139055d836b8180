"""What the distribution of each token is like beside its entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.scoring.collector import Collector, Progress
from probe.scoring.head import OutputHead, token_log_probs
from probe.scoring.microbatch import MicroBatch
from probe.scoring.policy import Policy
from probe.scoring.together import together


def expected_discriminator(policy: Policy, batch: RolloutBatch, progress: Progress | None = None) -> Tensor:
    """`E_pi[S]` of every token's distribution, `(B, T)` float64 nats, with `S(v) = pi(v) (h + log pi(v))`.

    `S` is what the entropy loses per unit by which the logit of `v` is raised (arXiv:2602.03392):
    `d h / d z_v = -pi(v) (h + log pi(v))`.

    Args:
        policy: at the weights to look at.
        batch: `B` responses.
        progress: called after each microbatch.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: a value is not finite.
    """
    collector = Collector(batch, progress, policy.ranks)

    with together(policy, "distributions"), torch.no_grad():
        head = OutputHead(policy.model, policy.values)

        def add(inputs: MicroBatch) -> int:
            hidden = policy.hidden_states(head, inputs)
            for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
                logp = token_log_probs(head.logits(hidden[rows.to(hidden.device)]), policy.temperature)
                p = logp.exp()
                h = -torch.where(p > 0, p * logp, 0.0).sum(-1, keepdim=True)
                S = torch.where(p > 0, p * (h + logp), 0.0)
                collector.add(inputs.sequence[rows], inputs.position[rows], (p * S).sum(-1))
            return inputs.size

        for size in policy.each(batch, add):
            collector.advance(size)
    return collector.arrays()[0]
