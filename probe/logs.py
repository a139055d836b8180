"""The log of a run: a versioned JSON document, documented in `docs/log_schema.md`.

`build_log` makes it, `dump` writes it as strict JSON, `load_log` reads it back, `prune` deletes the oldest
runs.
"""

from __future__ import annotations

import gzip
import json
import math
import platform
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from probe import log_sections
from probe.config import LOG_LEVELS, LogLevel
from probe.errors import LogError
from probe.files import write_error

if TYPE_CHECKING:
    import os

    from probe.results import ProbeResult
    from probe.state import ProbeState

SCHEMA_VERSION = 1
"""Version of the log's schema: it grows when a key changes its meaning or goes, not when a key is added."""
LOG_SCHEMA = "entropy-probe/log"
SUMMARY_SCHEMA = "entropy-probe/summary"
CONFIG_SCHEMA = "entropy-probe/config"
DATE_FOLDERS = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
"""The pattern of the folders that logs go into."""

CORE_KEYS = (
    *("verdict", "verdict_reasons"),
    *(
        f"{name}{suffix}{ending}"
        for suffix in ("_tok", "")
        for name, endings in (
            *((name, ("",)) for name in ("H_orig", "H_upd", "bars_dot")),
            *((name, ("", "_se", "_ci95")) for name in ("deltaH1", "deltaH_true", "residual")),
            *((name, ("",)) for name in ("deltaH2", "eta_10")),
        )
        for ending in endings
    ),
    *("learning_rate", "B_E", "B_U", "G", "settings", "timing"),
)
"""The keys of the result that `minimal` and the summary have, where they are in the result."""
CORE_DIAGNOSTICS = ("ESS", "pareto_k", "noise_floor", "noise_floor_tok", "bias_flags")

RAW_VECTOR_LIMIT = 200_000
"""X, gradient and step go into a debug log when they have at most this many numbers together."""
LONG_LIST = 64
"""Below `detailed`, longer lists in the result are left out, and named in `omitted`."""
GROUP_LIMIT = 64
"""Below `detailed`, the table of groups is left out when it has more rows."""

_PACKAGES = ("entropy-probe", "torch", "lightning", "transformers", "peft", "bitsandbytes")


def build_log(
    result: ProbeResult,
    state: ProbeState,
    level: LogLevel = "standard",
    log_sequences: bool | None = None,
    log_tokens: bool | None = None,
    log_raw_tensors: bool | None = None,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """The log of a run at a level, as plain values that are strict JSON.

    The three switches act from the level on that has their data (`detailed`, `debug`, `debug`): None and true
    leave it in, false leaves it out. Below that level they change nothing.

    Args:
        result: what the run found.
        state: what the run produced on the way.
        level: `minimal`, `standard`, `detailed` or `debug`.
        log_sequences: whether texts are included: prompts, responses, token ids and token texts.
        log_tokens: whether token-by-token values are included.
        log_raw_tensors: whether raw arrays are included.
        token_text: the text of one token id, for the token-by-token values; without it they have only ids.

    Returns:
        The log; `log["results"]` is the result mapping (its core keys at `minimal`).

    Raises:
        LogError: `level` is unknown, or the result holds something that JSON cannot.
    """
    if level not in LOG_LEVELS:
        raise LogError(f"level: expected one of {', '.join(LOG_LEVELS)}, found {level!r}")
    rank = LOG_LEVELS.index(level)
    if rank == 0:
        return _header(LOG_SCHEMA, result, level) | {"results": _core(result.values)}
    omitted: list[dict[str, str]] = []
    parameters = log_sections.parameter_statistics(state)
    values = to_plain(result.values, "results")
    log = _header(LOG_SCHEMA, result, level) | {
        "results": values if rank > 1 else _without_long_lists(values, "results", omitted),
        "distributions": log_sections.distributions(state),
        "groups": _groups(state, rank, omitted),
        "parameter_blocks": log_sections.parameter_blocks(parameters),
        "environment": environment(),
    }
    texts = log_sequences is not False
    if rank >= LOG_LEVELS.index("detailed"):
        log["sequences"] = log_sections.sequence_records(state, texts, rows=level == "debug")
        if not texts:
            omitted.append({"key": "texts and token ids", "reason": "log_sequences is false"})
    if level == "debug":
        log["parameters"] = parameters
        log |= _debug(state, texts, log_tokens, log_raw_tensors, token_text, omitted)
    log["omitted"] = omitted
    return to_plain(log, "log")


def summary(result: ProbeResult, level: LogLevel, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The quick overview of a run: core metrics only.

    Args:
        result: what the run found.
        level: level of the main log.
        files: names of the run's other files, by kind.

    Returns:
        The summary, as plain values that are strict JSON.
    """
    return _header(SUMMARY_SCHEMA, result, level) | {
        "results": _core(result.values),
        "files": dict(files or {}),
    }


def dump(value: Any) -> str:
    """`value` as strict JSON text: indented for reading, lists of numbers on one line, a line end at the end.

    NaN and infinities, which JSON does not have, become null.

    Raises:
        LogError: `value` holds something that JSON cannot.

    >>> print(dump({"a": float("nan"), "b": [1, 2]}), end="")
    {"a": null, "b": [1, 2]}
    """
    return _render(to_plain(value, "value"), "") + "\n"


def dump_bytes(value: Any, compress: bool = False) -> bytes:
    """`dump` as UTF-8, gzipped where asked for."""
    # A lone surrogate has no UTF-8; its backslash form is also its escape in JSON.
    data = dump(value).encode("utf-8", "backslashreplace")
    return gzip.compress(data, compresslevel=6, mtime=0) if compress else data


def load_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a main log (`.json` or `.json.gz`) or a summary back.

    Args:
        path: the file; whether it is compressed is seen from its content.

    Returns:
        The document, as `build_log` or `summary` made it.

    Raises:
        LogError: the file cannot be read, is cut off, is no log of this package, or has a newer schema.
    """
    text = _read_text(Path(path))
    try:
        document = json.loads(text)
    except ValueError as error:
        raise LogError(
            f"cannot read {path}: expected JSON, found {error}; the file is damaged or is not a log"
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema not in (LOG_SCHEMA, SUMMARY_SCHEMA):
        raise LogError(
            f"cannot read {path}: expected a log or summary of entropy-probe (schema {LOG_SCHEMA!r} or "
            f"{SUMMARY_SCHEMA!r}), found schema {schema!r}"
        )
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LogError(f"cannot read {path}: expected an integer schema_version, found {version!r}")
    if version > SCHEMA_VERSION:
        raise LogError(
            f"cannot read {path}: expected schema_version {SCHEMA_VERSION} or older, found {version}; "
            "update entropy-probe to read it"
        )
    return document


def logged_rollouts(log: Mapping[str, Any], part: Literal["E", "U"]) -> list[dict[str, Any]]:
    """The responses of E or U in a log, as rows of a rollout table with token ids (`probe.rollouts.files`).

    Log-probs, rewards and advantages have all digits at level `debug`, and nine at `detailed`.

    Args:
        log: what `load_log` returned.
        part: the batch.

    Raises:
        LogError: the log has no token ids.
    """
    sequences = log.get("sequences") or {}
    records, prompts = sequences.get(part), sequences.get("prompts")
    if records is None or prompts is None or any("completion_ids" not in record for record in records):
        raise LogError(
            f"expected a log with the token ids of {part}, found one of level {log.get('level')!r} without them; write "
            "it with detailed_logging.level: detailed or debug, and log_sequences not false"
        )
    exact = (log.get("raw") or {}).get(part) or {}
    flags = (sequences.get("bias_flags") or {}).get(part) or []
    step = (log.get("results") or {}).get("training_step")
    rows = []
    for i, record in enumerate(records):
        prompt = prompts[record["prompt"]]
        row: dict[str, Any] = {} if step is None else {"step": step + 1}
        row |= {"prompt": prompt["text"], "completion": record["completion"], "prompt_ids": prompt["ids"]}
        row |= {name: record[name] for name in ("completion_ids", "truncated", "group")}
        row["bias_flags"] = flags
        row["doubts"] = record.get("doubts", [])
        for name in ("reward", "advantage"):
            if name in exact or name in record:
                row[name] = exact[name][i] if name in exact else record[name]
        for name, target in (("old_logprob", "old_logprobs"), ("sampling_logprob", "sampling_logprobs")):
            if name in exact:
                row[target] = exact[name][i][: record["length"]]
        rows.append(row)
    return rows


def prune(directory: str | os.PathLike[str], max_files: int, keep: Path | None = None) -> list[Path]:
    """Delete the oldest runs in `directory` beyond `max_files`, each with all its files.

    Only files in folders named by a date are looked at, and only those that say at their beginning that they
    are a log, summary or configuration of this package. Folders that this empties are removed.

    Args:
        directory: the folder that has the folders per date.
        max_files: how many runs stay.
        keep: a file of a run that stays in any case.

    Returns:
        The deleted files.

    Raises:
        LogError: a file cannot be deleted.
    """
    runs: dict[Path, _StoredRun] = {}
    for folder in Path(directory).glob(DATE_FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            own = _own_file(path)
            if own is not None:
                stem, started_at = own
                runs.setdefault(folder / stem, _StoredRun(started_at)).files.append(path)
    # Runs of the same second were numbered in the order in which they ended.
    oldest_first = sorted(runs, key=lambda run: (runs[run].started_at, _numbered(run.name)))
    excess = oldest_first[: max(len(runs) - max_files, 0)]
    doomed = [path for run in excess if keep not in runs[run].files for path in runs[run].files]
    for path in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
    for folder in {path.parent for path in doomed}:
        # Fails where something is left in it, or where another process was faster: both are fine.
        with suppress(OSError):
            folder.rmdir()
    return doomed


def to_plain(value: Any, where: str = "value", keep_non_finite: bool = False) -> Any:
    """`value` with only dictionaries, lists, texts, numbers, booleans and null.

    Args:
        value: mappings, sequences, tensors, arrays, paths and plain values, in any nesting.
        where: name of the value in errors.
        keep_non_finite: keep NaN and infinities, which otherwise become null.

    Raises:
        LogError: a part of `value` has another type.

    >>> to_plain({"x": (1, float("inf"))})
    {'x': [1, None]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if keep_non_finite or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_plain(part, f"{where}.{key}", keep_non_finite) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        # Without a call for each of the many numbers of a debug log.
        return [
            part
            if type(part) is int or (type(part) is float and math.isfinite(part))
            else to_plain(part, where, keep_non_finite)
            for part in value
        ]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return to_plain(value.tolist(), where, keep_non_finite)
    if isinstance(value, Path):
        return str(value)
    raise LogError(f"{where}: expected something that JSON can hold, found {type(value).__name__}")


def environment() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape the numbers; null for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@dataclass
class _StoredRun:
    """The files of one run in a log folder."""

    started_at: str
    files: list[Path] = field(default_factory=list)


def _header(schema: str, result: ProbeResult, level: LogLevel) -> dict[str, Any]:
    """What every document begins with; `_own_file` reads it from the first bytes of a file."""
    return {
        "schema": schema,
        "schema_version": SCHEMA_VERSION,
        "level": level,
        "started_at": result.started_at,
        "checkpoint_name": result.checkpoint_name,
        "checkpoint_path": to_plain(result.values.get("checkpoint_path")),
    }


def _core(values: Mapping[str, Any]) -> dict[str, Any]:
    """The core metrics of a result."""
    core = {key: values[key] for key in CORE_KEYS if key in values}
    if "settings" in core:  # the defaults are all that is not listed
        core["settings"] = {key: x for key, x in core["settings"].items() if key != "default"}
    diagnostics = values.get("diagnostics", {})
    found = {key: diagnostics[key] for key in CORE_DIAGNOSTICS if key in diagnostics}
    return to_plain(core | ({"diagnostics": found} if found else {}), "results")


def _groups(state: ProbeState, rank: int, omitted: list[dict[str, str]]) -> dict[str, list[Any]] | None:
    """The table of the groups of U, if it is there and fits the level."""
    if state.U is None:
        return None
    table = log_sections.group_table(state.U)
    if rank == 1 and len(table["group"]) > GROUP_LIMIT:
        reason = f"{len(table['group'])} groups are more than {GROUP_LIMIT}; level detailed has them"
        omitted.append({"key": "groups", "reason": reason})
        return None
    return table


def _debug(
    state: ProbeState,
    texts: bool,
    log_tokens: bool | None,
    log_raw_tensors: bool | None,
    token_text: Callable[[int], str] | None,
    omitted: list[dict[str, str]],
) -> dict[str, Any]:
    """The sections `tokens` and `raw` of the level `debug`, as far as they are wanted."""
    section: dict[str, Any] = {}
    if log_tokens is False:
        omitted.append({"key": "tokens", "reason": "log_tokens is false"})
    else:
        section["tokens"] = log_sections.token_records(state, texts, token_text)
        if texts and token_text is None:
            omitted.append({"key": "tokens.*.text", "reason": "no tokenizer was given"})
    if log_raw_tensors is False:
        omitted.append({"key": "raw", "reason": "log_raw_tensors is false"})
    else:
        vectors = log_sections.raw_vectors(state, RAW_VECTOR_LIMIT)
        section["raw"] = log_sections.raw_arrays(state, texts) | {"vectors": vectors}
        if not vectors["included"]:
            omitted.append({"key": "raw.vectors", "reason": vectors["reason"]})
    return section


def _without_long_lists(value: Any, where: str, omitted: list[dict[str, str]]) -> Any:
    """Plain `value` without its lists of more than `LONG_LIST` entries; they are named in `omitted`."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, part in value.items():
        name = f"{where}.{key}"
        if isinstance(part, list) and len(part) > LONG_LIST:
            reason = f"{len(part)} entries are more than {LONG_LIST}; level detailed has them"
            omitted.append({"key": name, "reason": reason})
        else:
            kept[key] = _without_long_lists(part, name, omitted)
    return kept


def _render(value: Any, indent: str) -> str:
    """Plain `value` as JSON: a container of few short values, or a list of only scalars, takes one line."""
    if not isinstance(value, (dict, list)):
        return _json(value)
    parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    if not any(isinstance(part, (dict, list)) and part for part in parts) or _is_short(value):
        line = _json(value)
        if isinstance(value, list) or len(indent) + len(line) <= 100:
            return line
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{_json(key)}: {_render(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _render(part, deeper) for part in value) + f"\n{indent}]"


def _is_short(value: Any) -> bool:
    """Whether a container holds so little that one line may do; cheap on large ones."""
    return len(value) <= 4 and not any(isinstance(part, (dict, list)) and len(part) > 4 for part in value)


def _json(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _read_text(path: Path) -> str:
    """The text of a file that may be gzipped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise LogError(
                f"cannot read {path}: its gzip data is cut off or damaged ({error}); "
                "the copy or download may be incomplete"
            ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LogError(
            f"cannot read {path}: expected UTF-8 text, found {error}; the file is not a log"
        ) from error


def _own_file(path: Path) -> tuple[str, str] | None:
    """The run's name and start where `path` is one of the three files of a run, else None."""
    kind = _kind(path.name)
    if kind is None or path.is_symlink() or not path.is_file():
        return None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(1000).decode("utf-8", "replace")
    except (EOFError, OSError, zlib.error):
        return None
    schema = re.match(r'(?:\{\s*"schema": "|# schema: )(entropy-probe/\w+)', head)
    started_at = re.search(r'started_at"?: "?([0-9T:.+-]+)', head)
    if schema is None or started_at is None or schema.group(1) != kind[0]:
        return None
    return kind[1], started_at.group(1)


def _kind(name: str) -> tuple[str, str] | None:
    """The schema that a file of this name has, and the run's name.

    >>> _kind("run_summary.json"), _kind("run.json.gz"), _kind("events.out.tfevents.1")
    (('entropy-probe/summary', 'run'), ('entropy-probe/log', 'run'), None)
    """
    endings = (
        ("_summary.json", SUMMARY_SCHEMA),
        ("_config.yaml", CONFIG_SCHEMA),
        (".json.gz", LOG_SCHEMA),
        (".json", LOG_SCHEMA),
    )
    for ending, schema in endings:
        if name.endswith(ending) and len(name) > len(ending):
            return schema, name.removesuffix(ending)
    return None


def _numbered(name: str) -> tuple[str, int]:
    """A key under which `run`, `run_2`, ..., `run_10` stand in this order."""
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, 1)
