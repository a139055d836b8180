"""What is known of a step, and the result of a run: frozen objects, and the mapping that scripts read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from probe.results.changes import Changes
from probe.verdict.facts import Facts
from probe.verdict.verdict import judge
from probe.verdict.words import Verdict


@dataclass(frozen=True)
class BatchSizes:
    """How many sequences the batches have.

    Attributes:
        B_E: sequences of E.
        B_U: groups of U; None in a training, whose update batch is its own.
        G: responses per group; None where they are of several sizes.
    """

    B_E: int
    B_U: int | None = None
    G: int | None = None


@dataclass(frozen=True)
class StepResult:
    """What the probe found out about one step, of a run or of a training.

    Attributes:
        changes: entropies and their changes with errors, both estimands.
        sizes: of the batches.
        diagnostics: how good the estimates are, see `DIAGNOSTIC_KEYS`.
        learning_rate: that the step was taken with; None where none was, or none is known.
        timing: seconds per phase or part.
    """

    changes: Changes
    sizes: BatchSizes
    diagnostics: Mapping[str, Any]
    learning_rate: float | None
    timing: Mapping[str, float]

    @cached_property
    def verdict(self) -> Verdict:
        """How far the changes can be believed."""
        numbers = self.changes.numbers
        return judge(Facts(numbers, self.diagnostics, self.sizes.B_E, self.learning_rate, len(numbers)))


@dataclass(frozen=True, repr=False)
class ProbeResult(StepResult):
    """What one run found, and of what.

    Attributes:
        batch_statistics: lengths, rewards and advantages.
        settings: where the settings of the update come from.
        training_step: of the checkpoint; None where nothing says.
        checkpoint_path: the checkpoint that was probed.
        checkpoint_name: its short name (`step_60`), for file names and tables.
        config: the resolved configuration of the run, sections as mappings (`trainer` and `seed_everything` included).
        started_at: local date and time of the start, ISO 8601.
        throughput: of the passes of every phase.
        attribution: what U's tokens add to deltaH1; None where nobody asked.
        what_if: what interventions would do; None likewise.
    """

    batch_statistics: Mapping[str, Any]
    settings: Mapping[str, Any]
    training_step: int | None
    checkpoint_path: str | None
    checkpoint_name: str
    config: Mapping[str, Any]
    started_at: str
    throughput: Mapping[str, Mapping[str, float]]
    attribution: Mapping[str, Any] | None = None
    what_if: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.checkpoint_name!r}: {self.verdict.word}>"

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The result mapping, see `RESULT_KEYS`: only plain Python types, so that it is JSON as it is."""
        return {
            "verdict": self.verdict.word,
            "verdict_reasons": list(self.verdict.reasons),
            **self.changes.as_mapping(),
            **({} if self.attribution is None else {"attribution": self.attribution}),
            **({} if self.what_if is None else {"what_if": self.what_if}),
            **({} if self.learning_rate is None else {"learning_rate": self.learning_rate}),
            "B_E": self.sizes.B_E,
            "B_U": self.sizes.B_U,
            "G": self.sizes.G,
            "checkpoint_path": self.checkpoint_path,
            "training_step": self.training_step,
            "settings": self.settings,
            "diagnostics": self.diagnostics,
            "batch_statistics": self.batch_statistics,
            "timing": self.timing,
            "throughput": self.throughput,
        }
