"""Token-level scores of a batch: log-prob of the sampled token and entropy of its distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_CHOICE = 1e-15
"""Nats per token up to which a distribution is one token: less than the rounding of any arithmetic in use."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of `B` sequences of at most `T` tokens under one set of weights; CPU, float64, 0 outside `mask`.

    Attributes:
        logprob: `l[i, t] = log pi(y_t | x, y_<t)` in nats, `(B, T)`.
        entropy: `h[i, t]`, entropy of `pi(. | x, y_<t)` over the whole vocabulary in nats, `(B, T)`.
        mask: `(B, T)` bool, the response tokens.
        expected_features: `E_pi[psi(v)]` under the distribution of each token, `(B, T, K)` float64; see `FeatureBasis`.
        state_features: features of the state before each token, `(B, T, K_state)` float32.
    """

    logprob: Tensor
    entropy: Tensor
    mask: Tensor
    expected_features: Tensor | None = None
    state_features: Tensor | None = None

    def rows(self, rows: Tensor) -> TokenScores:
        """The scores of some sequences, without features."""
        return TokenScores(self.logprob[rows], self.entropy[rows], self.mask[rows])

    def blank(self) -> TokenScores:
        """Scores of the same tokens to be filled in, all 0."""
        return TokenScores(torch.zeros_like(self.logprob), torch.zeros_like(self.entropy), self.mask)

    @property
    def sequence_entropy(self) -> Tensor:
        """`N_i = sum_t h[i, t]`, nats per response, `(B,)`."""
        return self.entropy.sum(dim=1)

    @property
    def sequence_logprob(self) -> Tensor:
        """`S_i = sum_t l[i, t]`, nats, `(B,)`."""
        return self.logprob.sum(dim=1)

    @property
    def undecided(self) -> Tensor:
        """Which responses have a token that the policy had a choice about, `(B,)` bool.

        Of the others neither entropies nor log-probs have a derivative that arithmetic could show.
        """
        return (self.entropy > NO_CHOICE).any(dim=1)

    @property
    def lengths(self) -> Tensor:
        """`T_i`, tokens, `(B,)` float64."""
        return self.mask.sum(dim=1).to(self.logprob.dtype)


@dataclass(frozen=True)
class TokenTangents:
    """Derivatives of token scores along one direction in parameter space; CPU, float64, 0 outside the mask.

    Attributes:
        logprob: `dl[i, t]`, nats per unit of the direction, `(B, T)`.
        entropy: `dh[i, t]`, `(B, T)`.
        expected_features: derivative of `E_pi[psi(v)]`, `(B, T, K)` float64, or None.
    """

    logprob: Tensor
    entropy: Tensor
    expected_features: Tensor | None = None

    def rows(self, rows: Tensor) -> TokenTangents:
        """The derivatives of some sequences, without those of features."""
        return TokenTangents(self.logprob[rows], self.entropy[rows])

    def scaled(self, factor: float) -> TokenTangents:
        """The derivatives along a direction `factor` times as long, without those of features."""
        return TokenTangents(factor * self.logprob, factor * self.entropy)

    def vector(self, rows: Tensor | None = None) -> Tensor:
        """The derivatives of log-probs and then of entropies as one vector, of all responses or of some."""
        parts = (self.logprob, self.entropy)
        return torch.cat([(x if rows is None else x[rows]).flatten() for x in parts])
