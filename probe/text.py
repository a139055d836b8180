"""Texts of others on their way to a terminal, a log or a message."""

from __future__ import annotations


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


def shown(value: object, limit: int = 60) -> str:
    """The `repr` of a value of someone else's, shortened, also of one whose `repr` raises."""
    try:
        return repr(value)[:limit]
    except Exception:
        return f"(a {type(value).__name__} whose __repr__ raises)"


def printable(text: str) -> str:
    r"""A text as a terminal may show it: what is not printable (escape sequences, lone surrogates) as its escape.

    Names in a stranger's files reach messages; a terminal would obey the commands in them.

    >>> print(printable("red \x1b[31m, lost \ud83d\nnext line"))
    red \x1b[31m, lost \ud83d
    next line
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
