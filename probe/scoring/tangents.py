"""Derivatives of token scores along a direction in parameter space: forward mode, and differences of forwards.

A derivative per token is what error bars, both estimands, every weighting and control variates are made of. Forward
mode is exact; central differences run wherever a forward runs (any attention kernel, quantised or sharded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from probe.data.batch import RolloutBatch
from probe.errors import NumericalError
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.features import FeatureBasis
from probe.scoring.passes import Collector, Policy, Progress, score_tokens, scored_chunks
from probe.scoring.scores import TokenScores, TokenTangents

LARGEST_EXPONENT = 12
"""`choose_scale` looks for the step of the central difference between `4^-12` and `4^12` times the direction."""
GOOD_ENOUGH = 3e-3
"""Relative error of token derivatives up to which the scale 1 is kept: its upper point is the ground truth's own."""


class ForwardModeError(NumericalError):
    """An operation of the model has no forward-mode derivative."""


def forward_tangents(
    policy: Policy,
    batch: RolloutBatch,
    direction: Mapping[str, Tensor],
    basis: FeatureBasis | None = None,
    progress: Progress | None = None,
) -> TokenTangents:
    """Derivatives of all token scores by one forward-mode pass (dual numbers); see `scores_and_tangents`."""
    return scores_and_tangents(policy, batch, direction, basis, progress)[1]


def scores_and_tangents(
    policy: Policy,
    batch: RolloutBatch,
    direction: Mapping[str, Tensor],
    basis: FeatureBasis | None = None,
    progress: Progress | None = None,
) -> tuple[TokenScores, TokenTangents]:
    """Token scores and their derivatives by one forward-mode pass (dual numbers).

    Args:
        policy: the policy, at the point of differentiation.
        batch: `B` responses.
        direction: by parameter name.
        basis: also give the features, and differentiate the expected token features.
        progress: called after each microbatch.

    Returns:
        The scores are what `score_tokens` gives with the same kernels (`forward_mode_kernels`).

    Raises:
        ForwardModeError: an operation of the model has no forward-mode derivative.
        NumericalError: a score or derivative is not finite.
    """
    scores, tangents = Collector(batch, None), Collector(batch, progress)
    here = policy.point(direction)
    with torch.no_grad(), forward_ad.dual_level(), forward_mode_kernels(policy.model), _explained():
        duals = {n: forward_ad.make_dual(here[n], v.to(here[n])) for n, v in direction.items()}
        for chunk in scored_chunks(policy.at(duals), batch, basis):
            scores.add(chunk.sequence, chunk.position, *(_primal(x) for x in chunk.values))
            parts = chunk.values[:2] if basis is None else chunk.values[:3]
            tangents.add(chunk.sequence, chunk.position, *(_tangent(x) for x in parts))
            tangents.advance(chunk.finished)
    return scores.finish(), TokenTangents(*tangents.arrays())


def second_order_tangents(
    policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor], progress: Progress | None = None
) -> tuple[TokenTangents, TokenTangents]:
    """First and second derivatives of all token scores by nested forward mode, about three times the cost of one.

    Args:
        policy: the policy, at the point of differentiation.
        batch: `B` responses.
        direction: by parameter name.
        progress: called after each microbatch.

    Returns:
        `(first, second)`: `d l / d s` and `d^2 l / d s^2` at `theta + s * direction`, `s = 0`, and those of `h`.

    Raises:
        ForwardModeError: an operation of the model has no forward-mode derivative.
        NumericalError: a derivative is not finite.
    """
    first, second = Collector(batch, None), Collector(batch, progress)
    start = policy.point(direction)
    along = {n: v.to(start[n]) for n, v in direction.items()}
    one = torch.ones((), dtype=torch.float64, device=policy.device)
    few = policy.microbatch_size
    order = batch.lengths.argsort(descending=True, stable=True)
    # with grad mode on, torch uses formulas that it can differentiate again; nothing here requires a gradient
    with torch.enable_grad(), forward_mode_kernels(policy.model):
        for rows in order[batch.lengths[order] > 0].split(few):
            part = batch.subset(rows)
            places: list[Any] = []

            def scores(
                s: Tensor, part: RolloutBatch = part, places: list[Any] = places
            ) -> tuple[Tensor, ...]:
                places.clear()
                moved = {n: start[n] + s.to(along[n]) * along[n] for n in start}
                found = []
                for chunk in scored_chunks(policy.at(moved), part):
                    places.append((chunk.sequence, chunk.position))
                    found.append(chunk.values[:2])
                return tuple(torch.cat(x) for x in zip(*found, strict=True))

            def once(s: Tensor, scores: Callable[..., Any] = scores) -> tuple[Tensor, ...]:
                return torch.func.jvp(scores, (s,), (one,))[1]  # type: ignore[no-any-return]

            with _explained():
                d1, d2 = torch.func.jvp(once, (torch.zeros_like(one),), (one,))  # type: ignore[misc]
            sequence, position = (torch.cat(x) for x in zip(*places, strict=True))
            first.add(rows[sequence], position, *d1)
            second.add(rows[sequence], position, *d2)
            second.advance(len(rows))
    return TokenTangents(*first.arrays()), TokenTangents(*second.arrays())


