"""A result sent to one logger: numbers and settings, and where it takes them pictures, texts and histograms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probe.phases.state import ProbeState
from probe.report.boards import board_of_logger
from probe.report.drawing import pixels
from probe.report.figures import result_figures
from probe.report.markdown import examples_markdown, report_markdown, verdict_markdown
from probe.report.tags import (
    PREFIX,
    histogram_values,
    hyperparameter_metrics,
    hyperparameters,
    interval_charts,
    scalar_tags,
    training_step,
    varied_settings,
)
from probe.report.token_figure import shaded_responses, tokens_figure
from probe.results.result import ProbeResult


@dataclass(frozen=True)
class Shown:
    """What a logger is shown of a result.

    Attributes:
        examples: how many responses of E are shown as text.
        hyperparameters: whether the configuration is logged as hyper-parameters.
        several: whether the logger may get further results, at other steps: curves with bands have a point each.
        tokens: whether the tokens of U are shown.
        text_of: gives the text of a token id; None shows ids.
    """

    examples: int = 0
    hyperparameters: bool = True
    several: bool = True
    tokens: bool = True
    text_of: Callable[[int], str] | None = None


def publish(logger: Any, state: ProbeState, result: ProbeResult, shown: Shown) -> None:
    """Send everything to one logger.

    Args:
        logger: a Lightning logger.
        state: what the phases have produced.
        result: of the run.
        shown: which parts.
    """
    if hasattr(getattr(logger, "experiment", None), "add_histogram"):
        _publish_to_tensorboard(logger, state, result, shown)
    else:
        logger.log_metrics(scalar_tags(result.values), step=training_step(result))
        if shown.hyperparameters:
            _log_hyperparameters(logger, hyperparameters(result))
    _show(logger, state, result, shown)
    logger.save()


def _publish_to_tensorboard(logger: Any, state: ProbeState, result: ProbeResult, shown: Shown) -> None:
    step, scalars = training_step(result), scalar_tags(result.values)
    metrics = hyperparameter_metrics(scalars) if shown.hyperparameters else {}
    # log_hyperparams logs its metrics as scalars too. Without any it would log a placeholder of -1.
    logger.log_metrics({tag: value for tag, value in scalars.items() if tag not in metrics}, step=step)
    if metrics:
        logger.log_hyperparams(varied_settings(result), metrics=metrics, step=step)
    for tag, values in histogram_values(state).items():
        logger.experiment.add_histogram(tag, values.numpy(), step)
    layout = interval_charts(scalars) if shown.several else {}
    if layout:
        logger.experiment.add_custom_scalars(layout)


def _show(logger: Any, state: ProbeState, result: ProbeResult, shown: Shown) -> None:
    """Pictures, texts and the verdict in words, where the logger takes any."""
    board, step, values = (
        board_of_logger(logger),
        training_step(result),
        result.values,
    )
    if board is None:
        return
    figures = result_figures(values)
    tokens = shaded_responses(state, shown.text_of) if shown.tokens else []
    if tokens:
        figures["6_tokens"] = tokens_figure(tokens)
    for name, figure in figures.items():
        board.picture(f"{PREFIX}/{name}", pixels(figure), step)
    if values.get("verdict") is not None:
        board.text(f"{PREFIX}/verdict", verdict_markdown(values), step)
        reasons = " ".join(values.get("verdict_reasons") or ())
        board.facts({f"{PREFIX}/verdict": values["verdict"], f"{PREFIX}/verdict_reasons": reasons})
    board.text(f"{PREFIX}/report", report_markdown(result), step)
    if shown.examples and state.E is not None:
        board.text(f"{PREFIX}/responses", examples_markdown(state, shown.examples), step)


def _log_hyperparameters(logger: Any, config: dict[str, Any]) -> None:
    """Log the configuration with a logger that is not TensorBoard's."""
    try:
        logger.log_hyperparams(config)
    except NotImplementedError:
        # Fabric's CSVLogger has the method only to say that it cannot.
        return
