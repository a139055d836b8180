"""Derivatives of token scores along a direction in parameter space, by forward mode.

A derivative per token is what error bars, both estimands, every weighting and control variates are made of. Forward
mode is exact; where a model has none, `differences` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from probe.data.batch import RolloutBatch
from probe.distributed.ranks import ALONE
from probe.errors.exceptions import NumericalError
from probe.scoring.collector import Collector, Progress
from probe.scoring.constants import ConstantOperands
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.features import FeatureBasis
from probe.scoring.policy import Policy
from probe.scoring.score import scored_chunks
from probe.scoring.scores import TokenScores, TokenTangents
from probe.scoring.together import together
from probe.text import first_line


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
    scores, tangents = Collector(batch, None, policy.ranks), Collector(batch, progress, policy.ranks)
    here = policy.point(direction)
    with (
        together(policy, "forward mode"),
        torch.no_grad(),
        forward_ad.dual_level(),
        forward_mode_kernels(policy.model),
        ConstantOperands(),
        _explained(),
    ):
        duals = {n: forward_ad.make_dual(here[n], v.to(here[n])) for n, v in direction.items()}
        for chunk in scored_chunks(policy.at(duals), batch, basis, "forward mode"):
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
    first, second = Collector(batch, None, policy.ranks), Collector(batch, progress, policy.ranks)
    alone = replace(policy, ranks=ALONE)
    start = policy.point(direction)
    along = {n: v.to(start[n]) for n, v in direction.items()}
    one = torch.ones((), dtype=torch.float64, device=policy.device)
    # with grad mode on, torch uses formulas that it can differentiate again; nothing here requires a gradient
    with (
        together(policy, "nested forward mode"),
        torch.enable_grad(),
        forward_mode_kernels(policy.model),
    ):
        for rows in map(torch.tensor, policy.own_parts(batch, "nested forward mode")):
            part = batch.subset(rows)
            places: list[Any] = []

            def scores(
                s: Tensor, part: RolloutBatch = part, places: list[Any] = places
            ) -> tuple[Tensor, ...]:
                places.clear()
                moved = {n: start[n] + s.to(along[n]) * along[n] for n in start}
                found = []
                for chunk in scored_chunks(alone.at(moved), part, kind="nested forward mode"):
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
    first = first_line(error)
    return f"the model has no forward-mode derivative: {first[:200]}"


def _primal(x: Tensor) -> Tensor:
    """The value of a dual number."""
    return forward_ad.unpack_dual(x).primal


def _tangent(x: Tensor) -> Tensor:
    """The tangent of a dual number; zero where it does not depend on the direction."""
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent
