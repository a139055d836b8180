"""The league table: how well the cheap predictors of the literature rank what tokens really do to the entropy.

The exact contributions `c[i,t]` of the tokens are the truth (see `contributions`), by three targets: the change of
deltaH1, the state-fixed change that per-token formulas claim to predict, and the change of a token's own state, on the
states that were sampled for coupling. Only tokens that act are ranked: those with a weight in the loss.

Errors have two sources, which add up: which prompts U has (jackknife over prompts), and E, from which the gradient is
estimated (jackknife over its parts). The contributions are known through this E only, whose sampling error takes off
every rank correlation with them: what is estimated is the correlation with the contributions as this E gives them. The
row `a perfect predictor` says how much is left of 1: `sqrt(2 r / (1 + r))`, with `r` the correlation of contributions
from one half of E with those from the other (Spearman and Brown; both halves have twice the error of the whole).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions
from probe.attribution.coupling import Coupling
from probe.attribution.objectives import combined
from probe.attribution.predictors.registry import Predictor
from probe.attribution.tokens import UpdateTokens
from probe.estimators.groups import index_groups
from probe.estimators.student import student_interval

TARGETS = ("deltaH1", "state_fixed", "own_state")
"""What predictors are ranked against: contributions to deltaH1 and to the state-fixed change, per token (nats), and the
change of the entropy of the state at which the token was sampled (nats)."""
CEILING = "a perfect predictor"
"""The row of what could be reached on this E, from how contributions from one half of it rank those from the other."""
TOP = (0.01, 0.1)
"""Shares of the tokens, largest contributions first, that recall is measured for."""
LEAST_TOKENS = 8
"""Fewer are not ranked."""


@dataclass(frozen=True)
class Score:
    """A number of a league table.

    Attributes:
        value: as it is.
        se: its standard error over prompts of U and parts of E.
        ci95: 95 % interval, of Spearman's rho by Fisher's z.
    """

    value: float
    se: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class LeagueRow:
    """A predictor against one target.

    Attributes:
        name: of the predictor.
        target: one of `TARGETS`.
        signed: whether contributions were ranked; where not, their sizes were.
        spearman: rank correlation of score and contribution, of their sizes where the score has no sign; None where
            all tokens have the same score (or contribution), so that there is nothing to rank by.
        sign_agreement: share of the tokens with a contribution and a score whose signs agree; None without a sign.
        judged: the number of those tokens, which have a score other than 0.
        recall: for each of `TOP`, share of the tokens of largest |contribution| that are among those of largest
            |score|.
        captured: share of the summed |contribution| that the tenth of the tokens with the largest |score| holds.
        tokens: that were ranked.
    """

    name: str
    target: str
    signed: bool
    spearman: Score | None
    sign_agreement: float | None
    judged: int
    recall: tuple[float, ...]
    captured: float
    tokens: int


def league(
    found: Contributions,
    tokens: UpdateTokens,
    states: Coupling | None,
    predictors: Mapping[str, Predictor],
) -> list[LeagueRow]:
    """The table, best against deltaH1 first, target after target.

    Args:
        found: exact contributions.
        tokens: U as the formulas see it.
        states: coupling of sampled states; None leaves that target out.
        predictors: to rank, by name.

    Returns:
        Empty where fewer than `LEAST_TOKENS` tokens act.
    """
    weights = found.weights.policy
    acting = tokens.mask & (weights != 0)
    if int(acting.sum()) < LEAST_TOKENS:
        return []
    # what the loss makes of a token's advantage: normalisation, ratio, clipping
    scale = torch.where(acting, weights.abs() / tokens.A.abs().clamp_min(1e-300), 0.0)
    scores = {name: one.score(tokens) * scale for name, one in predictors.items()}
    member = index_groups(tokens.group)[0].unsqueeze(1).expand_as(acting)
    rows: list[LeagueRow] = []
    for which, target in ((1, "deltaH1"), (3, "state_fixed")):
        truth = _Truth(found, which, acting, member[acting])
        own = [truth.row(name, target, scores[name][acting], predictors[name].signed) for name in predictors]
        own += [row for signed in (True, False) for row in truth.ceiling(target, signed)]
        rows += sorted(own, key=_rank)
    if states is not None:
        rows += _own_states(states, scores, predictors, member)
    return rows


def _own_states(
    states: Coupling,
    scores: Mapping[str, Tensor],
    predictors: Mapping[str, Predictor],
    member: Tensor,
) -> list[LeagueRow]:
    """Against the own terms of sampled states, which no error of E is in."""
    acting = [row for row in states.rows if row.position is not None and row.terms["own"] != 0]
    if len(acting) < LEAST_TOKENS:
        return []
    i = torch.tensor([row.sequence for row in acting])
    t = torch.tensor([row.position for row in acting])
    truth = torch.tensor([row.terms["own"] for row in acting], dtype=torch.float64)
    rows = [
        _row(name, "own_state", scores[name][i, t], truth, one.signed, member[i, t], ())
        for name, one in predictors.items()
    ]
    return sorted(rows, key=_rank)


def _rank(row: LeagueRow) -> tuple[bool, float]:
    """Those with a sign first, and the best first: one that is wrong throughout is behind all but those without any."""
    return not row.signed, math.inf if row.spearman is None else -row.spearman.value


class _Truth:
    """Exact contributions to one number, of the tokens that act: from all of E, and from parts of it."""

    def __init__(self, found: Contributions, which: int, acting: Tensor, member: Tensor) -> None:
        """Args: `which` of the numbers of a `Change`; `acting`, `(B, T)` bool; `member`, the prompts, `(n,)`."""
        sensitivities, weights = found.sensitivities, found.weights.policy
        self.member = member
        self.whole = combined((weights * sensitivities.logprob)[:, acting], sensitivities.blocks)[which]
        by_block = (weights * sensitivities.block_logprob)[:, :, acting]  # (K, P, n)
        self.blocks, self.which, self._parts = by_block, which, sensitivities.blocks
        P = by_block.shape[1]
        total = by_block.sum(1)
        self.without = [self._number(total - by_block[:, p]) for p in range(P)]

    def _number(self, by_objective: Tensor) -> Tensor:
        """One number of a `Change` per token, up to a factor common to all."""
        return combined(by_objective, self._parts)[self.which]

    def row(self, name: str, target: str, score: Tensor, signed: bool) -> LeagueRow:
        """A predictor's row."""
        return _row(name, target, score, self.whole, signed, self.member, self.without)

    def ceiling(self, target: str, signed: bool) -> list[LeagueRow]:
        """What a perfect predictor would reach of contributions, or of their sizes; nothing where E has one part.

        Signs, recall and what is captured are those of one half of E against the other, which is less.
        """
        if self.blocks.shape[1] < 2:
            return []
        even, odd = (self._number(self.blocks[:, k::2].sum(1)) for k in (0, 1))
        halves = _row(CEILING, target, odd, even, signed, self.member, ())
        found = halves.spearman
        if found is None:
            return [halves]
        whole = Score(
            _of_the_whole(found.value), found.se, (_of_the_whole(found.ci95[0]), _of_the_whole(found.ci95[1]))
        )
        return [replace(halves, spearman=whole)]


