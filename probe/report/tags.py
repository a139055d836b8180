"""Names, groups and charts under which loggers get the numbers of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.attribution.contributions import PARTS
from probe.estimand import ESTIMANDS, SEQUENCE, TOKEN
from probe.logs.distributions import samples
from probe.results import diagnostic_keys, keys
from probe.results.quantity import Quantity
from probe.verdict.words import WORDS

if TYPE_CHECKING:
    from torch import Tensor

    from probe.phases.state import ProbeState
    from probe.results.result import ProbeResult

PREFIX = "entropy_probe"
VERDICT_CODE = "verdict_code"
"""The verdict as a number, its position in `probe.verdict.WORDS`: 0 trustworthy, 1 caution, 2 unresolved, 3 invalid."""
CURVES = ("advantage", "outcome", "entropy", "kind")
"""The ways to sort tokens whose sums loggers get."""
SECTIONS = ("checkpoint", "batch_config", "generation", "probe_rework", "importance", "trainer")
"""Sections of the configuration that loggers get: those that can change a number."""
SHOWN_AS_RESULTS = ("batch_config/B_E", "batch_config/B_U", "batch_config/G", "probe_rework/learning_rate")
"""Settings of which loggers get the value that was used."""
SHOWN = {
    "B_E": "B_E",
    "LR": "learning_rate",
    "Verdict": "verdict",
    "group_size_G": "G",
    "prompts_B_U": "B_U",
    "step": "training_step",
}
"""Columns of the HPARAMS tab that a result has, by its keys."""
VARIED = {
    "Seed": (None, "seed_everything"),
    "loss": ("probe_rework", "loss"),
    "max_new_tokens": ("generation", "max_new_tokens"),
    "temperature": ("generation", "temperature"),
}
"""Columns of the HPARAMS tab that are settings: what one varies between runs, by section and key."""


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
    parts = keys.parts()
    for key, value in values.items():
        if key == "attribution":
            tags |= _attribution_tags(value or {})
        elif key == "what_if":
            tags |= _what_if_tags(value or {})
        elif isinstance(value, Mapping):
            section = key.removesuffix("_statistics")
            for name, number in _flatten(value).items():
                _add(tags, f"{PREFIX}_{section}/{name}", number)
        elif key == "estimates":
            tags |= _estimate_tags(value or ())
        elif key == "verdict":
            _add(tags, f"{PREFIX}/{VERDICT_CODE}", WORDS.index(value) if value in WORDS else None)
        else:
            for name, number in (parts[key].flat(key, value) if key in parts else {key: value}).items():
                _add(tags, f"{PREFIX}{_group(key)}/{name}", number)
    return tags


def interval_charts(scalars: Mapping[str, float]) -> dict[str, dict[str, list[Any]]]:
    """The layout of the tab CUSTOM SCALARS: each change over training steps, its 95 % interval as a band."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for estimand in ESTIMANDS:
        charts: dict[str, list[Any]] = {}
        for one in reversed(keys.QUANTITIES):  # of a category TensorBoard shows the last chart first
            value, *ends = one.band(estimand)
            tags = [f"{PREFIX}{_group(value)}/{value}", *(f"{PREFIX}_{one.group}/{end}" for end in ends)]
            if ends and all(tag in scalars for tag in tags):
                charts[f"{one.key}, {estimand.unit}"] = ["Margin", tags]
        if charts:
            layout[f"entropy change {estimand.per}, with 95 % interval"] = charts
    return layout


def hyperparameter_metrics(scalars: Mapping[str, float]) -> dict[str, float]:
    """The scalars that the HPARAMS tab shows, as far as they are there; the verdict is a word among its settings."""
    found = _by_metric(keys.QUANTITIES)
    changes = [estimand.key(one.key) for estimand in ESTIMANDS for one in found if estimand in one.estimands]
    tags = [f"{PREFIX}{_group(name)}/{name}" for name in changes]
    tags += [f"{PREFIX}_diagnostics/{one.key}" for one in _by_metric(diagnostic_keys.DIAGNOSTICS)]
    return {tag: scalars[tag] for tag in tags if tag in scalars}


def _by_metric(quantities: Iterable[Quantity]) -> list[Quantity]:
    """Those that the HPARAMS tab shows, in its order."""
    shown = [(one.metric, one) for one in quantities if one.metric is not None]
    return [one for _, one in sorted(shown, key=lambda pair: pair[0])]


