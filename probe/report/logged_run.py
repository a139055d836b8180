"""A run as its log tells it: the responses of E, their influences, and the numbers that these belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import LogError
from probe.estimand import Estimand, Number, from_mapping
from probe.estimators.estimate import Estimate
from probe.files.log_files import LOG_SCHEMA, load_log
from probe.report.comparison import ComparedRun

Log = Mapping[str, Any]
DERIVATIVE_ERRORS = ("derivative_agreement", "step_difference", "difference_error")
"""Diagnostics that say what deltaH1 may be wrong by, relative to it, by its derivatives and not by sampling."""


@dataclass(frozen=True)
class LoggedRun:
    """A log, read for comparing.

    Attributes:
        name: `A` or `B`.
        path: of the file; None where the log was given as it is.
        log: the document.
        records: of the responses of E, in the order of the comparison.
        group: `(B,)` prompts of E, in that order.
        rank: `(B,)` places of the prompts among those of the run itself: which fold of a fit they are in.
    """

    name: str
    path: str | None
    log: Log
    records: Sequence[Mapping[str, Any]]
    group: Tensor
    rank: Tensor

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Log, name: str) -> LoggedRun:
        """Read a log, from a file where its path is given."""
        path = None if isinstance(given, Mapping) else str(Path(given))
        log = given if isinstance(given, Mapping) else load_log(given)
        if log.get("schema") != LOG_SCHEMA:
            there = (log.get("files") or {}).get("main")
            main = f"{there} beside it" if there else "the main log of the run (.json or .json.gz)"
            raise LogError(
                f"{path or name}: expected the main log of a run, found schema {log.get('schema')!r}, which has no "
                f"responses; give {main}"
            )
        if (log.get("results") or {}).get("B_E") is None:
            raise LogError(f"{path or name}: expected a log with results, found one without B_E")
        records = (log.get("sequences") or {}).get("E") or []
        group = torch.tensor([record["group"] for record in records], dtype=torch.int64)
        rank = group.unique(return_inverse=True)[1]
        return cls(name, path, log, records, group, rank)

    @property
    def called(self) -> str:
        """Its file, or its name."""
        return self.path or self.name

    @property
    def results(self) -> Mapping[str, Any]:
        """The result mapping."""
        results: Mapping[str, Any] = self.log["results"]
        return results

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """How good its results are."""
        return self.results.get("diagnostics") or {}

    @property
    def flags(self) -> tuple[str, ...]:
        """Why its results are biased."""
        return tuple(self.diagnostics.get("bias_flags") or ())

    @property
    def sampled(self) -> bool:
        """Whether the run has drawn E itself."""
        return self.log["sequences"].get("E_rollouts") is None

    @property
    def has_responses(self) -> bool:
        """Whether its responses are there with their token ids and influences."""
        return self.texts is not None and all(
            any(key.startswith("influence_") for key in record) for record in self.records
        )

    @cached_property
    def texts(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
        """Token ids of prompt and response of every record; None where the log does not have them."""
        if not self.records or any("completion_ids" not in record for record in self.records):
            return None
        prompts = self.log["sequences"]["prompts"]
        return [
            (tuple(prompts[record["prompt"]]["ids"]), tuple(record["completion_ids"]))
            for record in self.records
        ]

    @cached_property
    def responses(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The same, of a log that can be paired.

        Raises:
            LogError: they are not there.
        """
        if self.texts is None or not self.has_responses:
            known = any("completion_ids" in record for record in self.records)
            found = f"level {self.log.get('level')!r} without them"
            if known:
                found = "one without influences (of an older version, or of a run without errors)"
            raise LogError(
                f"{self.called}: expected a log with the responses of E and their influences, found {found}; run it "
                "again with --detailed_logging.level detailed (and log_sequences not false)"
            )
        return self.texts

    def in_order(self, order: Sequence[int], group: Tensor) -> LoggedRun:
        """The same with its responses in another order, and other numbers for the same prompts."""
        records = [self.records[i] for i in order]
        return replace(self, records=records, group=group, rank=self.rank[list(order)])

    def column(self, name: str) -> Tensor:
        """A number of every response, `(B,)`.

        Raises:
            LogError: it is not there.
        """
        if any(record.get(name) is None for record in self.records):
            raise LogError(
                f"{self.called}: expected {name} of every response of E, found responses without it"
            )
        return torch.tensor([record[name] for record in self.records], dtype=torch.float64)

    def number(self, quantity: str, estimand: Estimand) -> Number | None:
        """A number of the results; None where there is none."""
        return from_mapping(self.results, quantity)[estimand]

    def estimate(self, quantity: str, estimand: Estimand) -> Estimate | None:
        """A reported estimate with its influences; None where value or influences are not there."""
        if quantity == "H_upd":
            before, change = (self.estimate(name, estimand) for name in ("H_orig", "deltaH_true"))
            return None if before is None or change is None else before + change
        number, key = self.number(quantity, estimand), estimand.key(quantity)
        if number is None or number.value is None or f"influence_{key}" not in self.records[0]:
            return None
        fit = self.log["sequences"].get("influence_fit", {}).get(key)
        shares = self.column(f"influence_{key}")
        return Estimate.from_responses(
            number.value, shares, self.group, None if fit is None else torch.tensor(fit, dtype=torch.float64)
        )

    def floor(self, quantity: str, estimand: Estimand) -> float:
        """What a quantity may be wrong by besides sampling, nats; 0 where nothing is known of that.

        Of a measured change it is the noise floor; of deltaH1 what its derivatives differ by from others
        (`DERIVATIVE_ERRORS`), and in 16 bits at least the noise floor. On one E these errors do not cancel in a
        difference, as those of sampling do.
        """
        rounding = float(self.diagnostics.get(estimand.key("noise_floor")) or 0.0)
        if quantity in ("deltaH_true", "H_upd"):
            return rounding
        number = self.number(quantity, estimand)
        if quantity != "deltaH1" or number is None or number.value is None:
            return 0.0
        own = abs(number.value) * max(float(self.diagnostics.get(key) or 0.0) for key in DERIVATIVE_ERRORS)
        return max(own, rounding) if "half_precision" in self.flags else own

    def described(self) -> ComparedRun:
        """What a comparison says of it."""
        values = self.results
        return ComparedRun(
            name=str(self.log.get("checkpoint_name")),
            path=self.path,
            checkpoint_path=self.log.get("checkpoint_path"),
            started_at=str(self.log.get("started_at")),
            learning_rate=values.get("learning_rate"),
            B_E=values["B_E"],
            B_U=values.get("B_U"),
            G=values.get("G"),
            verdict=values.get("verdict"),
            bias_flags=self.flags,
        )
