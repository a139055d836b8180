"""What a result comes to, in sentences: the answers that a report begins with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from probe.digits import interval_text, number_text, with_error
from probe.text import percent

VERDICTS = {
    "trustworthy": "the numbers can be believed",
    "caution": "the numbers can be believed, with reservations",
    "unresolved": "the change is too small for this sample: its sign or size is not known",
    "invalid": "the numbers cannot be believed",
}
"""What the words of a verdict mean."""
CHANGES = {"deltaH1": "predicted", "deltaH_true": "measured", "residual": "difference"}
"""The changes that pages, cards and figures show beside each other, with their labels."""
NAMED = {
    "decay": "weight decay",
    "kl": "the KL penalty",
    "entropy_bonus": "the entropy bonus",
    "router": "the load-balancing loss",
    "control_variates": "control variates",
}
"""Parts that are named where they are large."""
WORTH_NAMING = 0.1
"""Of the largest part, from which on another one is named."""
MOST_UPDATES = 1000
"""Updates up to which it is said how many would halve or double the entropy."""


def verdict_meaning(word: str | None) -> str:
    """What a verdict means in a few words; empty for none, and for one that is not known."""
    return VERDICTS.get(word or "", "")


def is_preconditioned(values: Mapping[str, Any]) -> bool:
    """Whether the prediction is of the preconditioned gradient, and not of the optimizer's step."""
    return "preconditioned_step" in ((values.get("diagnostics") or {}).get("bias_flags") or ())


def answer(values: Mapping[str, Any]) -> list[str]:
    """What the update does to the policy's entropy, and which of its parts do it, in sentences; nats per token.

    A result that has values per response only is told in these.

    Args:
        values: the result mapping of a run, as far as it is there.
    """
    # the estimand of the measurement, where there is one
    first = "deltaH_true" if "deltaH_true" in values or "deltaH_true_tok" in values else "deltaH1"
    of = "_tok" if f"{first}_tok" in values else ""
    per = "nats per token" if of else "nats per response"
    told = [
        (key, verb)
        for key, verb in ((f"deltaH_true{of}", "measured"), (f"deltaH1{of}", "predicted"))
        if values.get(key) is not None
    ]
    sentences = [_change(values, told, f"H_orig{of}", per)] if told else []
    found = values.get("attribution")
    if found is not None and found.get("momentum") and found.get("total"):
        sentences.append(_parts(found))
    return sentences


def _change(values: Mapping[str, Any], told: list[tuple[str, str]], level: str, per: str) -> str:
    """What the entropy does, by the first of what is told; the others for comparison."""
    key, verb = told[0]
    value, error, interval = values[key], values.get(f"{key}_se"), values.get(f"{key}_ci95")
    ends = [end for end in interval or () if end is not None]
    others = "".join(
        f"; {name} {with_error(values[other], values.get(f'{other}_se'))}" for other, name in told[1:]
    )
    doubt = {"unresolved": "not resolved", "invalid": "not known"}.get(values.get("verdict") or "")
    if value != 0 and (doubt or (len(ends) == 2 and ends[0] <= 0 <= ends[1])):
        span = f", 95 % interval {interval_text(interval)}" if len(ends) == 2 else ""
        return (
            f"What this update does to the entropy is {doubt or 'not resolved'}: {verb} {with_error(value, error)} "
            f"{per}{span}{others}."
        )
    if value == 0:
        return f"This update leaves the entropy as it is: {verb} 0 {per}{others}."
    H, way = values.get(level), "lowers" if value < 0 else "raises"
    by = f" by {percent(abs(value / H))} of its {number_text(H)} {per}" if H else ""
    unit = "" if H else f" {per}"
    sentence = f"This update {way} the policy's entropy{by}: {verb} {with_error(value, error)}{unit}{others}."
    if key.startswith("deltaH1") and is_preconditioned(values):
        return f"{sentence} It is the preconditioned gradient's: no step that an optimizer takes."
    ahead = _so_many(value / H) if H else ""
    return f"{sentence} {ahead}" if ahead else sentence


def _so_many(share: float) -> str:
    """How many updates that change the entropy by the same share would halve or double it; nothing for very many."""
    if share <= -1.0:
        return ""
    steps = math.log(0.5 if share < 0 else 2.0) / math.log1p(share)
    if steps > MOST_UPDATES:
        return ""
    what = "halve" if share < 0 else "double"
    return (
        f"About {max(round(steps), 1)} updates like it would {what} it; whether they come, one checkpoint cannot say: "
        "a forecast takes a probe inside of the training (probe.watch)."
    )


def _parts(found: Mapping[str, Any]) -> str:
    """Which parts of the step do it."""

    def cell(one: Mapping[str, Any]) -> str:
        return with_error(one["deltaH1_tok"], one.get("deltaH1_tok_se"))

    sentence = f"Of the prediction, {cell(found['momentum'])} is momentum of earlier updates"
    if found.get("tokens"):
        sentence += f" and {cell(found['tokens'])} the tokens of U"
    rows = found.get("by_outcome") or found.get("by_advantage") or ()
    listed = ", ".join(f"{one['name']} {cell(one)}" for one in rows if one.get("deltaH1_tok"))
    if listed and found.get("tokens"):
        sentence += f" ({listed})"
    largest = max(abs(found[name]["deltaH1_tok"]) for name in ("momentum", "tokens") if found.get(name))
    others = [
        f"{words} {cell(found[name])}"
        for name, words in NAMED.items()
        if found.get(name) and abs(found[name]["deltaH1_tok"]) > WORTH_NAMING * largest
    ]
    return f"{sentence}; {', '.join(others)}." if others else f"{sentence}."
