"""What the columns of a rollout file say about how a response ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from probe.errors.exceptions import DataError
from probe.rollouts.tables import RolloutTable

Kind = Literal["eos", "string", "finished", "length", "unknown"]
TRUNCATED = ("truncated", "is_truncated")
"""Columns that say whether the cap on tokens ended a response."""
REASONS = ("finish_reason", "stop_reason")
"""Columns with the reason in an engine's words."""
END_COLUMNS = frozenset({*TRUNCATED, *REASONS, "stop_sequence"})
_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("length", "max_tokens", "max_new_tokens", "truncated"), "length"),
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_token"), "eos"),
    **dict.fromkeys(("stop_sequence", "stop_string", "stop_str"), "string"),
    **dict.fromkeys(("stop", "finished", "completed", "tool_calls", "tool_use", "function_call"), "finished"),
    **dict.fromkeys(("abort", "aborted", "cancelled", "error", "content_filter", "timeout"), "unknown"),
}
_SIGNS: dict[str, Kind] = {
    "length": "length",
    "max_": "length",
    "limit": "length",
    "truncat": "length",
    "eos": "eos",
}
"""What gives the meaning of words that are not listed."""


@dataclass(frozen=True)
class StatedEnd:
    """What a file says about the end of one response.

    Attributes:
        kind: `finished` is by EOS or by a stop string, `unknown` by something else (an abort).
        string: the stop string, where it is named.
        token: the token id that ended it, where it is named.
        reason: whether an engine's reason says so, and not only that the cap did not end it.
        sure: whether `string` is said to be a stop string, and is not only a word that has no other meaning.
    """

    kind: Kind
    string: str | None = None
    token: int | None = None
    reason: bool = True
    sure: bool = True


def stated_ends(table: RolloutTable) -> list[StatedEnd | None]:
    """What the file says about the end of each response; None where it says nothing.

    Raises:
        DataError: a value cannot be understood, or two columns contradict each other.
    """
    return [_stated(table, i) for i in range(len(table.rows))]


def _stated(table: RolloutTable, i: int) -> StatedEnd | None:
    """What the columns say about one row."""
    row = table.rows[i]
    found: dict[str, StatedEnd] = {}
    for name in TRUNCATED:
        if name in table.columns:
            value = row[name]
            if not isinstance(value, bool):
                raise DataError(f"{table.where(i)}: expected {name} to be true or false, found {value!r}")
            found[name] = StatedEnd("length" if value else "finished", reason=False)
    reason = _reason(table, i)
    if reason is not None:
        found[REASONS[0] if REASONS[0] in table.columns else REASONS[1]] = reason
    cut = {name: end.kind == "length" for name, end in found.items()}
    if len(set(cut.values())) > 1:
        said = ", ".join(f"{name} = {row[name]!r}" for name in found)
        raise DataError(
            f"{table.where(i)}: expected columns that agree on whether the cap on tokens ended the response, found "
            f"{said}; leave out the wrong one"
        )
    return reason if reason is not None else next(iter(found.values()), None)


def _reason(table: RolloutTable, i: int) -> StatedEnd | None:
    """The engine's reason of one row; None where there is none."""
    row = table.rows[i]
    finish, stop = (row.get(name) for name in REASONS)
    if finish is None:
        if stop is None:
            return None
        if isinstance(stop, int) and not isinstance(stop, bool):
            return StatedEnd("eos", token=stop)
        said = _parse(table, i, REASONS[1], stop)
        if said is None:  # no engine's word: the stop string itself
            return StatedEnd("string", string=str(stop), sure=False)
        return _with_sequence(said, row)
    said = _parse(table, i, REASONS[0], finish)
    if said is None:
        return StatedEnd("unknown")
    if said.kind != "finished":
        return _with_sequence(said, row)
    if REASONS[1] not in table.columns:
        return said
    if stop is None:  # an engine that names what stopped it names no EOS
        return StatedEnd("eos")
    if isinstance(stop, int) and not isinstance(stop, bool):
        return StatedEnd("eos", token=stop)
    other = _parse(table, i, REASONS[1], stop)
    return StatedEnd("string", string=str(stop)) if other is None else _with_sequence(other, row)


def _with_sequence(said: StatedEnd, row: Mapping[str, Any]) -> StatedEnd:
    """The stop string of the column `stop_sequence`, where the reason is one."""
    sequence = row.get("stop_sequence")
    return (
        StatedEnd("string", string=sequence) if said.kind == "string" and isinstance(sequence, str) else said
    )


def _parse(table: RolloutTable, i: int, name: str, value: Any) -> StatedEnd | None:
    """A reason in an engine's words; None for a text that is no such word."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    matched = None
    if isinstance(value, Mapping):
        matched, value = value.get("matched"), value.get("type")
    if not isinstance(value, str):
        raise DataError(
            f"{table.where(i)}: expected {name} to be a text such as stop or length, found {value!r:.60}"
        )
    word = value.rpartition(".")[2].lower()
    kind = _WORDS.get(word)
    if kind is None and word.replace("_", "").replace("-", "").isalpha():
        kind = next((meaning for sign, meaning in _SIGNS.items() if sign in word), None)
    if kind is None:
        return None
    if kind == "finished" and isinstance(matched, str):
        return StatedEnd("string", string=matched)
    if kind == "finished" and isinstance(matched, int) and not isinstance(matched, bool):
        return StatedEnd("eos", token=matched)
    return StatedEnd(kind)
