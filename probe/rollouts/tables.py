"""Rollout files as tables: JSON Lines and Parquet, read and written with the same rows."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from probe.data.names import nearest
from probe.errors import DataError
from probe.files import atomic_write_bytes

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class RolloutTable:
    """The rows of a rollout file.

    Attributes:
        path: where they came from.
        rows: one mapping per row; a column that a row lacks is None.
        numbers: position of each row in the file, from 0.
        columns: names of the columns, in the file's order.
    """

    path: str
    rows: tuple[dict[str, Any], ...]
    numbers: tuple[int, ...]
    columns: tuple[str, ...]

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.path}: expected a column {name!r}, found {', '.join(self.columns)}"
                f"{nearest(name, self.columns)}"
            )
        return [row[name] for row in self.rows]

    def where(self, index: int) -> str:
        """The start of an error message about a row."""
        return f"{self.path}, row {self.numbers[index]}"


def read_table(path: str) -> RolloutTable:
    """Read a rollout file; of a file with several values of `step`, the rows of the last one.

    Args:
        path: a `.jsonl` file with one mapping per line, or a `.parquet` file.

    Raises:
        DataError: the file is not there, is of another kind, cannot be parsed (naming the line), or has no
            rows.
    """
    file = Path(path).expanduser()
    _check_file(file)
    rows = _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)
    if not rows:
        raise DataError(f"{path}: expected rollouts, found a file without rows")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    filled = tuple({name: row.get(name) for name in columns} for row in rows)
    return _last_step(RolloutTable(str(path), filled, tuple(range(len(rows))), columns))


def write_table(path: str | Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> Path:
    """Write rows as `.jsonl` or `.parquet`, whole or not at all.

    Args:
        path: the file; its ending says which.
        rows: one mapping per row, all with the names of `schema`. What JSON cannot hold is written as text.
        schema: types of the columns in a Parquet file.

    Returns:
        The path.

    Raises:
        DataError: the ending is another.
        LogError: the file cannot be written.
    """
    file = Path(path)
    if file.suffix not in FORMATS:
        raise DataError(f"{path}: expected a file ending in {' or '.join(FORMATS)}, found {file.suffix!r}")
    if file.suffix == ".jsonl":
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        return atomic_write_bytes(file, text.encode("utf-8"))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return atomic_write_bytes(file, buffer.getvalue())


def _check_file(file: Path) -> None:
    """Refuse what is not a rollout file, and say what could be meant instead."""
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.suffix in FORMATS)
        hint = f"; its last one is {file / inside[-1]}" if inside else ""
        raise DataError(f"{file}: expected a .jsonl or .parquet file, found a folder{hint}")
    if not file.exists():
        raise DataError(f"{file}: expected a rollout file, found nothing there (from {Path.cwd()})")
    if file.suffix not in FORMATS:
        raise DataError(f"{file}: expected a file ending in {' or '.join(FORMATS)}, found {file.suffix!r}")


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; blank lines are left out."""
    rows = []
    try:
        # Only "\n" ends a line: a text may hold any other separator that Python knows.
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read it as UTF-8 text ({error})") from error
    return rows


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """One line of a JSON Lines file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected JSON, found {line.strip()[:60]!r} ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with the columns, found {type(row).__name__}")
    return row


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file. `read_table` would take `name=value` folders on the path for columns."""
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot read it as Parquet ({error})") from error


def _last_step(table: RolloutTable) -> RolloutTable:
    """The rows with the largest value of `step`."""
    if "step" not in table.columns:
        return table
    steps = table.column("step")
    for index, step in enumerate(steps):
        if isinstance(step, bool) or not isinstance(step, int | float):
            raise DataError(f"{table.where(index)}: expected a number as step, found {step!r}")
    last = max(steps)
    kept = [index for index, step in enumerate(steps) if step == last]
    if len(kept) == len(steps):
        return table
    logger.info(
        "%s holds %d steps: the %d rows of the last one, %s, are used",
        table.path,
        len(set(steps)),
        len(kept),
        last,
    )
    numbers = tuple(table.numbers[index] for index in kept)
    return RolloutTable(table.path, tuple(table.rows[index] for index in kept), numbers, table.columns)
