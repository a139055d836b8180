"""Names, groups and charts under which loggers get the numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.logs.distributions import samples
from probe.verdict.words import WORDS

if TYPE_CHECKING:
    from torch import Tensor

    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult

PREFIX = "entropy_probe"
VERDICT_CODE = "verdict_code"
"""The verdict as a number, its position in `probe.verdict.WORDS`: 0 trustworthy, 1 caution, 2 unresolved, 3 invalid."""
HEADLINE = ("deltaH1", "deltaH_true", "residual", "H_orig", "H_upd", "learning_rate")
"""Results (with their `_tok` forms) that stand together at the top, under the names of the result mapping."""
METRICS = (
    *(VERDICT_CODE, "deltaH1_tok", "deltaH_true_tok", "residual_tok", "H_orig_tok"),
    *("deltaH1", "deltaH_true", "residual", "H_orig", "diagnostics/ESS", "diagnostics/pareto_k"),
)
"""Results shown for each run in the HPARAMS tab."""
SECTIONS = ("checkpoint", "batch_config", "generation", "probe_rework", "importance", "trainer")
"""Sections of the configuration shown in the HPARAMS tab: those that can change a number."""
SHOWN_AS_RESULTS = ("batch_config/B_E", "batch_config/B_U", "batch_config/G", "probe_rework/learning_rate")
"""Settings of which the HPARAMS tab shows the value that was used."""
GROUND_TRUTH = ("H_orig", "H_upd", "deltaH_true", "residual")
BATCH = ("B_E", "B_U", "G", "avg_generation_length", "avg_reward")


def training_step(result: ProbeResult) -> int:
    """The training step of the checkpoint, 0 where it is not known."""
    return result.values.get("training_step") or 0


def scalar_tags(values: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a result under the tag it is logged as.

    TensorBoard groups cards by what stands before the first slash: `entropy_probe` has the results
    themselves, and `entropy_probe_prediction`, `_ground_truth`, `_estimates`, `_batch`, `_diagnostics`,
    `_timing`, ... what belongs to them. An interval becomes `<name>_low` and `<name>_high`, the verdict
    `verdict_code`.
    """
    tags: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            section = key.removesuffix("_statistics")
            for name, number in _flatten(value).items():
                _add(tags, f"{PREFIX}_{section}/{name}", number)
        elif key == "estimates":
            tags |= _estimate_tags(value or ())
        elif key == "verdict":
            _add(tags, f"{PREFIX}/{VERDICT_CODE}", WORDS.index(value) if value in WORDS else None)
        elif key.endswith("_ci95") and value is not None:
            for end, number in zip(("low", "high"), value, strict=True):
                _add(tags, f"{PREFIX}{_group(key)}/{key}_{end}", number)
        else:
            _add(tags, f"{PREFIX}{_group(key)}/{key}", value)
    return tags


def interval_charts(scalars: Mapping[str, float]) -> dict[str, dict[str, list[Any]]]:
    """The layout of the tab CUSTOM SCALARS: each change over training steps, its 95 % interval as a band."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for suffix, unit in (("_tok", "per token"), ("", "per response")):
        charts: dict[str, list[Any]] = {}
        for name in ("deltaH1", "deltaH_true", "residual"):
            key = f"{name}{suffix}"
            ends = [f"{PREFIX}{_group(f'{key}_ci95')}/{key}_ci95_{end}" for end in ("low", "high")]
            tags = [f"{PREFIX}/{key}", *ends]
            if all(tag in scalars for tag in tags):
                charts[f"{name}, nats {unit}"] = ["Margin", tags]
        if charts:
            layout[f"entropy change {unit}, with 95 % interval"] = charts
    return layout


def hyperparameter_metrics(scalars: Mapping[str, float]) -> dict[str, float]:
    """The scalars that the HPARAMS tab shows, as far as they are there."""
    tags = [f"{PREFIX}_{name}" if "/" in name else f"{PREFIX}/{name}" for name in METRICS]
    return {tag: scalars[tag] for tag in tags if tag in scalars}


def hyperparameters(result: ProbeResult) -> dict[str, int | float | str]:
    """What tells runs apart in the HPARAMS tab: sizes, checkpoint, learning rate, and `settings/SECTION/KEY`.

    TensorBoard takes the columns from one run and sorts them by name. Hence every run has the same keys, null
    ones included, and the names are such that the five columns it shows at first are those before
    `seed_everything`.
    """
    found = {key: result.values.get(key) for key in ("B_E", "B_U", "G", "learning_rate")}
    found |= {
        "checkpoint_name": result.checkpoint_name,
        "seed_everything": result.config.get("seed_everything"),
    }
    settings = _flatten({section: result.config[section] for section in SECTIONS if section in result.config})
    found |= {f"settings/{key}": value for key, value in settings.items() if key not in SHOWN_AS_RESULTS}
    return {key: _setting(value) for key, value in found.items()}


def histogram_values(state: ProbeState) -> dict[str, Tensor]:
    """The samples shown as histograms, by tag: the finite ones, as TensorBoard takes no others."""
    finite = {name: values[values.isfinite()] for name, values in samples(state).items()}
    return {f"{PREFIX}_{name}": values for name, values in finite.items() if values.numel()}


def _estimate_tags(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Value, standard error and variance ratio of every estimator.

    >>> entry = {"quantity": "deltaH1", "estimand": "token", "estimator": "causal+cv", "value": 0.5, "se": None}
    >>> _estimate_tags([entry])
    {'entropy_probe_estimates/deltaH1_tok/causal_cv': 0.5}
    """
    tags: dict[str, float] = {}
    for entry in estimates:
        suffix = "_tok" if entry["estimand"] == "token" else ""
        # TensorBoard's tags have no plus sign.
        tag = f"{PREFIX}_estimates/{entry['quantity']}{suffix}/{entry['estimator'].replace('+', '_')}"
        for ending, key in (("", "value"), ("_se", "se"), ("_variance_ratio", "variance_ratio")):
            _add(tags, tag + ending, entry.get(key))
    return tags


def _group(key: str) -> str:
    """The group of a result's number, as the ending of `PREFIX`."""
    if key.removesuffix("_tok") in HEADLINE:
        return ""
    if key in BATCH:
        return "_batch"
    return "_ground_truth" if key.startswith(GROUND_TRUTH) else "_prediction"


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": part for name, part in _flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def _setting(value: Any) -> int | float | str:
    """A setting as TensorBoard shows it well: truth values and null as words, not as 1.0000."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, (int, float, str)) else str(value)


def _add(tags: dict[str, float], tag: str, value: Any) -> None:
    """Add `value` if it is a finite number; texts, lists and nulls are for the log files."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        tags[tag] = float(value)
