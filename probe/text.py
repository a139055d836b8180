"""Texts of others on their way to a terminal, a log or a message."""

from __future__ import annotations

from typing import Any


def text_of(error: BaseException) -> str:
    """The text of an error, also of one whose text raises.

    >>> text_of(ValueError("too long"))
    'too long'
    """
    try:
        return str(error)
    except Exception:
        return "(without a text: its __str__ raises)"


def error_text(error: BaseException) -> str:
    """Type and text of an error.

    >>> error_text(ValueError("too long"))
    'ValueError: too long'
    """
    return f"{type(error).__name__}: {text_of(error)}"


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text; its type where there is none.

    >>> first_line(ValueError("too long\nby far")), first_line(ValueError())
    ('too long', 'ValueError')
    """
    return (text_of(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: object, limit: int = 60) -> str:
    """The `repr` of a value of someone else's, shortened, also of one whose `repr` raises."""
    try:
        return repr(value)[:limit]
    except Exception:
        return f"(a {type(value).__name__} whose __repr__ raises)"


def percent(share: float) -> str:
    """A share as per cent, with one decimal at most; one that this would make 0 or all is said to be within it.

    >>> percent(0.1251), percent(0.4), percent(0.0002), percent(0.9998), percent(1.0), percent(0.0)
    ('12.5 %', '40 %', '< 0.1 %', '> 99.9 %', '100 %', '0 %')
    """
    shown = f"{100 * share:.1f}".removesuffix(".0")
    if shown in ("0", "-0") and share != 0:
        return f"{'<' if share > 0 else '> -'} 0.1 %".replace("- ", "-")
    return "> 99.9 %" if shown == "100" and share < 1 else f"{shown} %"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42), duration(600), duration(10000)
    ('42 s', '10 min', '2.8 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def printable(text: str) -> str:
    r"""A text as a terminal may show it: what is not printable (escape sequences, lone surrogates) as its escape.

    Names in a stranger's files reach messages; a terminal would obey the commands in them.

    >>> print(printable("red \x1b[31m, lost \ud83d\nnext line"))
    red \x1b[31m, lost \ud83d
    next line
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def well_formed(text: str) -> str:
    r"""A text without lone surrogates, the halves of characters that tokenizers and files refuse.

    Each becomes U+FFFD, as tokenizers decode a part of a character; two halves that belong together become theirs.

    >>> well_formed("ok \ud83d") == "ok \ufffd", well_formed("\ud83d" + "\ude00") == "\U0001f600"
    (True, True)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def all_well_formed(value: Any) -> Any:
    """A value of JSON with `well_formed` texts everywhere in it, names of fields included."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [all_well_formed(part) for part in value]
    if isinstance(value, dict):
        return {all_well_formed(name): all_well_formed(part) for name, part in value.items()}
    return value
