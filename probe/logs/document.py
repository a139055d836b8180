"""The log of a run: a versioned JSON document at one of four levels of detail, documented in `docs/log_schema.md`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any

from probe.config.output import LOG_LEVELS, LogLevel
from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS, SEQUENCE
from probe.files.log_files import LOG_SCHEMA, SCHEMA_VERSION, SUMMARY_SCHEMA
from probe.files.strict_json import to_plain
from probe.logs import distributions, parameters, records
from probe.results import diagnostic_keys, keys

if TYPE_CHECKING:
    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult


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
    statistics = parameters.parameter_statistics(state)
    texts = log_sequences is not False
    values = to_plain(result.values if texts else _without_texts(result.values), "results")
    log = _header(LOG_SCHEMA, result, level) | {
        "results": values if rank > 1 else _without_long_lists(values, "results", omitted),
        "distributions": distributions.distributions(state),
        "groups": _groups(state, rank, omitted),
        "parameter_blocks": parameters.parameter_blocks(statistics),
        "environment": environment(),
    }
    if rank >= LOG_LEVELS.index("detailed"):
        log["sequences"] = records.sequence_records(state, texts, rows=level == "debug")
        if (influence := records.influence_table(state)) is not None:
            log["influence"] = influence
        if not texts:
            omitted.append({"key": "texts and token ids", "reason": "log_sequences is false"})
    if level == "debug":
        log["parameters"] = statistics
        log |= _debug(state, texts, log_tokens, log_raw_tensors, token_text, omitted)
    log["omitted"] = omitted
    return to_plain(log, "log")


def page_log(
    result: ProbeResult,
    state: ProbeState,
    log_sequences: bool | None = None,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """What a page shows of a run: no statistics of parameters, and of tokens those of U alone.

    One process can make it, also where others hold parts of the step.

    Args:
        result: what the run found.
        state: what the run produced on the way.
        log_sequences: see `build_log`.
        token_text: see `build_log`.
    """
    texts = log_sequences is not False
    log = _header(LOG_SCHEMA, result, "detailed") | {
        "results": result.values if texts else _without_texts(result.values),
        "environment": environment(),
        "sequences": records.sequence_records(state, texts),
        "tokens": records.token_records(state, texts, token_text, ("U",)),
    }
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


def _without_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """A result without the tokens that it names."""
    found = values.get("attribution")
    if not found or not found.get("top_tokens"):
        return dict(values)
    rows = [{key: x for key, x in one.items() if key not in ("id", "text")} for one in found["top_tokens"]]
    return {**values, "attribution": {**found, "top_tokens": rows}}


def environment() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape the numbers; null for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


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


def core_keys() -> list[str]:
    """The keys of the result that `minimal` and the summary have, where they are in the result."""
    core = [one for one in keys.QUANTITIES if one.core]
    found = []
    for per_token, block in groupby(core, key=lambda one: one.per_token):
        together = list(block)
        for estimand in ESTIMANDS if per_token else (SEQUENCE,):
            for one in together:
                endings = ["", *(part.ending for part in one.parts if part.core)]
                found += [estimand.key(one.key, ending) for ending in endings]
    return found


def _core(values: Mapping[str, Any]) -> dict[str, Any]:
    """The core metrics of a result."""
    core = {key: values[key] for key in core_keys() if key in values}
    if "settings" in core:  # the defaults are all that is not listed
        core["settings"] = {key: x for key, x in core["settings"].items() if key != "default"}
    diagnostics = values.get("diagnostics", {})
    wanted = [e.key(one.key) for one in diagnostic_keys.DIAGNOSTICS if one.core for e in one.estimands]
    found = {key: diagnostics[key] for key in wanted if key in diagnostics}
    return to_plain(core | ({"diagnostics": found} if found else {}), "results")


def _groups(state: ProbeState, rank: int, omitted: list[dict[str, str]]) -> dict[str, list[Any]] | None:
    """The table of the groups of U, if it is there and fits the level."""
    if state.U is None:
        return None
    table = records.group_table(state.U)
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
        section["tokens"] = records.token_records(state, texts, token_text)
        if texts and token_text is None:
            omitted.append({"key": "tokens.*.text", "reason": "no tokenizer was given"})
    if log_raw_tensors is False:
        omitted.append({"key": "raw", "reason": "log_raw_tensors is false"})
    else:
        vectors = parameters.raw_vectors(state, RAW_VECTOR_LIMIT)
        section["raw"] = records.raw_arrays(state, texts) | {"vectors": vectors}
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
