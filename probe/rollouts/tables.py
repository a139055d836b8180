"""Rollout files as tables: JSON Lines and Parquet, read and written with the same rows."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from probe.errors.exceptions import DataError, LogError, nearest
from probe.files.atomic import atomic_write_bytes
from probe.files.log_files import load_log
from probe.rollouts.logged import logged_rollouts
from probe.text import all_well_formed

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".parquet")
LOGS = (".json", ".json.gz")
"""Endings of the logs of runs, which hold the responses of E and of U from level `detailed` on."""
Part = Literal["E", "U"]


@dataclass(frozen=True)
class RolloutTable:
    """The rows of a rollout file.

    Attributes:
        path: where they came from.
        rows: one mapping per row; a column that a row lacks is None.
        numbers: position of each row in the file, from 0.
        columns: names of the columns, in the file's order.
        rendered: whether prompts as text are the whole prompts, special tokens such as BOS included where they show.
        special_tokens_left_out: whether the writer decodes prompts without their special tokens.
    """

    path: str
    rows: tuple[dict[str, Any], ...]
    numbers: tuple[int, ...]
    columns: tuple[str, ...]
    rendered: bool = False
    special_tokens_left_out: bool = False

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


def read_table(path: str, update: int | None = None, part: Part | None = None) -> RolloutTable:
    """Read a rollout file: the rows of one update, or of a file with several values of `step` those of the last one.

    Trainers number the files and the column `step` by the update that the rows were used for, and a checkpoint by the
    last update that is in it. What a checkpoint's policy generated next carries the number after the checkpoint's.

    Args:
        path: a `.jsonl` file with one mapping per line, a `.parquet` file, or with `update` a folder of such files
            whose names end in the number of the update, as TRL's `completions_00061.parquet`.
        update: the number of the update whose rows are wanted; None where it is not known.
        part: the batch that is wanted of a log (`.json`, `.json.gz`) of a run, which holds E and U.

    Raises:
        DataError: the file is not there, is of another kind, cannot be parsed (naming the line), has no rows, or those
            of other updates only.
    """
    file = rollout_file(Path(path).expanduser(), update)
    _check_file(file)
    if file.name.endswith(LOGS):
        rows = _read_log(file, part)
    else:
        rows = _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)
    if not rows:
        raise DataError(f"{path}: expected rollouts, found a file without rows")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    filled = tuple({name: row.get(name) for name in columns} for row in rows)
    return _one_step(RolloutTable(str(file), filled, tuple(range(len(rows))), columns), update, part)


def rollout_file(path: Path, update: int | None) -> Path:
    """The file that is read for a path: in a folder of numbered files the one of the update, where that is known.

    Raises:
        DataError: the folder has none, or several.
    """
    return _file_of(path, update) if path.is_dir() and update is not None else path


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
    if file.suffix not in FORMATS and not file.name.endswith(LOGS):
        raise DataError(f"{file}: expected a file ending in {' or '.join(FORMATS)}, found {file.suffix!r}")


def _read_log(file: Path, part: Part | None) -> list[dict[str, Any]]:
    """The responses of E or U in a log of a run.

    Raises:
        DataError: it is no log, or has no token ids.
    """
    if part is None:
        raise DataError(f"{file}: expected to be told whether E or U is wanted of a log, found neither")
    try:
        return logged_rollouts(load_log(file), part)
    except LogError as error:
        raise DataError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; blank lines are left out."""
    rows = []
    try:
        # Only "\n" ends a line: a text may hold any other separator that Python knows.
        with open(file, encoding="utf-8-sig", errors="surrogatepass", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read it as UTF-8 text ({error})") from error
    return rows


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """One line of a JSON Lines file."""
    try:
        row = all_well_formed(json.loads(line))
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


def _number(file: Path) -> int | None:
    """The number that a file's name ends in."""
    digits = re.search(r"(\d+)$", file.stem)
    return None if digits is None else int(digits.group(1))


def _file_of(folder: Path, update: int) -> Path:
    """The file of an update in a folder of numbered ones.

    Raises:
        DataError: there is none, or more than one.
    """
    numbered = {file: _number(file) for file in sorted(folder.iterdir()) if file.suffix in FORMATS}
    found = [file for file, number in numbered.items() if number == update]
    if len(found) == 1:
        return found[0]
    numbers = sorted({number for number in numbered.values() if number is not None})
    there = f"those of {_span(numbers)}" if numbers else "no numbered .jsonl or .parquet file"
    what = f"{len(found)} ({', '.join(file.name for file in found)})" if found else there
    raise DataError(
        f"{folder}: expected one file of update {update}, the next after the checkpoint's step {update - 1}, found "
        f"{what}; trainers write one for every update with logging_steps: 1"
    )


def has_update(folder: Path, update: int) -> bool:
    """Whether a folder of numbered files has one of an update."""
    return any(_number(file) == update for file in folder.iterdir() if file.suffix in FORMATS)


def _span(numbers: Sequence[int]) -> str:
    """Numbers of updates as a text."""
    return ", ".join(map(str, numbers)) if len(numbers) <= 5 else f"{numbers[0]} to {numbers[-1]}"


def _one_step(table: RolloutTable, update: int | None, part: Part | None = None) -> RolloutTable:
    """The rows of one value of `step`: `update`, or the largest where that is not known.

    Raises:
        DataError: there are no rows of `update`; the message names the file beside this one that is its.
    """
    if "step" not in table.columns:
        return table
    steps = table.column("step")
    for index, step in enumerate(steps):
        if isinstance(step, bool) or not isinstance(step, int | float):
            raise DataError(f"{table.where(index)}: expected a number as step, found {step!r}")
    wanted = max(steps) if update is None else update
    kept = [index for index, step in enumerate(steps) if step == wanted]
    if not kept:
        beside = [
            file
            for file in sorted(Path(table.path).parent.iterdir())
            if file.suffix in FORMATS and _number(file) == update
        ]
        remedy = f"give {beside[0]}" if beside else "give the file of that update"
        if part == "E":  # that file is what U is made from
            remedy = "leave batch_config.E_rollouts out to sample E: responses of other updates are of other policies"
        raise DataError(
            f"{table.path}: expected rows of update {update} (column step), the next after the checkpoint's step "
            f"{wanted - 1}, found those of {_span(sorted(set(steps)))}; {remedy}, or leave the column out where it "
            "counts something else"
        )
    if len(kept) == len(steps):
        return table
    logger.info(
        "%s holds %d steps: the %d rows of step %s are used", table.path, len(set(steps)), len(kept), wanted
    )
    numbers = tuple(table.numbers[index] for index in kept)
    return replace(table, rows=tuple(table.rows[index] for index in kept), numbers=numbers)
