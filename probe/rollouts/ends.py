"""How the responses of a rollout file ended: by EOS, by a stop string, or by the cap on tokens.

The last decision of a response counts like every other, so an end is never made up. It is read from the file, else it
follows from the settings (stop strings, cap on tokens), and what neither says is counted as not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from probe.errors import DataError
from probe.rollouts.tables import RolloutTable

Kind = Literal["eos", "string", "finished", "length", "unknown"]
Doubt = Literal["tokens", "text", "end", "no_end", "prompt"]

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


@dataclass(frozen=True)
class EndRules:
    """What ends a response by the policy and the settings.

    Attributes:
        eos_ids: ids that end a response, the tokenizer's own first.
        stop_strings: as in `generation.stop_strings`.
        max_new_tokens: the cap on tokens.
    """

    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_new_tokens: int


@dataclass
class Response:
    """One response on its way from the file into a batch.

    Attributes:
        ids: its tokens.
        text: its text.
        truncated: whether the cap on tokens ended it.
        longer: whether it is longer than the cap, and nothing says how it ended.
        doubts: what is not certain about it.
    """

    ids: list[int]
    text: str
    truncated: bool = False
    longer: bool = False
    doubts: list[Doubt] = field(default_factory=list)


def stated_ends(table: RolloutTable) -> list[StatedEnd | None]:
    """What the file says about the end of each response; None where it says nothing.

    Raises:
        DataError: a value cannot be understood, or two columns contradict each other.
    """
    return [_stated(table, i) for i in range(len(table.rows))]


def end_exact(
    responses: Sequence[Response],
    stated: Sequence[StatedEnd | None],
    rules: EndRules,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Fill in how responses of exact token ids ended; the ids stay as they are."""
    for response, said in zip(responses, stated, strict=True):
        if said is not None and said.kind == "length":
            response.truncated = True
            continue
        if not response.ids or response.ids[-1] in rules.eos_ids:
            continue
        if said is None:
            if stopped(response, rules.stop_strings, tokenizer):
                continue
            response.truncated = len(response.ids) >= rules.max_new_tokens
            response.longer = len(response.ids) > rules.max_new_tokens
            if not response.truncated:
                response.doubts.append("no_end")
        elif said.token is not None:
            if response.ids[-1] != said.token:
                response.doubts.append("no_end")
        elif (
            said.kind in ("eos", "unknown")
            or not _is_stop_string(response, said, rules, tokenizer)
            or (
                said.kind == "finished"
                and said.reason
                and not stopped(response, rules.stop_strings, tokenizer)
            )
        ):
            response.doubts.append("no_end")


def end_texts(
    where: str,
    responses: Sequence[Response],
    stated: Sequence[StatedEnd | None],
    rules: EndRules,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Give responses of text the end that was sampled, which a text mostly lacks, as far as it is known.

    Where the file does not say how a response ended: it has as many tokens as the cap, or else EOS ended it, where no
    stop strings are set. With stop strings, a text that ends with one is complete; that the others ended with EOS is
    known only where the file shows that it keeps stop strings.

    Args:
        where: start of an error message.
        responses: their `ids` are those of the text alone; they are extended in place.
        stated: what the file says.
        rules: what ends a response.
        tokenizer: of the policy.

    Raises:
        DataError: EOS ended a response, and there is none.
    """
    at_stop = [stopped(response, rules.stop_strings, tokenizer) for response in responses]
    kept = any(at_stop) or not rules.stop_strings
    for response, said, done in zip(responses, stated, at_stop, strict=True):
        n = len(response.ids)
        if said is not None and said.kind == "length":
            response.truncated = True
        elif response.ids and response.ids[-1] in rules.eos_ids:
            pass  # the text itself has its EOS
        elif said is None and not done and n >= rules.max_new_tokens:
            response.truncated, response.longer = True, n > rules.max_new_tokens
        elif said is not None and said.token is not None:
            if response.ids[-1:] != [said.token]:
                response.ids = [*response.ids, said.token]
        elif said is not None and not _is_stop_string(response, said, rules, tokenizer):
            response.doubts.append("no_end")
        elif said is not None and said.kind == "string":
            _end_with_string(response, said.string, done, rules, tokenizer)
        elif said is not None and said.kind == "eos":
            _end_with_eos(where, response, rules, certain=len(rules.eos_ids) == 1)
        elif done:
            pass  # the token that completes a stop string is the last one
        elif kept and (said is None or said.kind == "finished"):
            _end_with_eos(where, response, rules, certain=False)
        else:
            response.doubts.append("no_end")


def stopped(response: Response, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token completes a stop string; characters of that token may follow the string."""
    present = [stop for stop in stop_strings if stop in response.text]
    if not present:
        return False
    if any(response.text.endswith(stop) for stop in present):
        return True
    before = str(tokenizer.decode(response.ids[:-1], skip_special_tokens=True))
    return not any(stop in before for stop in present)


def _is_stop_string(
    response: Response, said: StatedEnd, rules: EndRules, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether a reason that is no engine's word is a stop string: one of the settings, or at the end of the text."""
    if said.sure or said.string is None:
        return True
    return said.string in rules.stop_strings or stopped(response, [said.string], tokenizer)


def _end_with_eos(where: str, response: Response, rules: EndRules, certain: bool) -> None:
    """Append EOS; `certain` is whether the file says that it was sampled, and which one."""
    if not rules.eos_ids:
        raise DataError(
            f"{where}: expected a tokenizer with an EOS token to end the responses with, found none; set the "
            "tokenizer's eos_token, or add a column completion_ids"
        )
    response.ids = [*response.ids, rules.eos_ids[0]]
    if not certain:
        response.doubts.append("end")


def _end_with_string(
    response: Response,
    string: str | None,
    done: bool,
    rules: EndRules,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """End a response with the stop string that the file names, which engines cut off its text."""
    if string is None:
        if done:
            return
        if len(rules.stop_strings) != 1:
            response.doubts.append("no_end")
            return
        string = rules.stop_strings[0]
    if stopped(response, [string], tokenizer):
        return
    response.ids = [int(t) for t in tokenizer(response.text + string, add_special_tokens=False)["input_ids"]]
    response.doubts.append("end")  # characters may have followed in the token that completed it


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