@dataclass(frozen=True)
class DifferencePair:
    """Scores on both sides of the point of differentiation.

    Attributes:
        plus: scores at `theta + scale * direction`.
        minus: scores at `theta - scale * direction`.
        scale: of the difference step, in units of the direction.
        error: estimated relative error of the token derivatives, see `choose_scale`.
    """

    plus: TokenScores
    minus: TokenScores
    scale: float
    error: float

    @property
    def tangents(self) -> TokenTangents:
        """Central differences: the odd part of the scores, per unit of the direction."""
        expected = None
        if self.plus.expected_features is not None and self.minus.expected_features is not None:
            expected = (self.plus.expected_features - self.minus.expected_features) / (2 * self.scale)
        return TokenTangents(
            logprob=(self.plus.logprob - self.minus.logprob) / (2 * self.scale),
            entropy=(self.plus.entropy - self.minus.entropy) / (2 * self.scale),
            expected_features=expected,
        )


def difference_pair(
    policy: Policy,
    batch: RolloutBatch,
    direction: Mapping[str, Tensor],
    scale: float,
    error: float = math.nan,
    upper: Mapping[str, Tensor] | None = None,
    basis: FeatureBasis | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> DifferencePair:
    """Score a batch at `theta + scale * direction` and `theta - scale * direction`.

    Args:
        policy: the policy, at the point of differentiation.
        batch: `B` responses.
        direction: by parameter name.
        scale: of the step, in units of the direction.
        error: what `choose_scale` found.
        upper: exact values of the upper point, where they are known (the optimizer's own result at scale 1).
        basis: also score the expected token features.
        progress: makes a progress callback from the name of a pass.

    Raises:
        NumericalError: a score is not finite.
    """
    above = policy.at(upper) if upper is not None else policy.moved(direction, scale)
    of_pass = progress if progress is not None else (lambda what: None)
    plus = score_tokens(above, batch, of_pass("score E after the step"), basis)  # type: ignore[arg-type]
    below = policy.moved(direction, -scale)
    minus = score_tokens(below, batch, of_pass("score E on the other side"), basis)  # type: ignore[arg-type]
    return DifferencePair(plus=plus, minus=minus, scale=scale, error=error)


class DifferenceQuotients:
    """Difference quotients of all token scores of a batch along a direction, at scales `4^k`; each computed once."""

    def __init__(self, policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor]) -> None:
        """Args: `policy` at the point of differentiation, a `batch` of a few sequences, and the `direction`."""
        self._policy, self._batch, self._direction = policy, batch, direction
        self._found: dict[int, Tensor | None] = {}

    def at(self, k: int) -> Tensor | None:
        """`D(4^k)` as one vector: those of the log-probs, then of the entropies; None where scores are not finite."""
        if k not in self._found:
            try:
                found = difference_pair(self._policy, self._batch, self._direction, 4.0**k).tangents
                self._found[k] = found.vector()
            except NumericalError:  # too large a step
                self._found[k] = None
        return self._found[k]

    def error(self, k: int) -> float:
        """`e(4^k)`, see `choose_scale`; infinite where there is nothing to compare."""
        below, here = self.at(k - 1), self.at(k)
        if below is None or here is None or not bool(here.any()):
            return math.inf
        return float((here - below).norm() / here.norm())


def choose_scale(policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor]) -> tuple[float, float]:
    """The scale of the central difference at which rounding and curvature are smallest together.

    For scales `c = 4^k` the difference quotients `D(c)` of all token log-probs and entropies are compared:
    `e(c) = |D(c) - D(c/4)| / |D(c)|` (Euclidean norms over tokens). Where curvature dominates, that is 15/16 of the
    error of `D(c)`, which grows like `c^2`; where rounding does, about four times it, since rounding grows like `1/c`.
    From 1 on, the search goes downhill in `e`; it stays at 1 where `e(1)` is at most 0.003, because the point
    `theta + direction` is needed anyway.

    Args:
        policy: the policy, at the point of differentiation.
        batch: a few sequences are enough; the cost is some six scorings of them.
        direction: by parameter name.

    Returns:
        `(scale, e(scale))`.

    Raises:
        NumericalError: no scale gives a usable derivative.
    """
    quotients = DifferenceQuotients(policy, batch, direction)
    quotient, error = quotients.at, quotients.error
    best = 0
    while error(best) > (GOOD_ENOUGH if best == 0 else 0.0) and abs(best) < LARGEST_EXPONENT:
        # where neither neighbour is finite, the step is far too large
        lost = quotient(best) is not None and not bool(quotient(best).any())  # type: ignore[union-attr]
        better = best + 1 if lost else min((best - 1, best + 1), key=error)
        if not error(better) < error(best) and math.isfinite(error(best)):
            break
        best = better
    if not error(best) < 1.0:
        raise NumericalError(
            f"expected a step size at which central differences settle, found a relative error of {error(best):.2g} "
            "at the best of them; the arithmetic is too coarse for this update (use checkpoint.dtype: float32, or "
            "probe_rework.derivative_mode: jvp or reverse)"
        )
    return 4.0**best, error(best)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's refusals of forward mode into one exception."""
    try:
        yield
    except NotImplementedError as error:
        raise ForwardModeError(_reason(error)) from error
    except RuntimeError as error:
        message = str(error).lower()
        if any(
            sign in message for sign in ("forward ad", "forward-mode", "jvp", "functorch", "requires_grad_")
        ):
            raise ForwardModeError(_reason(error)) from error
        raise


def _reason(error: BaseException) -> str:
    """One line that says which operation has no forward-mode rule."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the model has no forward-mode derivative: {first[:200]}"


def _primal(x: Tensor) -> Tensor:
    """The value of a dual number."""
    return forward_ad.unpack_dual(x).primal


def _tangent(x: Tensor) -> Tensor:
    """The tangent of a dual number; zero where it does not depend on the direction."""
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent
