"""The report of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from probe.report.attribution import attribution_tables
from probe.report.rows import (
    ERRORS,
    Row,
    entropy_rows,
    estimator_rows,
    headline,
    settings_rows,
    time_rows,
    trust_rows,
)
from probe.terminal import NARROWEST, encodable, padded, wrapped

if TYPE_CHECKING:
    from probe.results.result import ProbeResult

LABELS = (32, 24)
"""Columns of labels at most, in two layouts; a longer one has a line of its own."""
SHORTEST_MEANING = 34
"""Columns below which meanings stand beneath the numbers."""
GAP = 2
HEAD, MEANING = "bold", "dim"
COLOURS = {
    "trustworthy": "bold green",
    "caution": "bold yellow",
    "unresolved": "bold yellow",
    "invalid": "bold red",
}
"""Of the words of a verdict, which say it all without them."""


def report(result: ProbeResult, width: int = NARROWEST, encoding: str = "utf-8") -> str:
    """The report of a run as plain text: verdict, entropies, whether to trust them, where the time went.

    Args:
        result: of the run.
        width: columns that no line exceeds, 80 or more. No number is broken: where columns do not fit beside each
            other, the layout is another one.
        encoding: of the stream; what it cannot show is shown as escapes.
    """
    return styled_report(result, width, encoding).plain


def styled_report(result: ProbeResult, width: int = NARROWEST, encoding: str = "utf-8") -> Text:
    """The report with its colours; see `report`."""
    values = result.values

    def shown(text: str) -> str:
        return encodable(text, encoding)

    tables = [
        (entropy_rows(values), ("", "nats per token", "nats per response", ERRORS)),
        (estimator_rows(values), ("Estimators", "nats per token", "nats per response", "variance ratio")),
        (trust_rows(values), ("Can this be trusted?",)),
        *((table.rows, table.heads) for table in attribution_tables(values)),
        (settings_rows(values), ("Settings of the update",)),
        (time_rows(values), ("Time",)),
    ]
    parts = [
        [Text(line) for line in wrapped(shown(headline(result)), width, further="  ")],
        _verdict(values, width, shown),
        *(_table(rows, heads, width, shown) for rows, heads in tables if rows),
    ]
    lines = Text("\n\n").join(Text("\n").join(part) for part in parts if part)
    return lines.append("\n")


def closing(values: Mapping[str, Any], files: Mapping[str, str], width: int, encoding: str = "utf-8") -> Text:
    """The last lines: the verdict once more, with its first reason, and where the files are.

    Args:
        values: the result mapping.
        files: paths by what they are.
        width: columns that the verdict does not exceed; a path stays whole, to be copied.
        encoding: of the stream.
    """
    word, lines = values.get("verdict"), list[Text]()
    if word is not None:
        reasons: Sequence[str] = values.get("verdict_reasons") or ()
        text = encodable(f"Verdict: {word}. {reasons[0]}" if reasons else f"Verdict: {word}", encoding)
        lines += _coloured(wrapped(text, width, further="  "), str(word))
    lines += [Text(encodable(f"{what}: {path}", encoding)) for what, path in files.items()]
    return Text("").join(line.append("\n") for line in lines)


def _verdict(values: Mapping[str, Any], width: int, shown: Callable[[str], str]) -> list[Text]:
    """The verdict and its reasons, if there is one."""
    word = values.get("verdict")
    lines = _coloured([shown(f"Verdict: {word}")], str(word)) if word is not None else []
    for reason in values.get("verdict_reasons") or ():
        lines += [Text(line) for line in wrapped(shown(reason), width, "  - ")]
    return lines


def _coloured(lines: Sequence[str], word: str) -> list[Text]:
    """Lines of which the first begins with the verdict."""
    first, *further = lines
    text = Text(first)
    text.stylize(COLOURS.get(word, HEAD), 0, len(f"Verdict: {word}"))
    return [text, *map(Text, further)]


@dataclass(frozen=True)
class _Line:
    """A row, ready to be laid out: every text as the terminal shows it.

    Attributes:
        label: may be too long for its column.
        cells: lines of each cell.
        meaning: one paragraph.
    """

    label: str
    cells: tuple[tuple[str, ...], ...]
    meaning: str


def _table(rows: Sequence[Row], heads: Sequence[str], width: int, shown: Callable[[str], str]) -> list[Text]:
    """Rows as lines, in the layout that takes the fewest of them.

    The heads are those of the labels and of the cells, and how the cells are to be read, as far as they are given.
    """
    count = max(len(row.cells) for row in rows)
    heads = [*heads, *[""] * (2 + count - len(heads))]
    lines = [
        _Line(
            shown(row.label),
            tuple(tuple(shown(line) for line in cell.split("\n")) for cell in row.cells)
            + (("",),) * (count - len(row.cells)),
            shown(row.meaning),
        )
        for row in rows
    ]
    return min((found for longest in LABELS for found in _layouts(lines, heads, width, longest)), key=len)


def _layouts(lines: Sequence[_Line], heads: Sequence[str], width: int, longest: int) -> Iterator[list[Text]]:
    """Meanings beside the numbers; and beneath them, the columns in tables below each other if they do not fit.

    Args:
        lines: rows.
        heads: as many as cells and two more.
        width: of the terminal.
        longest: columns from which on a label has a line of its own.
    """
    fitting = [cell_len(line.label) for line in lines if cell_len(line.label) <= longest]
    label = max(12, cell_len(heads[0]) - GAP, *fitting, 0)
    widest = width - label - 2 * GAP
    lines = [
        replace(
            line, cells=tuple(tuple(p for part in cell for p in wrapped(part, widest)) for cell in line.cells)
        )
        for line in lines
    ]
    widths = [
        max(cell_len(heads[1 + k]), *(cell_len(part) for line in lines for part in line.cells[k]))
        for k in range(len(heads) - 2)
    ]
    room = widest - sum(widths) - GAP * len(widths)
    if room >= SHORTEST_MEANING or (room >= -GAP and not any(line.meaning for line in lines)):
        yield list(_beside(lines, heads, label, widths, room))
    parts: list[Text] = []
    for columns in _columns_that_fit(widths, widest):
        chosen = [replace(line, cells=tuple(line.cells[k] for k in columns)) for line in lines]
        if parts:  # the meanings stand in the first part
            chosen = [replace(line, meaning="") for line in chosen]
            parts.append(Text(""))
        titles = [heads[0], *(heads[1 + k] for k in columns), heads[-1]]
        parts += _beneath(chosen, titles, label, [widths[k] for k in columns], width)
    yield parts


def _columns_that_fit(widths: Sequence[int], width: int) -> list[list[int]]:
    """Columns in parts, each of which fits."""
    parts: list[list[int]] = [[0]] if widths else [[]]
    for k in range(1, len(widths)):
        if sum(widths[j] for j in parts[-1]) + widths[k] + GAP * len(parts[-1]) <= width:
            parts[-1].append(k)
        else:
            parts.append([k])
    return parts


def _beside(
    lines: Sequence[_Line], heads: Sequence[str], label: int, widths: Sequence[int], room: int
) -> Iterator[Text]:
    """Every meaning to the right of its numbers."""
    yield from _heads(heads, label, widths)
    for line in lines:
        meaning = wrapped(line.meaning, max(room, 1)) if line.meaning else []
        yield from _numbers(line, label, widths, meaning)


def _beneath(
    lines: Sequence[_Line], heads: Sequence[str], label: int, widths: Sequence[int], width: int
) -> Iterator[Text]:
    """Every meaning below its numbers; one that several rows share, above them, once."""
    start = " " * (label + 2 * GAP)
    yield from _heads(heads, label, widths)
    for meaning, group in groupby(lines, key=lambda line: line.meaning):
        same = list(group)
        if meaning and len(same) > 1:
            yield from (Text(part, MEANING) for part in wrapped(f"{meaning}:", width, "  "))
        for line in same:
            yield from _numbers(line, label, widths)
            if meaning and len(same) == 1:
                yield from (Text(part, MEANING) for part in wrapped(meaning, width, start))


def _heads(heads: Sequence[str], label: int, widths: Sequence[int]) -> Iterator[Text]:
    """The heads of labels and cells; and below them, where it is given, how to read the cells."""
    *columns, reading = heads
    cells = (padded(head, width) for head, width in zip(columns[1:], widths, strict=True))
    yield Text(f"{padded(columns[0], label + GAP)}{'  '.join(['', *cells])}".rstrip(), HEAD)
    if reading:
        yield Text(f"{' ' * (label + 2 * GAP)}{reading}", MEANING)


def _numbers(line: _Line, label: int, widths: Sequence[int], meaning: Sequence[str] = ()) -> Iterator[Text]:
    """The lines of a row: label, cells, and what stands to their right."""
    first = line.label
    if cell_len(line.label) > label:
        yield from map(
            Text, wrapped(line.label, label + 2 * GAP + sum(widths) + GAP * len(widths), "  ", "  ")
        )
        first = ""
    for k in range(max(1, len(meaning), *(len(cell) for cell in line.cells), 0)):
        cells = (
            padded(cell[k] if k < len(cell) else "", w) for cell, w in zip(line.cells, widths, strict=True)
        )
        text = Text(f"  {padded(first if k == 0 else '', label)}  {'  '.join(cells)}  ")
        text.append(meaning[k] if k < len(meaning) else "", MEANING)
        text.rstrip()
        yield text
