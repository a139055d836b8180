"""What a result comes to, in sentences: the answers that a report begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.report.numbers import interval_text, number_text, with_error
from probe.text import percent

VERDICTS = {
    "trustworthy": "the numbers can be believed",
    "caution": "the numbers can be believed with the reservations below",
    "unresolved": "the change is too small for this sample: its sign or size is not known",
    "invalid": "the numbers cannot be believed, for the reasons below",
}
"""What the words of a verdict mean."""


def verdict_meaning(word: str | None) -> str:
    """What a verdict means in a few words; empty for none, and for one that is not known."""
    return VERDICTS.get(word or "", "")


def answer(values: Mapping[str, Any]) -> list[str]:
    """What the update does to the policy's entropy, and which of its parts do it, in sentences; nats per token.

    A result that has values per response only is told in these.

    Args:
        values: the result mapping of a run, as far as it is there.
    """
    of = "_tok" if any(f"{key}_tok" in values for key in ("deltaH1", "deltaH_true")) else ""
    per = "nats per token" if of else "nats per response"
    told = [
        (key, verb)
        for key, verb in ((f"deltaH_true{of}", "measured"), (f"deltaH1{of}", "predicted"))
        if values.get(key) is not None
    ]
    sentences = [_change(values, told, f"H_orig{of}", per)] if told else []
    found = values.get("attribution")
    if found is not None and found.get("momentum") and of:
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
    H = values.get(level)
    share = "" if not H else f", {percent(abs(value / H))} of its {number_text(H)}"
    way = "lowers" if value < 0 else "raises"
    return f"This update {way} the policy's entropy by {with_error(abs(value), error)} {per}{share} ({verb}{others})."


def _parts(found: Mapping[str, Any]) -> str:
    """Which parts of the step do it."""

    def cell(one: Mapping[str, Any]) -> str:
        return with_error(one["deltaH1_tok"], one.get("deltaH1_tok_se"))

    sentence = f"Of the prediction, momentum of earlier updates adds {cell(found['momentum'])}"
    if found.get("tokens"):
        sentence += f" and the tokens of U add {cell(found['tokens'])}"
    rows = found.get("by_outcome") or found.get("by_advantage") or ()
    listed = ", ".join(f"{one['name']} {cell(one)}" for one in rows if one.get("deltaH1_tok"))
    return f"{sentence} ({listed})." if listed and found.get("tokens") else f"{sentence}."
