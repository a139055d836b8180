"""The page of a run, made from its log: from one that was just built, or from an old file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from probe.config.output import DetailedLoggingConfig
from probe.estimand import ESTIMANDS
from probe.files.atomic import atomic_write_bytes
from probe.files.log_files import SUMMARY_SCHEMA
from probe.logs.document import page_log
from probe.report.attribution import Table, beside_what_if, top_tokens_table
from probe.report.html.charts import (
    change_chart,
    class_charts,
    coupling_charts,
    league_charts,
    parts_chart,
    what_if_chart,
)
from probe.report.html.render import rendered
from probe.report.html.responses import MOST_TOKENS, response_data
from probe.report.rows import (
    entropy_rows,
    estimator_rows,
    settings_rows,
    size_texts,
    time_rows,
    trust_rows,
)
from probe.report.words import answer, verdict_meaning

if TYPE_CHECKING:
    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult

SECTIONS = {
    "verdict": "Verdict",
    "changes": "Predicted and measured",
    "tokens": "Which tokens",
    "responses": "Responses",
    "coupling": "Coupling",
    "league": "League table",
    "what-if": "What if",
    "trust": "What it rests on",
    "configuration": "Configuration",
}
"""Sections of the page, by their ids."""


def write_page(
    path: str | os.PathLike[str],
    result: ProbeResult,
    state: ProbeState,
    config: DetailedLoggingConfig,
    token_text: Callable[[int], str] | None,
) -> Path:
    """Write a run as one page, with everything that a log of the level `debug` has for people.

    Args:
        path: the file, replaced as a whole.
        result: what the run found.
        state: what it produced on the way.
        config: says whether texts are left out.
        token_text: the text of a token id; None where there is no tokenizer.

    Returns:
        The path.

    Raises:
        LogError: the file cannot be written.
    """
    document = page_log(result, state, config.log_sequences, token_text)
    return atomic_write_bytes(path, run_page(document, result.config).encode("utf-8"))


def run_page(
    document: Mapping[str, Any], config: Mapping[str, Any] | None = None, most_tokens: int = MOST_TOKENS
) -> str:
    """A run as one self-contained HTML page.

    It shows what the log has: at the level `debug` of a run with an attribution everything, of a summary the verdict
    and the changes.

    Args:
        document: a main log or a summary, as `probe.load_log` reads it.
        config: the resolved configuration of the run; None where it is not there.
        most_tokens: tokens of U at the most, see `response_data`.

    Returns:
        The text of the page. It loads nothing, and every text of the log is shown as text.
    """
    values: Mapping[str, Any] = document.get("results") or {}
    what_if: Mapping[str, Any] = values.get("what_if") or {}
    found: Mapping[str, Any] = values.get("attribution") or {}
    shown: dict[str, Any] = {
        "parts": parts_chart(values),
        "coupling": coupling_charts(values),
        "league": league_charts(values),
        "what_if": what_if_chart(values),
        "beside_what_if": beside_what_if(what_if) if what_if else [],
    }
    there = {
        "tokens": shown["parts"],
        "coupling": shown["coupling"],
        "league": shown["league"],
        "what-if": what_if,
    }
    reasons = list(values.get("verdict_reasons") or ())
    return rendered(
        "run",
        title=f"Entropy probe of {document.get('checkpoint_name') or 'a checkpoint'}",
        facts=_facts(document, values),
        sections=[(id, words) for id, words in SECTIONS.items() if there.get(id, True)],
        verdict=values.get("verdict"),
        verdict_meaning=verdict_meaning(values.get("verdict")),
        answer=answer(values),
        reasons=reasons,
        changes=[chart for one in ESTIMANDS if (chart := change_chart(values, one)) is not None],
        entropies=entropy_rows(values),
        estimators=estimator_rows(values),
        classes=class_charts(values),
        top=_top(found),
        claims=_claims(what_if),
        responses=response_data(document, most_tokens),
        why_unshaded=_why_unshaded(document, found),
        trust=trust_rows(values),
        time=time_rows(values),
        settings=settings_rows(values),
        config=None if config is None else yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        why_no_config="The log has no configuration; it stands in the file NAME_config.yaml beside it.",
        versions=document.get("environment") or {},
        **shown,
    )


def _facts(document: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What was probed, when, and with which sizes."""
    sizes = size_texts(values)
    if values.get("training_step") is not None:
        sizes.append(f"training step {values['training_step']}")
    about = [str(document[key]) for key in ("checkpoint_path", "started_at") if document.get(key)]
    return [*sizes, *about]


def _top(found: Mapping[str, Any]) -> Table | None:
    """The tokens of largest contribution; None where there are none."""
    table = top_tokens_table(found, count=5)
    return table if table.rows else None


def _claims(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of interventions, and what they are."""
    return [(one["name"], one["claim"]) for one in found.get("interventions") or () if one.get("claim")]


def _why_unshaded(document: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Why tokens are not shaded, with what to do."""
    main = (document.get("files") or {}).get("main")
    if document.get("schema") == SUMMARY_SCHEMA:
        return f"This is a summary; the log {main or 'of the run'} beside it has more."
    if document.get("level") == "minimal":
        return (
            "This log, of the level minimal, has no responses; the level debug has them with their tokens, and so has "
            "a report that the run itself writes (output.report_path)."
        )
    if not found:
        return (
            "Tokens are shaded by what they add to deltaH1 where that was worked out: entropy-probe attribute, or "
            "attribution.enabled: true."
        )
    return (
        f"This log, of the level {document.get('level')}, has no tokens; the level debug has them, and a report that "
        "the run itself writes (output.report_path)."
    )
