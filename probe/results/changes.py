"""Changes of entropy with their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from probe.estimand import SEQUENCE, TOKEN, Number, Numbers, PerEstimand, as_mapping
from probe.estimators.curvature import eta_10
from probe.estimators.estimate import Estimate

if TYPE_CHECKING:
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction


@dataclass(frozen=True)
class Changes:
    """What prediction and measurement say, by quantity, both estimands; empty where one did not run.

    Attributes:
        prediction: deltaH1, its parts, errors, curvature and spread over U.
        measurement: deltaH_true and the entropies before and after.
        difference: of the two, on the same E.
        estimates: every estimate that was made, see `estimate_rows`.
    """

    prediction: Mapping[str, Numbers] = field(default_factory=dict)
    measurement: Mapping[str, Numbers] = field(default_factory=dict)
    difference: Mapping[str, Numbers] = field(default_factory=dict)
    estimates: tuple[dict[str, Any], ...] = ()

    @property
    def numbers(self) -> dict[str, Numbers]:
        """All of them."""
        return {**self.prediction, **self.measurement, **self.difference}

    def as_mapping(self) -> dict[str, Any]:
        """The keys of the result mapping."""
        parts = (self.prediction, self.measurement, self.difference)
        values = {key: value for part in parts for key, value in as_mapping(part).items()}
        return {**values, "estimates": list(self.estimates)}


def changes(
    prediction: Prediction | None,
    truth: GroundTruth | None,
    per_token: bool = True,
    same_step: bool = True,
    rounded: bool = False,
) -> Changes:
    """What prediction and measurement say, and their same-E difference.

    Args:
        prediction: deltaH1, or None.
        truth: deltaH_true, or None.
        per_token: whether the measurement is reported per token too.
        same_step: whether they are about one step, so that their difference means something.
        rounded: whether the measured step is one that the training rounds away.
    """
    difference: dict[str, Numbers] = {}
    if prediction is not None and truth is not None and prediction.estimates and same_step:
        residual: Numbers = prediction.estimates["matched"].with_other(
            lambda predicted, measured: reported(predicted - measured), truth.estimates["snis"]
        )
        difference["residual"] = residual if per_token else _of_responses(residual)
    return Changes(
        prediction={} if prediction is None else _predicted(prediction),
        measurement={} if truth is None else _measured(truth, per_token, rounded),
        difference=difference,
        estimates=tuple(estimate_rows(prediction, truth, per_token)),
    )


def estimate_rows(
    prediction: Prediction | None, truth: GroundTruth | None, per_token: bool = True
) -> list[dict[str, Any]]:
    """Every estimate that was made, one row per quantity, estimator and estimand (`sequence`, then `token`)."""
    rows = []
    sources: list[tuple[str, Any, str]] = []
    if prediction is not None and prediction.estimates:
        sources.append(("deltaH1", prediction, "matched"))
    if truth is not None:
        sources.append(("deltaH_true", truth, "snis"))
    for quantity, source, plain in sources:
        reference = source.estimates[plain]
        for name, found in source.estimates.items():
            for estimand in (SEQUENCE, TOKEN) if per_token else (SEQUENCE,):
                own = found[estimand]
                rows.append(
                    {
                        "quantity": quantity,
                        "estimand": estimand.name,
                        "estimator": name,
                        "value": own.value,
                        "se": own.se,
                        "ci95": list(own.ci95),
                        "variance_ratio": (reference[estimand].se / own.se) ** 2 if own.se > 0 else None,
                        "reported": name == source.reported,
                    }
                )
    return rows


def reported(found: Estimate) -> Number:
    """An estimate as a result gives it."""
    return Number(found.value, found.se, found.ci95, df=found.df)


def _predicted(prediction: Prediction) -> dict[str, Numbers]:
    """DeltaH1 and its parts, errors, curvature and spread over U."""
    numbers: dict[str, Numbers] = {
        name: getattr(prediction, name).map(Number) for name in ("bars_dot", "deltaH1", "pathwise", "score")
    }
    spread = PerEstimand[float | None](None, None) if prediction.sd_U is None else prediction.sd_U
    if prediction.estimates:
        numbers["deltaH1"] = prediction.total.with_other(_with_spread, spread)
    if prediction.deltaH2 is not None:
        second = prediction.deltaH2
        numbers["deltaH2"] = second.map(lambda one: Number(one.value, one.se))
        numbers["eta_10"] = prediction.total.with_other(
            lambda total, one: Number(_eta_10(prediction.learning_rate, total, one)), second
        )
    return numbers


def _with_spread(total: Estimate, sd_U: float | None) -> Number:
    return replace(reported(total), sd_U=sd_U)


def _eta_10(learning_rate: float, total: Estimate, second: Estimate) -> float | None:
    """See `eta_10`; null where deltaH1 cannot be told from 0 either."""
    low, high = total.ci95
    return eta_10(learning_rate, total.value, second) if low > 0 or high < 0 else None


def _measured(truth: GroundTruth, per_token: bool, rounded: bool) -> dict[str, Numbers]:
    """The measured change; null where it is below the noise floor.

    Of a step that the training rounds away it stays: how little is left of it is what there is to know.
    """
    change, before = truth.change, truth.H_orig
    floor = PerEstimand(0.0, 0.0) if rounded or truth.noise_floor is None else truth.noise_floor.size
    seen = change.with_other(lambda found, least: None if abs(found.value) < least else found.value, floor)
    after = seen.with_other(lambda value, H: Number(None if value is None else H.value + value), before)
    numbers: dict[str, Numbers] = {
        "deltaH_true": change.with_other(lambda found, value: replace(reported(found), value=value), seen),
        "H_orig": before.map(reported),
        "H_upd": after,
    }
    return numbers if per_token else {name: _of_responses(found) for name, found in numbers.items()}


def _of_responses(numbers: Numbers) -> Numbers:
    """Without the estimand per token."""
    return PerEstimand(numbers.sequence, None)
