"""The result of a run on TensorBoard, or in any other Lightning logger."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.callbacks.base import ProbeCallback
from probe.callbacks.console import (
    ERRORS,
    Row,
    entropy_rows,
    estimator_rows,
    headline,
    time_rows,
    trust_rows,
)
from probe.errors import LogError
from probe.files import ensure_writable, write_error, write_failure, writer_errors_raised_once
from probe.log_sections import samples
from probe.verdict import WORDS

if TYPE_CHECKING:
    from torch import Tensor

    from probe.module import EntropyProbe
    from probe.results import ProbeResult
    from probe.runner import ProbeRunner
    from probe.state import ProbeState

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


class TensorBoardDiagnostics(ProbeCallback):
    """Sends a result to the run's loggers: scalars, hyper-parameters, and to TensorBoard histograms and text too.

    On TensorBoard the tab TEXT has the verdict and the report, the tab CUSTOM SCALARS the changes of entropy with
    their 95 % intervals over checkpoints.

    Attributes:
        hyperparameters: log the configuration as hyper-parameters.
        examples: how many responses of E are shown as text.
    """

    def __init__(self, hyperparameters: bool = True, examples: int = 4) -> None:
        """Args: `hyperparameters`, switched off inside a training loop that logs its own, and `examples`."""
        self.hyperparameters = hyperparameters
        self.examples = examples

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """Make sure, before anything expensive runs, that the loggers' files can be written."""
        if runner.fabric.is_global_zero:
            for logger in runner.fabric.loggers:
                folder = _folder(logger, "root_dir")
                if folder is not None:
                    ensure_writable(folder)

    def on_report_end(self, runner: ProbeRunner, module: EntropyProbe, result: ProbeResult) -> None:
        """Publish; a logger that fails does not keep the others from publishing."""
        if not runner.fabric.is_global_zero:
            return
        show_texts = runner.config.detailed_logging.log_sequences is not False
        for logger in runner.fabric.loggers:
            try:
                with writer_errors_raised_once():
                    self._publish(logger, runner.state, result, self.examples if show_texts else 0)
            except Exception as error:
                # Loggers of all makers come by here, with exceptions of any kind.
                folder, of_disk = _folder(logger, "log_dir"), write_failure(error)
                failure = LogError(f"{type(logger).__name__} did not take the results: {error}")
                if folder is not None and of_disk is not None:
                    failure = write_error(folder, of_disk)
                    if (
                        runner.default_logger
                    ):  # the folder is this run's own, and holds half of an events file
                        shutil.rmtree(folder, ignore_errors=True)
                failure.__cause__ = error
                runner.errors.append(failure)

    def _publish(self, logger: Any, state: ProbeState, result: ProbeResult, examples: int) -> None:
        """Send everything to one logger."""
        step = training_step(result)
        scalars = scalar_tags(result.values)
        if hasattr(getattr(logger, "experiment", None), "add_histogram"):
            shown = hyperparameter_metrics(scalars) if self.hyperparameters else {}
            # log_hyperparams logs its metrics as scalars too. Without any it would log a placeholder of -1.
            logger.log_metrics({tag: value for tag, value in scalars.items() if tag not in shown}, step=step)
            if shown:
                logger.log_hyperparams(hyperparameters(result), metrics=shown, step=step)
            for tag, values in histogram_values(state).items():
                logger.experiment.add_histogram(tag, values.numpy(), step)
            layout = interval_charts(scalars)
            if layout:
                logger.experiment.add_custom_scalars(layout)
            if result.values.get("verdict") is not None:
                logger.experiment.add_text(f"{PREFIX}/verdict", verdict_markdown(result.values), step)
            logger.experiment.add_text(f"{PREFIX}/report", report_markdown(result), step)
            if examples and state.E is not None:
                logger.experiment.add_text(f"{PREFIX}/responses", examples_markdown(state, examples), step)
        else:
            logger.log_metrics(scalars, step=step)
            if self.hyperparameters:
                _log_hyperparameters(logger, hyperparameters(result))
        logger.save()


def _folder(logger: Any, name: str) -> str | None:
    """The local folder that a logger names by `root_dir` or `log_dir`; None where it has none."""
    folder = getattr(logger, name, None)
    return os.fspath(folder) if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder) else None


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


def report_markdown(result: ProbeResult) -> str:
    """The report as Markdown tables."""
    values = result.values
    parts = [
        f"**{escaped(headline(result))}**",
        verdict_markdown(values),
        _table(("", "nats per token", "nats per response", ERRORS), entropy_rows(values)),
        _table(
            ("Estimators", "nats per token", "nats per response", "variance ratio", ""),
            estimator_rows(values),
        ),
        _table(("Can this be trusted?", "", ""), trust_rows(values)),
        _table(("Time", "", ""), time_rows(values)),
    ]
    return "\n\n".join(part for part in parts if part)


def verdict_markdown(values: Mapping[str, Any]) -> str:
    """The verdict and its reasons as Markdown; nothing where there is none."""
    if values.get("verdict") is None:
        return ""
    reasons = [f"- {escaped(reason)}" for reason in values.get("verdict_reasons") or ()]
    return "\n".join([f"Verdict: **{escaped(values['verdict'])}**", "", *reasons])


def examples_markdown(state: ProbeState, count: int) -> str:
    """The first `count` responses of E with what was found for them, as Markdown."""
    if state.E is None:
        return ""
    parts = []
    for i in range(min(count, len(state.E))):
        found = [f"{int(state.E.lengths[i])} tokens"]
        if state.E_scores is not None:
            found.append(f"entropy {float(state.E_scores.sequence_entropy[i]):.4g} nats")
        if state.ground_truth is not None:
            found.append(f"importance weight {float(state.ground_truth.weights.weights[i]):.4g}")
        cells = f"| {escaped(state.E.prompts[i])} | {escaped(state.E.completions[i])} |"
        parts.append(f"**Response {i} of E**: {', '.join(found)}")
        parts.append(f"| prompt | response |\n| --- | --- |\n{cells}")
    return "\n\n".join(parts)


def escaped(text: str, limit: int = 2000) -> str:
    """`text` so that Markdown and HTML show it as it is, in a cell of a table; at most `limit` characters.

    >>> escaped("<b>*a*|b")
    '&#60;b&#62;&#42;a&#42;&#124;b'
    """
    rest = len(text) - limit
    shown = text[:limit].strip() + (f" ... ({rest} more characters)" if rest > 0 else "")
    # Markdown uses some control characters as marks of its own.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)
    # Numeric entities mean nothing to Markdown; only the browser puts in what they stand for.
    shown = re.sub(r"[\\`*_{}\[\]<>()#|~!&^$\"']|^[-+]", lambda match: f"&#{ord(match[0])};", shown)
    return re.sub(r"\s*\n\s*", "<br>", shown)


def _table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table; nothing for no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads)]
    lines += [[escaped(cell) for cell in (row.label, *row.cells, row.meaning)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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


def _log_hyperparameters(logger: Any, config: dict[str, Any]) -> None:
    """Log the configuration with a logger that is not TensorBoard's."""
    try:
        logger.log_hyperparams(config)
    except NotImplementedError:
        # Fabric's CSVLogger has the method only to say that it cannot.
        return
