"""Exactly zero-mean control variates for the score part of the entropy's gradient: fitted action values.

The score part is `sum_t dl_t G_t` with `G_t = sum_(s>t) h_s` the entropy still to come. Let `Q(s, v)` be any function
of the state before a token and of the token, fitted on *other* prompts. Since `E[dl_t Q(s_t, y_t) | s_t] = sum_v
dpi_v Q(s_t, v)`,

    Z_i = sum_t ( dl[i,t] Q(s_t, y_t) - sum_v dpi_v Q(s_t, v) )

has mean exactly 0, and subtracting `mean Z` leaves an estimate's mean as it is. If `Q` predicts `G`, most of the
noise of the score part goes: unlike a baseline `b(s)`, it knows what choosing `y_t` does to the entropy still to
come. Here `Q` is bilinear in features of states and tokens, so that the sum over the vocabulary is the derivative of
`E_pi[psi]`, which the scoring pass gives along with the entropy. Action-dependent baselines: Gu et al., Q-Prop
(arXiv:1611.02247); control variates for likelihood ratios: Greensmith, Bartlett and Baxter (JMLR 5, 2004).

The fit is weighted least squares over tokens with weights `dl^2` (it minimises the sum of squared score terms), with a
ridge penalty, cross-fitted over folds of prompts. Statistics of earlier batches of the same policy may join the fit.
In states unlike those it was fitted on, `Q` is scaled down by their leverage, so that one rare response does not get a
control many times the estimate's error; a factor that depends on the state alone leaves the mean of `Z` at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.estimate import Estimates, mean_by_prompt, shrinkage
from probe.estimators.weighting import prefix_features, still_to_come
from probe.scoring.scores import TokenScores, TokenTangents

FOLDS = 5
"""Cross-fitting folds, of whole prompts."""
PENALTY = 0.1
"""Ridge penalty relative to the mean square of each feature."""
LARGEST_LEVERAGE = 2.0
"""In states of more leverage than this times the number of state features, `Q` is scaled down to it: there it would
extrapolate. See `_Fit`."""
SMALLEST_SAMPLE = 64
"""`auto` uses control variates from this many prompts on; coverage was not measured with fewer."""
CHUNK = 64
"""Sequences whose products of features are held at a time."""


@dataclass(frozen=True)
class FitStatistics:
    """What a batch contributes to the fit of `Q`; sums over tokens, normalised to the mean weight 1.

    Attributes:
        gram: `sum dl^2 a a'`, `(F, F)`, `a` the product features of a token.
        cross: `sum dl^2 a (G - b)`, `(F, 2)`: for the entropy still to come (nats) and the tokens still to come.
        tokens: their number.
    """

    gram: Tensor
    cross: Tensor
    tokens: float


EstimateOn = Callable[[Tensor], Estimates]
"""Given rows of E, the estimate from these alone, both estimands with errors."""


@dataclass(frozen=True)
class ControlVariates:
    """Control variates of one batch and step.

    Attributes:
        values: `(K, B, 2)` float64: for `E[N]` (nats) and for `E[T]` (tokens), each sequence with a `Q` that was fitted
            on neither its own fold nor fold `k`.
        fold: `(B,)`, of each sequence.
        sums: over the tokens of each fold.
    """

    values: Tensor
    fold: Tensor
    sums: Sequence[_FoldSums]

    @cached_property
    def statistics(self) -> FitStatistics:
        """This batch's contribution to later fits; those of a part of a step are asked for by nobody."""
        return _statistics(self.sums)

    @property
    def own(self) -> Tensor:
        """`Z_i`, `(B, 2)`: with a `Q` that was fitted on all other folds."""
        return self.values[self.fold, torch.arange(len(self.fold))]

    def scaled(self, factor: float) -> ControlVariates:
        """Those of a step that is `factor` times as long."""
        return replace(self, values=factor * self.values)

    def shrunk(self, scores: TokenScores, group: Tensor, estimate_on: EstimateOn) -> Estimates:
        """`(mean a Z_seq, mean a Z_tok)`, nats, with their errors: subtract them from an estimate of the same batch.

        `a` of a fold is the `shrinkage` of estimate and control on the other folds: near 1 where the control explains
        the error, near 0 where `Q` is fitted too badly to. Neither `a` nor `Q` has seen the sequence, so that the mean
        of `a Z_seq` is exactly 0 at every sample size (that of `Z_tok` to the order `1 / B`, as its `H_tok` and mean
        length are those of the batch).

        The error has two parts. The influences take `Q` as given; what they lack is the covariance of two folds `k` and
        `l`, each of which the other's `Q` was fitted on. Let `S_kl` be the change of fold `k`'s part when `l` is left
        out of its fit: the covariance is `E[S_kl S_lk]`, as what does not know the other fold has mean 0 given it. The
        squares of `Estimate.fit` are `sum_(k != l) S_kl^2`, which is never less than `sum S_kl S_lk`: the variance is
        not understated on average (with `a` as given). They are large in samples whose controls are far from their
        mean, which is where an error of `Q` matters.

        Args:
            scores: scores of E.
            group: `(B,)` prompts.
            estimate_on: the estimate from some rows, which the control is to make less noisy.
        """
        share = torch.zeros(len(self.fold), 2, dtype=torch.float64)
        for k, values in enumerate(self.values):
            rows = (self.fold != k).nonzero().flatten()
            controls = _means(_by_estimand(values[rows], scores.rows(rows)), group[rows])
            for which, (found, control) in enumerate(zip(estimate_on(rows), controls, strict=True)):
                share[self.fold == k, which] = shrinkage(found, control)
        own = share * _by_estimand(self.own, scores)
        changes = torch.stack([own - share * _by_estimand(values, scores) for values in self.values])
        by_fold = torch.zeros(len(self.values), len(self.values), 2, dtype=torch.float64)
        by_fold.index_add_(1, self.fold, changes / len(self.fold))
        sequence, token = _means(own, group)
        return PerEstimand(
            replace(sequence, fit=by_fold[..., 0].flatten()), replace(token, fit=by_fold[..., 1].flatten())
        )


