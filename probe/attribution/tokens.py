"""The tokens of an update as the formulas of the literature see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateTokens:
    """U, `B` responses of at most `T` tokens; float64, 0 outside the mask.

    Attributes:
        mask: `(B, T)` bool, the response tokens.
        logprob: `l`, `(B, T)` nats, under the policy as it is.
        entropy: `h`, `(B, T)` nats.
        old_logprob: under the policy that sampled, `(B, T)`; that as it is where nothing else is known.
        advantages: `A`, `(B,)`.
        expected_discriminator: see `probe.scoring.distribution`, `(B, T)`.
        group: `(B,)` prompts.
        rewards: `(B,)`, NaN where none applies; None where only advantages are known.
        last_layer: derivatives of `l` along the gradient by the output layer's weight of the entropy at E's states,
            `(B, T)`; None where nobody took them.
        classes: which tokens are of a class, `(B, T)` bool by its name.
    """

    mask: Tensor
    logprob: Tensor
    entropy: Tensor
    old_logprob: Tensor
    advantages: Tensor
    expected_discriminator: Tensor
    group: Tensor
    rewards: Tensor | None = None
    last_layer: Tensor | None = None
    classes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def A(self) -> Tensor:  # noqa: N802
        """The advantage of each token, `(B, T)`."""
        return self.advantages.double().unsqueeze(1).expand_as(self.logprob)

    @property
    def p(self) -> Tensor:
        """The probability of each token."""
        return self.logprob.exp()

    @property
    def discriminator(self) -> Tensor:
        """`S_y = p (h + log p)`: what the entropy loses per unit by which the token's logit is raised, nats."""
        return self.p * (self.entropy + self.logprob)

    @property
    def covariance(self) -> Tensor:
        """`(A - mean A) (log p - mean log p)`, means over all response tokens of the batch (arXiv:2505.22617)."""
        return self._centred(self.A) * self._centred(self.logprob)

    def _centred(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x - x[self.mask].mean(), 0.0)

    def spread(self, x: Tensor) -> float:
        """The standard deviation of `x` over the response tokens (divisor: their number)."""
        return float(x[self.mask].std(unbiased=False))

    def top(self, x: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """Which tokens have the `count` largest `x`, `(B, T)` bool.

        Args:
            x: `(B, T)`.
            count: how many.
            among: `(B, T)` bool; all response tokens by default.
        """
        eligible = (self.mask if among is None else among).flatten()
        values = torch.where(eligible, x.flatten(), -torch.inf)
        chosen = torch.zeros_like(eligible)
        chosen[values.argsort(descending=True, stable=True)[: max(min(count, int(eligible.sum())), 0)]] = True
        return chosen.reshape(self.mask.shape)

    def surprising(self, among: Tensor, share: float) -> Tensor:
        """Which tokens are in the `share` of highest surprisal `-l` among some, `(B, T)` bool; rounded up."""
        of = self.mask & among
        return self.top(-self.logprob, math.ceil(share * int(of.sum())), of)
