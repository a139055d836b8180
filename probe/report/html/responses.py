"""The responses of U with their tokens, as the data that a page shades them from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probe.text import printable

MOST_TOKENS = 100_000
"""Tokens that a page holds (some 4 MB); of more, the responses of largest contribution."""
TOKEN_COLUMNS = {
    "c": "contribution_deltaH1_tok",
    "r": "contribution_deltaR1",
    "h": "entropy_before",
    "l": "logprob_before",
}
"""Columns of a token on the page, by their names in a log."""
DIGITS = 3
"""Significant digits of a token's numbers."""


def response_data(document: Mapping[str, Any], most: int = MOST_TOKENS) -> dict[str, Any] | None:
    """What a page needs to show the responses of U; None where a log has none.

    Args:
        document: a main log; tokens come from the level `debug`, responses from `detailed`.
        most: tokens at the most.

    Returns:
        `responses` (the largest contribution first; index, group, prompt, reward, advantage, length, contribution,
        and by token: `t` its text, and `TOKEN_COLUMNS`), `texts` of tokens, `prompts`, `largest` contribution of a
        token, `left_out` responses, whether they are `attributed`, and whether their tokens are (`shaded`). Texts are
        printable.
    """
    sequences: Mapping[str, Any] = document.get("sequences") or {}
    records: Sequence[Mapping[str, Any]] = sequences.get("U") or ()
    if not records:
        return None
    tokens: Sequence[Mapping[str, Any]] = (document.get("tokens") or {}).get("U") or ()
    key = "contribution_deltaH1_tok"
    attributed = all(record.get(key) is not None for record in records)
    order = sorted(range(len(records)), key=lambda i: -abs(records[i][key]) if attributed else i)
    texts, prompts = _Numbered(), _Numbered()
    kept: list[dict[str, Any]] = []
    count = 0
    for i in order:
        if kept and count + records[i]["length"] > most:
            break
        count += records[i]["length"]
        kept.append(_response(records[i], tokens[i] if tokens else {}, sequences, texts, prompts, most))
    return {
        "responses": kept,
        "texts": list(texts.found),
        "prompts": list(prompts.found),
        "largest": max((abs(c) for one in kept for c in one.get("c", ()) if c is not None), default=0.0),
        "left_out": len(records) - len(kept),
        "attributed": attributed,
        "shaded": attributed and any("c" in one for one in kept),
        "tokens": count,
    }


class _Numbered:
    """Texts, each once."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The number of a text."""
        return self.found.setdefault(printable(text), len(self.found))


def _response(
    record: Mapping[str, Any],
    tokens: Mapping[str, Any],
    sequences: Mapping[str, Any],
    texts: _Numbered,
    prompts: _Numbered,
    most: int,
) -> dict[str, Any]:
    """One response."""
    known: Sequence[Mapping[str, Any]] = sequences.get("prompts") or ()
    found: dict[str, Any] = {
        "i": record["index"],
        "g": record["group"],
        "n": record["length"],
        "reward": record.get("reward"),
        "advantage": _short(record.get("advantage")),
        "entropy": _short(record["entropy_before"] / record["length"])
        if record.get("entropy_before") is not None and record["length"]
        else None,
        "contribution": _short(record.get("contribution_deltaH1_tok")),
        "truncated": record["truncated"],
    }
    if known:
        found["p"] = prompts(known[record["prompt"]]["text"])
    if "text" in tokens:
        found["t"] = [texts(text) for text in tokens["text"][:most]]
    elif "completion" in record:
        found["text"] = printable(record["completion"])
    found |= {
        name: [_short(x) for x in tokens[column][:most]]
        for name, column in TOKEN_COLUMNS.items()
        if column in tokens
    }
    return found


def _short(value: float | None) -> float | None:
    """A number with few digits; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS - 1}e}")