def _by_estimand(Z: Tensor, scores: TokenScores) -> Tensor:
    """`(Z_seq, Z_tok)` of each sequence, `(B, 2)` nats."""
    H_tok = float(scores.sequence_entropy.mean() / scores.lengths.mean())
    token = (Z[:, 0] - H_tok * Z[:, 1]) / float(scores.lengths.mean())
    return torch.stack([Z[:, 0], token], dim=1)


def _means(Z: Tensor, group: Tensor) -> Estimates:
    """The means of two columns, with their errors."""
    return PerEstimand(mean_by_prompt(Z[:, 0], group), mean_by_prompt(Z[:, 1], group))


def control_variates(
    scores: TokenScores,
    tangents: TokenTangents,
    sampled_features: Tensor,
    group: Tensor,
    earlier: Sequence[FitStatistics] = (),
) -> ControlVariates:
    """Fit `Q` on the other folds (and earlier batches), once more without each of these, and evaluate `Z`.

    Args:
        scores: scores of E with features.
        tangents: derivatives along the step with those of the expected features.
        sampled_features: `psi(y[i,t])`, `(B, T, K)`.
        group: `(B,)` prompts.
        earlier: statistics of earlier batches, made with the same feature basis.

    Raises:
        ValueError: features are missing, or there are fewer than two prompts.
    """
    if scores.state_features is None or tangents.expected_features is None:
        raise ValueError(
            "expected scores and tangents with features, found none; give the passes a FeatureBasis"
        )
    _, member = group.unique(return_inverse=True)
    folds = min(FOLDS, int(member.max()) + 1)
    if folds < 2:
        raise ValueError("expected at least two prompts to fit on one and evaluate on another, found one")
    fold = member % folds
    sums = [_FoldSums(scores.mask.shape[1]) for _ in range(folds)]
    for rows in torch.arange(len(fold)).split(CHUNK):
        states, mask = _state_features(scores, rows), scores.mask[rows]
        for k, own in enumerate(sums):
            chosen = mask & (fold[rows] == k).unsqueeze(1)
            if bool(chosen.any()):
                own.add(
                    states, sampled_features[rows], tangents.logprob[rows], _targets(scores, rows), chosen
                )
    sizes = (_state_features(scores, torch.arange(1)).shape[-1], sampled_features.shape[-1])
    without = {
        (j, k): _solve([s for i, s in enumerate(sums) if i not in (j, k)], earlier, *sizes)
        for j in range(folds)
        for k in range(j + 1)
    }
    Z = torch.zeros(folds, len(fold), 2, dtype=torch.float64)
    for j in range(folds):
        for rows in (fold == j).nonzero().flatten().split(CHUNK):
            states, on = _state_features(scores, rows), scores.mask[rows].double()
            dl = tangents.logprob[rows].unsqueeze(-1)
            tokens = dl * sampled_features[rows].double() - tangents.expected_features[rows]
            for k in range(folds):
                fit = without[max(j, k), min(j, k)]
                products = torch.einsum("bt,bti,btj->bij", on * fit.trust(states), states, tokens)
                Z[k, rows] = products.flatten(1) @ fit.coefficients
    return ControlVariates(values=Z, fold=fold, sums=sums)