def hyperparameters(result: ProbeResult) -> dict[str, int | float | str]:
    """What describes a run in loggers that search their settings: sizes, checkpoint, `settings/SECTION/KEY`.

    Every run has the same keys, null ones included.
    """
    found = {key: result.values.get(key) for key in ("B_E", "B_U", "G", "learning_rate")}
    found |= {
        "checkpoint_name": result.checkpoint_name,
        "seed_everything": result.config.get("seed_everything"),
    }
    settings = _flatten({section: result.config[section] for section in SECTIONS if section in result.config})
    found |= {f"settings/{key}": value for key, value in settings.items() if key not in SHOWN_AS_RESULTS}
    return {key: _setting(value) for key, value in found.items()}


def varied_settings(result: ProbeResult) -> dict[str, int | float | str]:
    """The columns of TensorBoard's HPARAMS tab, which has a tick box for each: what one varies, and the verdict.

    TensorBoard takes the columns from one run. Hence every run has the same keys, null ones included. It sorts them by
    name and shows five at first; the names are such that verdict, checkpoint, learning rate and seed are among them.
    All settings are in the log.
    """
    found = {name: result.values.get(key) for name, key in SHOWN.items()}
    found["checkpoint"] = result.checkpoint_name
    for name, (section, key) in VARIED.items():
        held = result.config if section is None else result.config.get(section) or {}
        found[name] = held.get(key)
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
        estimand = TOKEN if entry["estimand"] == TOKEN.name else SEQUENCE
        # TensorBoard's tags have no plus sign.
        name = f"{estimand.key(entry['quantity'])}/{entry['estimator'].replace('+', '_')}"
        tag = f"{PREFIX}_estimates/{name}"
        for ending, key in (("", "value"), ("_se", "se"), ("_variance_ratio", "variance_ratio")):
            _add(tags, tag + ending, entry.get(key))
    return tags


def _attribution_tags(found: Mapping[str, Any]) -> dict[str, float]:
    """What deltaH1 per token is the sum of, classes of tokens, shares of coupling, and ranks of predictors."""
    tags: dict[str, float] = {}
    group = f"{PREFIX}_attribution"
    for name in (*PARTS, "total"):
        if name in found:
            for key in ("deltaH1_tok", "deltaR1"):
                _add(tags, f"{group}/{key}/{name}", found[name].get(key))
    for way in CURVES:
        for one in found.get(f"by_{way}") or ():
            _add(tags, f"{group}_by_{way}/{_tag(one['name'])}", one["deltaH1_tok"])
    for of, one in (found.get("coupling") or {}).items():
        for name, share in one["size_share"].items():
            if share["value"] or of == "states" or name != "response":
                _add(tags, f"{group}_coupling/{of}/{name}", share["value"])
    for row in found.get("league") or ():
        if row["ranked"] == "contributions":
            _add(tags, f"{group}_league/{row['target']}/{_tag(row['predictor'])}", row["spearman"])
    _add(tags, f"{group}/completeness", found.get("completeness"))
    return tags


def _what_if_tags(found: Mapping[str, Any]) -> dict[str, float]:
    """What interventions change of deltaH1 per token, and of the expected reward."""
    tags: dict[str, float] = {}
    solved = {one["intervention"]: one["solver"] for one in found.get("solutions") or ()}
    for one in found.get("solutions") or ():
        if one["setting"] is not None:
            _add(tags, f"{PREFIX}_what_if/solution/{one['solver']}", one["setting"]["value"])
    for one in found.get("interventions") or ():
        if one["name"] in solved:  # whose name changes from run to run
            continue
        for key in ("deltaH1_tok", "deltaR1"):
            _add(tags, f"{PREFIX}_what_if/{key}/{_tag(one['name'])}", one["difference"].get(key))
    return tags


def _tag(name: str) -> str:
    """A name with nothing in it that loggers do not take in a tag.

    >>> _tag("drop(tokens_of=highest fifth)")
    'drop_tokens_of_highest_fifth'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_")


def _group(key: str) -> str:
    """The group of a result's number, as the ending of `PREFIX`; what no table knows stands with the prediction."""
    for one in (*keys.QUANTITIES, *keys.STATISTICS):
        for estimand in one.estimands:
            if key == estimand.key(one.key):
                return "" if one.headline else f"_{one.group}"
            if key in {estimand.key(one.key, part.ending) for part in one.parts}:
                return f"_{one.group}"
    return "_prediction"


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
