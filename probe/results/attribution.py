"""What the attribution and the comparison of interventions say, as the plain values of a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from probe.attribution.objectives import Change
from probe.estimand import Number, PerEstimand, as_mapping
from probe.estimators.estimate import Estimate

if TYPE_CHECKING:
    from probe.attribution.coupling import Coupling
    from probe.attribution.league import LeagueRow
    from probe.attribution.sums import Sum
    from probe.attribution.what_if import Effect, Solution
    from probe.data.batch import RolloutBatch
    from probe.phases.attribution import Attribution
    from probe.phases.what_if import Measured, WhatIf


def attribution_values(
    found: Attribution,
    U: RolloutBatch,
    controls: PerEstimand[float] | None = None,
    top: int = 0,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """The key `attribution` of a result.

    Args:
        found: what phase 4 found.
        U: the update batch.
        controls: what control variates take off deltaH1, nats; None without them.
        top: tokens of largest contribution to list on either side.
        token_text: the text of a token id; without it they have only ids.
    """
    parts = found.contributions
    values: dict[str, Any] = {name: change_values(one) for name, one in parts.parts.items()}
    values["total"] = change_values(parts.total)
    if controls is not None:
        values["control_variates"] = as_mapping({"deltaH1": controls.map(lambda x: Number(-x))})
    values |= {f"by_{way}": [_sum(one) for one in rows] for way, rows in found.sums.items()}
    values["by_prompt"] = [_sum(one) for one in found.by_prompt]
    values["by_sequence"] = [_sum(one) for one in found.by_response]
    values["top_tokens"] = top_tokens(found, U, top, token_text)
    if found.states is not None or found.responses is not None:
        both = (("states", found.states), ("responses", found.responses))
        values["coupling"] = {name: _coupling(one) for name, one in both if one is not None}
    if found.league:
        values["league"] = [_league(row) for row in found.league]
    return values | {
        "completeness": parts.completeness,
        "agreement": found.agreement,
        "blocks": len(parts.sensitivities.blocks),
        "without_reward": found.without_reward or None,
    }


def what_if_values(found: WhatIf) -> dict[str, Any]:
    """The key `what_if` of a result."""
    return {
        "as_it_is": _effect(found.asis, found.measured.get("")),
        "interventions": [_effect(one, found.measured.get(one.name)) for one in found.effects],
        "solutions": [_solution(one, found.measured.get(one.intervention)) for one in found.solutions],
        "skipped": dict(found.skipped),
    }


def change_values(change: Change) -> dict[str, Any]:
    """A change under the names of its numbers, with errors over E."""
    found = as_mapping(
        {"deltaH1": change.deltaH1.map(_number), "state_fixed": change.state_fixed.map(_number)}
    )
    return found if change.deltaR1 is None else found | _plain("deltaR1", change.deltaR1)


def top_tokens(
    found: Attribution, U: RolloutBatch, count: int, token_text: Callable[[int], str] | None
) -> list[dict[str, Any]]:
    """The tokens that lower deltaH1 per token most, then those that raise it most, the largest first."""
    by_token = found.contributions.by_token()
    places = U.mask.nonzero()
    c = by_token[1][U.mask]
    order = c.argsort()
    lowest = [int(k) for k in order[:count] if c[k] < 0]
    highest = [int(k) for k in order.flip(0)[:count] if c[k] > 0]
    rows = []
    for k in [*lowest, *highest]:
        i, t = (int(x) for x in places[k])
        token = int(U.completion_ids[i, t])
        row: dict[str, Any] = {"sequence": i, "position": t, "id": token}
        if token_text is not None:
            row["text"] = token_text(token)
        row |= {"deltaH1": float(by_token[0, i, t]), "deltaH1_tok": float(c[k])}
        if len(by_token) > 4:
            row["deltaR1"] = float(by_token[4, i, t])
        row |= {
            "advantage": float(found.tokens.advantages[i]),
            "probability": float(found.tokens.p[i, t]),
            "entropy": float(found.tokens.entropy[i, t]),
        }
        rows.append(row)
    return rows


def _sum(one: Sum) -> dict[str, Any]:
    """A class of tokens, or of parameters."""
    counted = {} if one.tokens is None else {"tokens": one.tokens}
    return {"name": one.name, **counted, **change_values(one.change)}


def _coupling(one: Coupling) -> dict[str, Any]:
    """Whose doing the change of sampled states is."""

    def table(found: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: _plain("value", value) for name, value in found.items()}

    return {
        "sampled": len(one.rows),
        "share": table(one.share),
        "size_share": {name: _share(value) for name, value in one.size_share.items()},
        "mean_share": {name: _share(value) for name, value in one.mean_share.items()},
        "mean": table(one.mean),
        "size": table(one.size),
        "sign_agreement": None if one.sign_agreement is None else _share(one.sign_agreement),
        "completeness": one.completeness,
    }


def _league(row: LeagueRow) -> dict[str, Any]:
    """A row of the league table."""
    return {
        "predictor": row.name,
        "target": row.target,
        "ranked": "contributions" if row.signed else "sizes",
        "spearman": None if row.spearman is None else row.spearman.value,
        "spearman_ci95": None if row.spearman is None else list(row.spearman.ci95),
        "sign_agreement": row.sign_agreement,
        "judged": row.judged,
        "recall_top_1": row.recall[0],
        "recall_top_10": row.recall[1],
        "captured_top_10": row.captured,
        "tokens": row.tokens,
    }


def _effect(one: Effect, measured: Measured | None) -> dict[str, Any]:
    """An intervention: its step's numbers where that was taken, and the shortcut's."""
    change, difference = one.told
    found: dict[str, Any] = {
        "name": one.name,
        "claim": one.claim,
        "tokens": one.tokens,
        **change_values(change),
        "difference": change_values(difference),
        "per_reward": None
        if one.per_reward is None
        else {"value": one.per_reward.value, "value_ci95": list(one.per_reward.ci95)},
    }
    if one.of_step is not None:
        off = one.difference.deltaH1.with_other(lambda a, b: a.value - b.value, difference.deltaH1)
        found["shortcut"] = {
            **change_values(one.change),
            "difference": change_values(one.difference),
            "error": as_mapping({"deltaH1": off.map(Number)}),
        }
    if measured is not None:
        weights = measured.weights
        found["exact"] = {
            **as_mapping(
                {
                    "deltaH_true": measured.deltaH_true.map(_number),
                    "difference_true": measured.difference.map(_number),
                }
            ),
            "ESS": weights.ess,
            "pareto_k": weights.pareto_k,
            "pareto_k_good": weights.pareto_k_good,
            "clip_factor": measured.clip_factor,
        }
    return found


def _solution(one: Solution, measured: Measured | None) -> dict[str, Any]:
    """A setting that meets the target, and what its step was measured to do."""
    true = None if measured is None else measured.deltaH_true[one.estimand]
    return {
        "solver": one.solver,
        "target": one.target,
        "estimand": one.estimand.name,
        "setting": None if one.setting is None else _plain("value", one.setting),
        "intervention": one.intervention or None,
        "reason": one.reason or None,
        "measured": None if true is None else _plain("value", true),
    }


def _number(found: Estimate) -> Number:
    """An estimate with its error; how far that is known is that of `blocks`."""
    return Number(found.value, found.se, found.ci95)


def _share(found: Estimate) -> dict[str, Any]:
    """A share, whose interval is cut to where it can lie; unknown where that is all there is."""
    low, high = (min(max(end, 0.0), 1.0) for end in found.ci95)
    known = math.isfinite(found.se) and (low, high) != (0.0, 1.0)
    return {**_plain("value", found), "value_ci95": [low, high] if known else None}


def _plain(name: str, found: Estimate) -> dict[str, Any]:
    """An estimate under a name of its own."""
    return {name: found.value, f"{name}_se": found.se, f"{name}_ci95": list(found.ci95)}