class _FoldSums:
    """Sums over the tokens of one fold; the baseline `b_t` is put in when the folds to fit on are known."""

    def __init__(self, positions: int) -> None:
        self.gram: Tensor | None = None
        self.cross = torch.zeros(0, 2, dtype=torch.float64)
        self.by_position = torch.zeros(positions, 0, dtype=torch.float64)
        self.targets = torch.zeros(positions, 2, dtype=torch.float64)
        self.count = torch.zeros(positions, dtype=torch.float64)
        self.weight, self.tokens = 0.0, 0.0

    def add(self, states: Tensor, tokens: Tensor, dl: Tensor, targets: Tensor, chosen: Tensor) -> None:
        """Add the chosen tokens of a chunk of sequences."""
        position = torch.arange(chosen.shape[1]).expand_as(chosen)[chosen]
        a = (states[chosen].unsqueeze(-1) * tokens[chosen].double().unsqueeze(-2)).flatten(1)
        weight, y = dl[chosen].square().unsqueeze(1), targets[chosen]
        if self.gram is None:
            F = a.shape[1]
            self.gram = torch.zeros(F, F, dtype=a.dtype)
            self.cross = torch.zeros(F, 2, dtype=a.dtype)
            self.by_position = torch.zeros(chosen.shape[1], F, dtype=a.dtype)
        self.gram += a.T @ (weight * a)
        self.cross += a.T @ (weight * y)
        self.by_position.index_add_(0, position, weight * a)
        self.targets.index_add_(0, position, y)
        self.count.index_add_(0, position, torch.ones_like(y[:, 0]))
        self.weight += float(weight.sum())
        self.tokens += len(y)


def _statistics(sums: Sequence[_FoldSums]) -> FitStatistics:
    """Sums of folds, with the mean target at each position taken off."""
    present = [s for s in sums if s.gram is not None]
    gram = torch.stack([s.gram for s in present if s.gram is not None]).sum(0)
    count = sum(s.count for s in present).clamp_min(1.0)  # type: ignore[union-attr]
    baseline = sum(s.targets for s in present) / count.unsqueeze(1)
    cross = sum(s.cross for s in present) - sum(s.by_position for s in present).T @ baseline  # type: ignore[union-attr]
    tokens = sum(s.tokens for s in present)
    scale = tokens / max(sum(s.weight for s in present), 1e-300)
    return FitStatistics(gram=gram * scale, cross=cross * scale, tokens=tokens)


@dataclass(frozen=True)
class _Fit:
    """`Q`, and the states it knows.

    Attributes:
        coefficients: `(F, 2)` of the product features.
        precision: `(F_state, F_state)`; `s' precision s` is the leverage of a state with features `s`. Its mean over
            the tokens that were fitted on, weighted as they are in the fit (by `dl^2 |psi|^2`), is below `F_state`, by
            what the ridge penalty takes off: 2 to 9 of 16 on policies of known tails. That is no mean over all tokens,
            of which those with small weights can have leverages without bound.
    """

    coefficients: Tensor
    precision: Tensor

    def trust(self, states: Tensor) -> Tensor:
        """What is left of `Q` in states of these features, `(b, T)` within [0, 1]: less the less was seen like them.

        A function of the state, so that `Z` keeps its mean of 0; where `Q` would extrapolate, it says little.
        """
        leverage = torch.einsum("bti,ij,btj->bt", states, self.precision, states)
        return (LARGEST_LEVERAGE * states.shape[-1] / leverage.clamp_min(1e-300)).clamp_max(1.0)


def _solve(sums: Sequence[_FoldSums], earlier: Sequence[FitStatistics], states: int, tokens: int) -> _Fit:
    """The ridge fit on some folds and earlier batches; 0 where these have no token."""
    own = [_statistics(sums)] if any(s.gram is not None for s in sums) else []
    parts = [*own, *earlier]
    if not parts:
        zero = torch.zeros(states * tokens, 2, dtype=torch.float64)
        return _Fit(zero, torch.eye(states, dtype=torch.float64))
    count = sum(p.tokens for p in parts)
    gram = torch.stack([p.gram for p in parts]).sum(0) / count
    cross = torch.stack([p.cross for p in parts]).sum(0) / count
    # summed over token features; the first feature of a state is 1, so that the weights have mean 1 after division
    of_states = torch.einsum("ikjk->ij", gram.reshape(states, tokens, states, tokens))
    of_states = of_states / of_states[0, 0].clamp_min(1e-300)
    return _Fit(_penalised_inverse(gram) @ cross, _penalised_inverse(of_states))


def _penalised_inverse(gram: Tensor) -> Tensor:
    """`(gram + PENALTY diag(gram))^-1`; a feature that is always 0 has no part."""
    scale = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 1e-9 * scale.max(), scale, torch.inf)
    system = gram / scale.unsqueeze(0) / scale.unsqueeze(1)
    inverse = torch.linalg.inv(system + PENALTY * torch.eye(len(scale), dtype=gram.dtype))
    return inverse / scale.unsqueeze(0) / scale.unsqueeze(1)


def _state_features(scores: TokenScores, rows: Tensor) -> Tensor:
    """Features of the state before each token, `(b, T, F_state)`: a one, functions of scores so far, projections."""
    part = TokenScores(scores.logprob[rows], scores.entropy[rows], scores.mask[rows])
    prefix = prefix_features(part)
    states = scores.state_features[rows].double()  # type: ignore[index]
    return torch.cat([torch.ones_like(prefix[..., :1]), prefix, states], dim=-1)


def _targets(scores: TokenScores, rows: Tensor) -> Tensor:
    """Entropy and tokens still to come, `(b, T, 2)`."""
    tokens = scores.mask[rows].double()
    return torch.stack([still_to_come(scores.entropy[rows]), still_to_come(tokens)], dim=-1)
