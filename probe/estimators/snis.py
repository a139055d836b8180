"""deltaH_true = H(theta + step) - H(theta) on the same E, by self-normalised importance sampling (SNIS).

With `w_i = exp(S_new_i - S_old_i)` the weight of a whole sequence and `N_i` its entropy summed over tokens (which
replaces `-log pi(y)` by its conditional mean: Rao-Blackwellisation),

    H_seq(theta + step) = sum w N_new / sum w,        H_tok(theta + step) = sum w N_new / sum w T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.errors import NumericalError
from probe.scoring.scores import TokenScores

NORMAL_975 = 1.959963984540054
"""0.975 quantile of the standard normal distribution: half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class EntropyChange:
    """One estimand of the ground truth.

    Attributes:
        H_orig: entropy at `theta`, nats.
        H_upd: entropy at `theta + step`, nats.
        delta: `H_upd - H_orig`.
        se: standard error of `delta` over E, by the influence function, with prompts as the independent units;
            both entropies come from the same sequences, so their common error cancels.
    """

    H_orig: float
    H_upd: float
    delta: float
    se: float

    @property
    def ci95(self) -> tuple[float, float]:
        """`delta` minus and plus 1.96 standard errors."""
        return self.delta - NORMAL_975 * self.se, self.delta + NORMAL_975 * self.se


@dataclass(frozen=True)
class GroundTruth:
    """The measured entropy change.

    Attributes:
        sequence: nats per response.
        token: nats per token.
        ess: effective sample size `(sum w)^2 / sum w^2`, at most `B`.
        w_max: largest weight, the weights' mean being 1.
        w_min: smallest weight.
        weights: `(B,)` float64, mean 1.
        log_weights: `S_new - S_old`, `(B,)` float64, unshifted.
        scores_new: scores of E at `theta + step`.
    """

    sequence: EntropyChange
    token: EntropyChange
    ess: float
    w_max: float
    w_min: float
    weights: Tensor
    log_weights: Tensor
    scores_new: TokenScores


def snis(old: TokenScores, new: TokenScores, group: Tensor | None = None) -> GroundTruth:
    """Measure the entropy change from scores of the same sequences before and after the update.

    The estimate is consistent, with a bias of order `1 / B`. The standard errors are those of the ratio's influence
    function, e.g. `(w_i / mean(w)) (N_new_i - H_upd) - (N_old_i - H_orig)` for `sequence`, summed within each of the
    `P` groups: `sqrt(P / (P - 1) sum_p s_p^2) / B`.

    Args:
        old: scores of E under the policy that sampled it, `B` sequences.
        new: scores of E under the updated policy.
        group: `(B,)` int64, equal for responses to the same draw of a prompt, which are not independent of each
            other; by default every sequence is its own group.

    Raises:
        ValueError: the batches differ in shape.
        NumericalError: a log-weight is not finite.

    Example:
        >>> l, h = torch.log(torch.tensor([[0.5], [0.5]])).double(), torch.tensor([[0.7], [0.7]]).double()
        >>> old = TokenScores(l, h, torch.ones(2, 1, dtype=torch.bool))
        >>> snis(old, old).sequence.delta  # no update, no change, exactly
        0.0
    """
    if old.logprob.shape != new.logprob.shape:
        raise ValueError(
            f"expected scores of the same batch, found {old.logprob.shape} and {new.logprob.shape}"
        )
    log_weights = (new.logprob - old.logprob).sum(dim=1)
    if not bool(torch.isfinite(log_weights).all()):
        raise NumericalError(
            f"expected finite log-weights, found {int((~torch.isfinite(log_weights)).sum())} that are not; the update "
            "is too large for importance sampling (lower probe_rework.learning_rate)"
        )
    weights = (log_weights - log_weights.max()).exp()
    weights = weights / weights.mean()
    return GroundTruth(
        sequence=_change(
            weights, old.sequence_entropy, new.sequence_entropy, torch.ones_like(weights), group
        ),
        token=_change(weights, old.sequence_entropy, new.sequence_entropy, old.lengths, group),
        ess=float(weights.sum() ** 2 / (weights**2).sum()),
        w_max=float(weights.max()),
        w_min=float(weights.min()),
        weights=weights,
        log_weights=log_weights,
        scores_new=new,
    )


def _change(w: Tensor, N_old: Tensor, N_new: Tensor, size: Tensor, group: Tensor | None) -> EntropyChange:
    """Change of the ratio `E[N] / E[size]`, with its standard error."""
    B = len(w)
    H_orig = N_old.mean() / size.mean()
    H_upd = (w * N_new).mean() / (w * size).mean()
    influence = w * (N_new - H_upd * size) / (w * size).mean() - (N_old - H_orig * size) / size.mean()
    if group is not None:
        _, member = group.unique(return_inverse=True)
        influence = torch.zeros(int(member.max()) + 1, dtype=w.dtype).index_add_(0, member, influence)
    P = len(influence)
    se = float((P / (P - 1) * influence.square().sum()).sqrt() / B) if P > 1 else float("inf")
    return EntropyChange(H_orig=float(H_orig), H_upd=float(H_upd), delta=float(H_upd - H_orig), se=se)
