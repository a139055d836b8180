"""The gradient of the expected reward, `grad R = E[ sum_t grad l_t (R - b) ]`, as weights of the tokens of a batch.

The batch has to be one that the update has not been made from: on its own samples an update looks better than it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.errors.exceptions import DataError


def reward_weights(rewards: Tensor, mask: Tensor) -> Tensor:
    """Weights of `grad l[i, t]` whose mean over the rewarded responses is the gradient of the expected reward.

    Every token of response `i` has the weight `R_i - b_i`, with `b_i` the mean reward of the *other* responses, which
    makes the gradient unbiased: `R_i` is independent of them given the prompts. A lone response has `b = 0`. Williams,
    Simple statistical gradient-following algorithms (1992); leave-one-out: Kool et al. (2019), Ahmadian et al.
    (arXiv:2402.14740).

    Args:
        rewards: `(B,)`, NaN where no reward applies: such responses have weight 0.
        mask: `(B, T)` bool, the response tokens.

    Raises:
        DataError: no response has a reward, or one is infinite.

    >>> reward_weights(torch.tensor([1.0, 0.0, float("nan")]), torch.ones(3, 1, dtype=torch.bool)).tolist()
    [[1.0], [-1.0], [0.0]]
    """
    values = rewards.double()
    there = ~values.isnan()
    if not bool(there.any()):
        raise DataError("expected rewards of E, found that none applies to any of its responses")
    if bool(values.isinf().any()):
        raise DataError("expected finite rewards of E, found an infinite one")
    kept, count = torch.where(there, values, 0.0), int(there.sum())
    others = (kept.sum() - kept) / max(count - 1, 1)
    centred = torch.where(there, kept - (others if count > 1 else 0.0), 0.0)
    return centred.unsqueeze(1) * mask.double()
