"""Changes of entropy with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from probe.estimators.curvature import eta_10
from probe.estimators.estimate import Estimate

if TYPE_CHECKING:
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction


def change_values(
    prediction: Prediction | None,
    truth: GroundTruth | None,
    suffixes: Sequence[str] = ("", "_tok"),
    same_step: bool = True,
    rounded: bool = False,
) -> dict[str, Any]:
    """What prediction and measurement say, and their same-E difference.

    Args:
        prediction: deltaH1, or None.
        truth: deltaH_true, or None.
        suffixes: of the estimands that the measurement is reported for.
        same_step: whether they are about one step, so that their difference means something.
        rounded: whether the measured step is one that the training rounds away.
    """
    values: dict[str, Any] = {}
    if prediction is not None:
        values |= _prediction_values(prediction)
    if truth is not None:
        for which, suffix in enumerate(suffixes):
            values |= _ground_truth_values(truth, which, suffix, rounded)
    if prediction is not None and truth is not None and prediction.estimates and same_step:
        for which, suffix in enumerate(suffixes):
            residual = prediction.estimates["matched"][which] - truth.estimates["snis"][which]
            values |= with_error(f"residual{suffix}", residual)
    values["estimates"] = estimate_rows(prediction, truth, estimands=len(suffixes))
    return values


def estimate_rows(
    prediction: Prediction | None, truth: GroundTruth | None, estimands: int = 2
) -> list[dict[str, Any]]:
    """Every estimate that was made, one row per quantity, estimator and estimand (`sequence`, then `token`)."""
    rows = []
    sources: list[tuple[str, Any, str]] = []
    if prediction is not None and prediction.estimates:
        sources.append(("deltaH1", prediction, "matched"))
    if truth is not None:
        sources.append(("deltaH_true", truth, "snis"))
    for quantity, source, plain in sources:
        for name, both in source.estimates.items():
            for which, estimand in enumerate(("sequence", "token")[:estimands]):
                found, reference = both[which], source.estimates[plain][which]
                rows.append(
                    {
                        "quantity": quantity,
                        "estimand": estimand,
                        "estimator": name,
                        "value": found.value,
                        "se": found.se,
                        "ci95": list(found.ci95),
                        "variance_ratio": (reference.se / found.se) ** 2 if found.se > 0 else None,
                        "reported": name == source.reported,
                    }
                )
    return rows


def with_error(name: str, found: Estimate) -> dict[str, Any]:
    """A value with its error keys."""
    return {name: found.value, f"{name}_se": found.se, f"{name}_ci95": list(found.ci95)}


def _prediction_values(found: Prediction) -> dict[str, Any]:
    """DeltaH1 and its parts, errors, curvature and spread over U, both estimands."""
    values: dict[str, Any] = {}
    for which, suffix in enumerate(("", "_tok")):
        for name in ("bars_dot", "deltaH1", "pathwise", "score"):
            values[name + suffix] = getattr(found, name + suffix)
        name, value = f"deltaH1{suffix}", values[f"deltaH1{suffix}"]
        if found.estimates:
            error = found.estimates[found.reported][which]
            values |= with_error(name, Estimate(value, error.influence))
        if found.sd_U is not None:
            values[f"{name}_sd_U"] = found.sd_U[which]
        if found.deltaH2 is not None:
            second = found.deltaH2[which]
            values |= {
                f"deltaH2{suffix}": second.value,
                f"deltaH2{suffix}_se": second.se,
                f"eta_10{suffix}": _eta_10(found, which, value),
            }
    return values


def _eta_10(found: Prediction, which: int, deltaH1: float) -> float | None:
    """See `eta_10`; null where deltaH1 cannot be told from 0 either."""
    error = Estimate(deltaH1, found.estimates[found.reported][which].influence)
    resolved = error.ci95[0] > 0 or error.ci95[1] < 0
    second = found.deltaH2
    if second is None or not resolved:
        return None
    return eta_10(found.learning_rate, deltaH1, second[which])


def _ground_truth_values(truth: GroundTruth, which: int, suffix: str, rounded: bool) -> dict[str, Any]:
    """One estimand of the measured change; null where it is below the noise floor.

    Of a step that the training rounds away it stays: how little is left of it is what there is to know.
    """
    found, before = (truth.sequence, truth.token)[which], truth.H_orig[which]
    values = with_error(f"deltaH_true{suffix}", found)
    values |= {f"H_orig{suffix}": before, f"H_upd{suffix}": before + found.value}
    if not rounded and truth.noise_floor is not None and abs(found.value) < truth.noise_floor[which]:
        values |= {f"deltaH_true{suffix}": None, f"H_upd{suffix}": None}
    return values
