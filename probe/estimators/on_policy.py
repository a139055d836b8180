"""Whether sequences were drawn from the policy that scored them."""

from __future__ import annotations

from probe.scoring.scores import TokenScores

ON_POLICY_LIMIT = 4.0
"""E is marked as not drawn from the probed policy when `on_policy_z` is larger than this."""


def on_policy_z(scores: TokenScores) -> float:
    """How many standard errors the mean of `sum_t (l + h)` lies from 0, its exact mean on samples of the policy.

    Large for sequences that were not drawn from the policy that scored them. 0 where it cannot be estimated.
    """
    gap = scores.sequence_logprob + scores.sequence_entropy
    if len(gap) < 2:
        return 0.0
    se = float(gap.std() / len(gap) ** 0.5)
    return float(gap.mean()) / se if se > 0 else 0.0
