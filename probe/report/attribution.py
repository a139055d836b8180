"""What a report says of an attribution, of coupling, of the league table and of interventions: tables of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.attribution.league import CEILING
from probe.digits import NOT_RESOLVED, number_text, with_error
from probe.report.rows import Row
from probe.text import percent

PARTS = {
    "momentum": "gradients of earlier updates, by Adam's first moment",
    "decay": "weight decay",
    "tokens": "the policy-gradient terms of U's tokens",
    "kl": "the KL penalty",
    "entropy_bonus": "the entropy bonus",
    "router": "the load-balancing loss of the experts",
    "total": "their sum: deltaH1 without control variates",
    "control_variates": "what they add to make it the reported deltaH1; no token can have it",
}
SUMS = {
    "by_advantage": "by the sign of the advantage",
    "by_outcome": "by right and wrong (above the middle of the rewards)",
    "by_entropy": "by the entropy of the token's state",
    "by_kind": "by what the token is",
    "by_layer": "by layer, the whole step",
}
TERMS = {
    "own": "the token sampled at the state",
    "response": "the rest of its response",
    "group": "the other responses to its prompt",
    "others": "the responses to other prompts",
}
TARGETS = {
    "deltaH1": "what tokens add to deltaH1",
    "state_fixed": "what they do to the states of E",
    "own_state": "what they do to their own state",
}
LARGE_ERROR = 0.25
"""Of a difference: a shortcut that is off by more is listed."""
LEADERS = 4
"""Predictors that the report lists against each target; the result has all."""


@dataclass(frozen=True)
class Table:
    """Rows under heads.

    Attributes:
        heads: of the labels and of the cells.
        rows: of the table.
    """

    heads: tuple[str, ...]
    rows: Sequence[Row]


def attribution_tables(values: Mapping[str, Any]) -> list[Table]:
    """The tables of a result; none where nothing was attributed."""
    found: Mapping[str, Any] | None = values.get("attribution")
    tables: list[Table] = []
    if found is not None:
        tables += [_parts(found, values), top_tokens_table(found), _coupling(found), _league(found)]
    if values.get("what_if") is not None:
        compared = values["what_if"]
        tables += [_what_if(compared, values), *beside_what_if(compared)]
    return [table for table in tables if table.rows]


def beside_what_if(found: Mapping[str, Any]) -> list[Table]:
    """What there is to say of a comparison of interventions beside their differences; none that is empty."""
    tables = (_without_effect(found), _shortcuts(found), _measured(found), _solutions(found))
    return [table for table in tables if table.rows]


def summands(found: Mapping[str, Any]) -> list[tuple[str, bool, Mapping[str, Any]]]:
    """What the reported deltaH1 is the sum of, in its order: key or class, whether it is a class of U's tokens, change.

    The classes are right and wrong responses where rewards tell them apart, else the signs of the advantage.
    """
    classes: Sequence[Mapping[str, Any]] = found.get("by_outcome") or found.get("by_advantage") or ()
    rows: list[tuple[str, bool, Mapping[str, Any]]] = []
    for name in PARTS:
        if name == "tokens" and classes:
            rows += [(one["name"], True, one) for one in classes]
        elif name != "total" and name in found:
            rows.append((name, False, found[name]))
    return rows


def _parts(found: Mapping[str, Any], values: Mapping[str, Any]) -> Table:
    """What deltaH1 is the sum of, and sums of the tokens' part."""
    rows = [
        Row(name.replace("_", " "), _cells(found[name]), meaning)
        for name, meaning in PARTS.items()
        if name in found
    ]
    if "control_variates" in found and "deltaH1_tok" in values:
        rows.append(Row("reported", (_with_error(values, "deltaH1_tok"), "-"), "deltaH1 as above"))
    error = f"{found['completeness']:.1e}"
    rows.append(Row("  off by", (error, ""), "how far the parts are from adding up, relative to the largest"))
    for key, meaning in SUMS.items():
        for one in found.get(key) or ():
            counted = f", {one['tokens']} tokens" if "tokens" in one else ""
            rows.append(Row(f"  {one['name']}", _cells(one), f"{meaning}{counted}"))
    return Table(("Which tokens did it?", "deltaH1, nats per token", "expected reward"), rows)


def _cells(one: Mapping[str, Any]) -> tuple[str, str]:
    """A change per token, and that of the reward."""
    return (
        _with_error(one, "deltaH1_tok"),
        _with_error(one, "deltaR1") if "deltaR1" in one else "-",
    )