def _row(
    name: str,
    target: str,
    score: Tensor,
    truth: Tensor,
    signed: bool,
    member: Tensor,
    without: Sequence[Tensor],
) -> LeagueRow:
    """A row, from scores and contributions of `n` tokens.

    Args:
        name: of the predictor.
        target: that the contributions are to.
        score: `(n,)`.
        truth: `(n,)`.
        signed: whether the sign of the score means something.
        member: prompts, `(n,)`.
        without: contributions with a part of E left out, each `(n,)`.
    """

    def rho(kept: Tensor | None = None, true: Tensor = truth) -> float:
        a, b = (score, true) if signed else (score.abs(), true.abs())
        return spearman(a, b) if kept is None else spearman(a[kept], b[kept])

    constant = any(
        len(one.unique()) < 2 for one in ((score, truth) if signed else (score.abs(), truth.abs()))
    )
    both = (score != 0) & (truth != 0)
    agree = (score.sign() == truth.sign())[both].double()
    size, size_of_score = truth.abs(), score.abs()
    return LeagueRow(
        name=name,
        target=target,
        signed=signed,
        spearman=None
        if constant
        else _scored(rho(), [rho(member != g) for g in member.unique()], [rho(true=one) for one in without]),
        sign_agreement=float(agree.mean()) if signed and len(agree) else None,
        judged=len(agree),
        recall=tuple(_recall(size_of_score, size, share) for share in TOP),
        captured=float(size[_largest(size_of_score, 0.1)].sum() / size.sum().clamp_min(1e-300)),
        tokens=len(truth),
    )


def _scored(value: float, *left_out: Sequence[float]) -> Score:
    """A correlation with the error of jackknives over independent sources, on the scale of Fisher's z."""
    z, variance, degrees = _fisher(value), 0.0, math.inf
    for values in left_out:
        n = len(values)
        if n == 0:  # no source of error here
            continue
        if n == 1:  # one that nothing is known of
            return Score(value, math.inf, (-1.0, 1.0))
        found = torch.tensor([_fisher(x) for x in values], dtype=torch.float64)
        variance += (n - 1) / n * float((found - found.mean()).square().sum())
        degrees = min(degrees, n - 1.0)
    se = math.sqrt(variance) if degrees < math.inf else math.inf
    low, high = student_interval(z, se, min(degrees, 1e6))
    return Score(value, se * (1 - value**2), (math.tanh(low), math.tanh(high)))


def _of_the_whole(half: float) -> float:
    """The correlation with the truth from that of two halves, 0 where these do not correlate.

    >>> round(_of_the_whole(0.5), 4), _of_the_whole(-0.1)
    (0.8165, 0.0)
    """
    return math.sqrt(2 * half / (1 + half)) if half > 0 else 0.0


def _fisher(rho: float) -> float:
    """`artanh` of a correlation, kept finite at the ends."""
    return math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank, 0 where one is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 4.0, 9.0, 16.0])), 12)
    1.0
    """
    x, y = (_ranks(v) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float((x * y).sum()) / size if size > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1, `(n,)` float64; the mean rank for equal values."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def _largest(x: Tensor, share: float) -> Tensor:
    """Indices of the largest entries, at least one; of equal ones any, always the same."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return order[x[order].argsort(descending=True, stable=True)][: max(1, round(share * len(x)))]


def _recall(score: Tensor, truth: Tensor, share: float) -> float:
    """Share of the largest true entries that are among those of largest score."""
    wanted, found = _largest(truth, share), _largest(score, share)
    return float(torch.isin(wanted, found).double().mean())
