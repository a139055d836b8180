"""Names that were probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message that points to the most similar of `names`, or nothing.

    >>> nearest("exact_numbr", ["exact_number", "gsm8k"])
    ' (nearest: exact_number)'
    >>> nearest("x", ["exact_number", "gsm8k"])
    ''
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (nearest: {close[0]})" if close else ""
