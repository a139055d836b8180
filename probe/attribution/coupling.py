"""Own share and coupling: how much of the change of a state's entropy is the doing of the token that was sampled there.

Every per-token formula of the literature assumes that a token changes only its own state. For a state `s = (i, t)` of U
with gradient `X_s = grad h_s`, the first-order effect of the step on the entropy of that state splits exactly,

    <X_s, step> = momentum + decay + sum_r weight[r] * d/du l[r](theta + u P X_s) + other terms of the loss

over the tokens `r` of U: the token at `s` itself (`own`), the others of its response (`response`), the other responses
to the same prompt (`group`), and all other prompts (`others`). One pass over U per sampled state gives the whole row.
The same for the entropy of a whole response, whose own tokens are then `own`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.estimators.estimate import Estimate, estimate
from probe.estimators.losses import LossWeights
from probe.scoring.scores import TokenTangents

TOKEN_TERMS = ("own", "response", "group", "others")
"""Whose doing it is, of the policy-gradient terms."""
TERMS = (*TOKEN_TERMS, "kl", "entropy_bonus", "router", "momentum", "decay")
"""All that an entropy change is the sum of."""


@dataclass(frozen=True)
class Row:
    """The change of the entropy at some states of U, split over what made the step.

    Attributes:
        sequence: index of the response whose states they are.
        position: of the state in the response; None for all states of the response together.
        terms: nats, see `TERMS`; of a whole response `response` is part of `own`, and 0.
        total: `<X, step>`, an inner product of vectors, nats.
        by_response: what the tokens of each response of U do, `(B,)` nats.
    """

    sequence: int
    position: int | None
    terms: Mapping[str, float]
    total: float
    by_response: Tensor

    @property
    def tokens(self) -> float:
        """The sum of the policy-gradient terms of all tokens."""
        return sum(self.terms[name] for name in TOKEN_TERMS)

    @property
    def completeness(self) -> float:
        """How far the terms are from adding up to the total, relative to the sum of their sizes."""
        size = sum(abs(x) for x in self.terms.values())
        return abs(sum(self.terms.values()) - self.total) / max(size, 1e-300)


def split_row(
    sequence: int,
    position: int | None,
    tangents: TokenTangents,
    weights: LossWeights,
    group: Tensor,
    vectors: Mapping[str, float],
    total: float,
) -> Row:
    """Split the change of one state's entropy, or of a response's.

    Args:
        sequence: index of the response.
        position: of the state; None for all of the response.
        tangents: derivatives of U's scores along `P X`.
        weights: of the loss.
        group: `(B,)` prompts of U.
        vectors: inner products of `X` with momentum, decay and the router's part of the step.
        total: that with the step.
    """
    c = weights.policy * tangents.logprob
    by_response = c.sum(1)
    same = group == group[sequence]
    own = float(by_response[sequence] if position is None else c[sequence, position])
    whole, prompt = float(by_response[sequence]), float(by_response[same].sum())
    terms = {
        "own": own,
        "response": whole - own,
        "group": prompt - whole,
        "others": float(by_response[~same].sum()),
        "kl": float((weights.kl * tangents.logprob).sum()),
        "entropy_bonus": float((weights.bonus * tangents.entropy).sum()),
        "router": 0.0,
        **vectors,
    }
    return Row(sequence, position, terms, total, by_response)


@dataclass(frozen=True)
class Coupling:
    """What sampled states (or responses) of U say about whose doing their entropy change is; errors by prompt.

    Attributes:
        rows: of each.
        share: `sum c_term / sum of all token terms` of each of `TOKEN_TERMS`: shares with sign, which add up to 1. A
            ratio that means little where the token terms cancel.
        size_share: `sum |c_term| / sum of |c| of the four token terms`: between 0 and 1, they add up to 1.
        mean_share: mean over the states of `|c_term| / sum of |c| of the four token terms` of that state, of those with
            a term: every state counts alike, where in `size_share` a few whose entropy moves much may count most.
        mean: mean of each of `TERMS` and of the `total`, nats.
        size: mean of the size of each, nats.
        sign_agreement: share of the states whose own token's term has the sign of the whole change, of those whose
            own token has a term; None where those are of fewer than two prompts.
        completeness: the largest of the rows'.
    """

    rows: tuple[Row, ...]
    share: Mapping[str, Estimate]
    size_share: Mapping[str, Estimate]
    mean_share: Mapping[str, Estimate]
    mean: Mapping[str, Estimate]
    size: Mapping[str, Estimate]
    sign_agreement: Estimate | None
    completeness: float


def coupling(rows: Sequence[Row], group: Tensor) -> Coupling:
    """Shares and sizes over sampled states, with errors by prompt.

    Args:
        rows: of the states.
        group: `(B,)` prompts of U.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("expected at least one sampled state, found none")
    prompts = group[torch.tensor([row.sequence for row in rows])]
    terms = torch.tensor([[row.terms[name] for name in TERMS] for row in rows], dtype=torch.float64)
    of_tokens = terms[:, : len(TOKEN_TERMS)]
    whole = torch.tensor([row.total for row in rows], dtype=torch.float64)
    values = torch.cat([terms, whole.unsqueeze(1)], 1)
    names = (*TERMS, "total")

    def ratio(of: Tensor, by: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda q: (q.unsqueeze(1) * of).sum(0) / (q.unsqueeze(1) * by).sum(0)

    one = torch.ones(len(rows), 1, dtype=torch.float64)
    sizes = of_tokens.abs()
    acting = (terms[:, :1] != 0).double()
    moved = (sizes.sum(1, keepdim=True) > 0).double()
    own_shares = sizes / sizes.sum(1, keepdim=True).clamp_min(1e-300)
    agree = acting * ((terms[:, :1] > 0) == (whole.unsqueeze(1) > 0)).double()
    known = len(prompts[acting.flatten() > 0].unique()) > 1
    found = estimate(ratio(agree, acting), prompts)[0] if known else None
    return Coupling(
        rows=tuple(rows),
        share=_named(TOKEN_TERMS, estimate(ratio(of_tokens, of_tokens.sum(1, keepdim=True)), prompts)),
        size_share=_named(TOKEN_TERMS, estimate(ratio(sizes, sizes.sum(1, keepdim=True)), prompts)),
        mean_share=_named(TOKEN_TERMS, estimate(ratio(moved * own_shares, moved), prompts)),
        mean=_named(names, estimate(ratio(values, one), prompts)),
        size=_named(names, estimate(ratio(values.abs(), one), prompts)),
        sign_agreement=found,
        completeness=max(row.completeness for row in rows),
    )


def _named(names: Sequence[str], found: Sequence[Estimate]) -> dict[str, Estimate]:
    """Estimates by name; NaN where no token acts, and without an error where one prompt has all that do."""
    return {
        name: one if bool(one.influence.isfinite().all()) else replace(one, influence=torch.zeros(1))
        for name, one in zip(names, found, strict=True)
    }