def top_tokens_table(found: Mapping[str, Any], count: int = 3) -> Table:
    """The tokens of largest contribution on either side."""
    listed: Sequence[Mapping[str, Any]] = found.get("top_tokens") or ()
    falls = [one for one in listed if one["deltaH1_tok"] < 0][:count]
    rises = [one for one in listed if one["deltaH1_tok"] > 0][:count]
    rows = [
        Row(
            repr(one["text"]) if "text" in one else str(one.get("id", "a token")),
            (f"{one['deltaH1_tok']:+.2e}",),
            f"response {one['sequence']}, token {one['position']}: advantage {one['advantage']:+.2f}, probability "
            f"{one['probability']:.2f}, entropy {one['entropy']:.2f}",
        )
        for one in (*falls, *rises)
    ]
    return Table(("Tokens of largest contribution", "nats per token"), rows)


def _coupling(found: Mapping[str, Any]) -> Table:
    """Whose doing the change of a state's entropy is."""
    both: Mapping[str, Any] = found.get("coupling") or {}
    rows = []
    for name, meaning in TERMS.items():
        shares = [
            both["states"][which][name] if "states" in both else None
            for which in ("size_share", "mean_share")
        ]
        whole = both["responses"]["size_share"][name] if "responses" in both and name != "response" else None
        shares.append(whole)
        cells = ["-" if one is None else _share(one) for one in shares]
        rows.append(Row(name, tuple(cells), meaning))
    if "states" in both:
        sizes = both["states"]["size"]
        tokens = sum(sizes[name]["value"] for name in TERMS)
        times = sizes["momentum"]["value"] / tokens if tokens > 0 else None
        if times is not None:
            rows.append(Row("momentum", (f"{times:.2g} x", "", ""), "its size relative to the four together"))
        agreement = both["states"]["sign_agreement"]
        if agreement is not None:
            rows.append(
                Row(
                    "sign",
                    (_share(agreement), "-"),
                    "states that move the way that their own token pushes them",
                )
            )
    heads = ("Whose doing?", "share of all changes", "share, mean of states", "of whole responses")
    return Table(heads, rows if both else [])


def _share(one: Mapping[str, Any]) -> str:
    """A share with its interval, within 0 and 1."""
    if one["value"] is None:
        return NOT_RESOLVED
    value, ends = f"{100 * one['value']:.1f} %", [100 * end for end in one.get("value_ci95") or ()]
    return f"{value} [{ends[0]:.1f}, {ends[1]:.1f}]" if len(ends) == 2 else value


def _league(found: Mapping[str, Any]) -> Table:
    """The best predictors against each target."""
    rows = []
    league: Sequence[Mapping[str, Any]] = found.get("league") or ()
    for target, meaning in TARGETS.items():
        of_target = [one for one in league if one["target"] == target and one["ranked"] == "contributions"]
        ceiling = [one for one in of_target if one["predictor"] == CEILING]
        others = [one for one in of_target if one["predictor"] != CEILING]
        signed = [one for one in others if one["sign_agreement"] is not None]
        without = [one for one in others if one["spearman"] is None and one not in signed[:LEADERS]]
        for one in (*ceiling, *signed[:LEADERS], *without):
            agreement = one["sign_agreement"]
            cells = (
                _correlation(one),
                "-" if agreement is None else percent(agreement),
                percent(one["captured_top_10"]),
            )
            rows.append(
                Row(one["predictor"].replace("_", " "), cells, f"{meaning}, {one['tokens']} tokens ranked")
            )
    count = len({one["predictor"] for one in league}) - 1
    head = f"League table (best {LEADERS} of {count})"
    return Table((head, "Spearman", "signs right", "top 10 % hold"), rows)


def _correlation(one: Mapping[str, Any]) -> str:
    """A rank correlation of the league table with its interval."""
    if one["spearman"] is None:
        return "all scores alike"
    ends = [end for end in one["spearman_ci95"] if end is not None]
    return f"{one['spearman']:+.2f}" + (f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if len(ends) == 2 else "")


def _what_if(found: Mapping[str, Any], values: Mapping[str, Any]) -> Table:
    """What interventions would do, those that raise the entropy most first.

    Columns of differences are empty for the update as it is; its expected reward stands beneath.
    """
    order = sorted(found["interventions"], key=lambda one: -(one["difference"]["deltaH1_tok"] or 0.0))
    rows = []
    for one in (found["as_it_is"], *(one for one in order if not _idle(one))):
        per, difference = one.get("per_reward"), one["difference"]
        changes = [
            _with_error(difference, key) if key in difference else "-" for key in ("deltaH1_tok", "deltaR1")
        ]
        cells = (
            _with_error(one, "deltaH1_tok"),
            *(changes if one["name"] else ("", "")),
            "-" if per is None else number_text(per["value"]),
        )
        rows.append(Row(_label(one["name"]), cells, "" if one["name"] else _base(one, values)))
    heads = ("What if?", "deltaH1, per token", "difference", "reward's difference", "per reward")
    return Table(heads, rows)


