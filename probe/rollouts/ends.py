"""How the responses of a rollout file ended: by EOS, by a stop string, or by the cap on tokens.

The last decision of a response counts like every other, so an end is never made up. It is read from the file, else it
follows from the settings (stop strings, cap on tokens), and what neither says is counted as not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from probe.errors.exceptions import DataError
from probe.rollouts.stated_ends import StatedEnd

Doubt = Literal["tokens", "text", "end", "no_end", "prompt"]


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
