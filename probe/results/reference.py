"""The reference page of all keys, made from their tables: `docs/quantities.md`."""

from __future__ import annotations

from collections.abc import Iterable

from probe.estimand import SEQUENCE, TOKEN
from probe.results import diagnostic_keys, keys
from probe.results.quantity import Quantity

_PAGE = """# Every key of a result

This page is made from the tables of the code (`probe.results`). Formulas and the meaning of each number are in
[definitions](definitions.md), the files that hold them in [log schema](log_schema.md).

A key with `_tok` beside it exists per token too, in nats per token. Keys of a phase that did not run are absent. What
is marked with * is in every log and in the summary; the others are there from level `standard` on.

## Result

{results}

## Batch statistics

Beside these, `E` and `U` have mean, standard deviation, smallest and largest of lengths, rewards, advantages and
entropies.

{statistics}

## Diagnostics

{diagnostics}
"""


def reference_page() -> str:
    """The page as Markdown."""
    return _PAGE.format(
        results=_table(keys.QUANTITIES),
        statistics=_table(keys.STATISTICS),
        diagnostics=_table(diagnostic_keys.DIAGNOSTICS),
    )


def _table(quantities: Iterable[Quantity]) -> str:
    """Keys with what they are, errors behind their value."""
    rows = ["| key | meaning |", "|---|---|"]
    for one in quantities:
        rows.append(_row(one, "", one.words, one.core))
        rows += [_row(one, part.ending, part.words, part.core) for part in one.parts]
    return "\n".join(rows)


def _row(one: Quantity, ending: str, words: str, core: bool) -> str:
    """One line of the table."""
    names = [
        f"`{estimand.key(one.key, ending)}`" for estimand in (SEQUENCE, TOKEN) if estimand in one.estimands
    ]
    return f"| {', '.join(names)}{' *' if core else ''} | {cell_text(words)} |"


def cell_text(words: str) -> str:
    """Words for a cell: a bar would end it, and what stands in angle brackets would be a tag."""
    return words.replace("|", r"\|").replace("<", "&lt;").replace(">", "&gt;")