def _base(one: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """What there is to say of the update that interventions are compared with."""
    said = [f"expected reward {_with_error(one, 'deltaR1')}"] if "deltaR1" in one else []
    estimates: Sequence[Mapping[str, Any]] = values.get("estimates") or ()
    reported = [entry for entry in estimates if entry["quantity"] == "deltaH1" and entry.get("reported")]
    if any(entry["estimator"].endswith("+cv") for entry in reported):
        said.append(
            f"without control variates, as all of this table (with them {_with_error(values, 'deltaH1_tok')})"
        )
    return "; ".join(said)


def _without_effect(found: Mapping[str, Any]) -> Table:
    """What does not change a token, and what cannot be made of this U."""
    idle = [_label(one["name"]) for one in found["interventions"] if _idle(one)]
    rows = [Row("no token changes", ("",), ", ".join(idle))] if idle else []
    rows += [Row(name, ("left out",), reason) for name, reason in found["skipped"].items()]
    return Table(("Without effect",), rows)


def _idle(one: Mapping[str, Any]) -> bool:
    """Whether an intervention changes neither a token's weight nor the step."""
    return bool(one["tokens"] == 0 and one["difference"]["deltaH1_tok"] == 0)


def _label(name: str) -> str:
    """The name of an intervention."""
    return name or "as it is"


def _shortcuts(found: Mapping[str, Any]) -> Table:
    """What the sums of contributions alone say, where the optimizer's own step says something else."""
    rows = []
    for one in found["interventions"]:
        short = one.get("shortcut")
        if short is None or not one["tokens"]:
            continue
        own, error = one["difference"]["deltaH1_tok"], short["error"]["deltaH1_tok"]
        if own is not None and abs(error) > LARGE_ERROR * max(
            abs(own), one["difference"]["deltaH1_tok_se"] or 0.0
        ):
            held = short["difference"]["deltaH1_tok"]
            cells = (
                _with_error(one["difference"], "deltaH1_tok"),
                _with_error(short["difference"], "deltaH1_tok"),
                _of_the_optimizer(own, held),
            )
            rows.append(Row(_label(one["name"]), cells, ""))
    heads = (
        "Where the optimizer changes it",
        "difference, its step",
        "by tokens' sums alone",
        "the optimizer",
    )
    return Table(heads, rows)


def _of_the_optimizer(own: float, held: float) -> str:
    """What the optimizer's step makes of the difference that the sums of contributions say.

    >>> _of_the_optimizer(0.02, 0.03), _of_the_optimizer(0.03, 0.02), _of_the_optimizer(-0.01, 0.02)
    ('takes back 33 %', 'adds 50 %', 'turns its sign')
    """
    if held == 0:
        return "-"
    ratio = own / held
    if ratio < 0:
        return "turns its sign"
    return f"{'takes back' if ratio < 1 else 'adds'} {100 * abs(1 - ratio):.0f} %"


def _measured(found: Mapping[str, Any]) -> Table:
    """The steps that were measured."""
    rows = []
    for one in (found["as_it_is"], *found["interventions"]):
        exact = one.get("exact")
        if exact is None:
            continue
        k, good = exact["pareto_k"], exact["pareto_k_good"]
        doubt = "" if good is None or good else f"the weights do not carry it: Pareto k {k:.2f}"
        cells = (
            with_error(one["deltaH1_tok"], one.get("deltaH1_tok_se")),
            with_error(exact["deltaH_true_tok"], exact.get("deltaH_true_tok_se")),
            "" if not one["name"] else _with_error(exact, "difference_true_tok"),
        )
        rows.append(Row(_label(one["name"]), cells, doubt))
    heads = ("Steps that were measured", "deltaH1, per token", "deltaH_true", "its difference")
    return Table(heads, rows)


def _with_error(values: Mapping[str, Any], key: str) -> str:
    """A number of a mapping with its error."""
    return with_error(values[key], values.get(f"{key}_se"))


def _solutions(found: Mapping[str, Any]) -> Table:
    """The settings at which the prediction meets the target, and what their steps were measured to do."""
    rows = []
    for one in found.get("solutions") or ():
        setting, measured = one["setting"], one["measured"]
        what = {"learning_rate": "learning rate, times", "entropy_bonus": "entropy bonus, coefficient"}[
            one["solver"]
        ]
        cell = NOT_RESOLVED if setting is None else with_error(setting["value"], setting["value_se"])
        target = f"for {one['target']:+.4g} nats per {one['estimand'].replace('sequence', 'response')}"
        if setting is None:
            target = f"{target}: {one['reason']}"
        elif setting["value_ci95"][0] < 0 < setting["value_ci95"][1]:
            target = f"{target}; its sign is not resolved"
        rows.append(Row(what, (cell, "" if measured is None else _with_error(measured, "value")), target))
    return Table(("Settings that meet the target", "", "measured"), rows)
