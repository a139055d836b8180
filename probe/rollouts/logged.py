"""Rollouts that a log file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from probe.errors.exceptions import LogError


def logged_rollouts(log: Mapping[str, Any], part: Literal["E", "U"]) -> list[dict[str, Any]]:
    """The responses of E or U in a log, as rows of a rollout table with token ids (`probe.rollouts.read`).

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
