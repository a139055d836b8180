"""A result sent to one logger: scalars and hyper-parameters, and to TensorBoard histograms and text too."""

from __future__ import annotations

from typing import Any

from probe.phases.state import ProbeState
from probe.report.markdown import examples_markdown, report_markdown, verdict_markdown
from probe.report.tags import (
    PREFIX,
    histogram_values,
    hyperparameter_metrics,
    hyperparameters,
    interval_charts,
    scalar_tags,
    training_step,
)
from probe.results.result import ProbeResult


def publish(
    logger: Any, state: ProbeState, result: ProbeResult, examples: int, with_hyperparameters: bool
) -> None:
    """Send everything to one logger.

    Args:
        logger: a Lightning logger.
        state: what the phases have produced.
        result: of the run.
        examples: how many responses of E are shown as text.
        with_hyperparameters: log the configuration as hyper-parameters.
    """
    if hasattr(getattr(logger, "experiment", None), "add_histogram"):
        _publish_to_tensorboard(logger, state, result, examples, with_hyperparameters)
    else:
        logger.log_metrics(scalar_tags(result.values), step=training_step(result))
        if with_hyperparameters:
            _log_hyperparameters(logger, hyperparameters(result))
    logger.save()


def _publish_to_tensorboard(
    logger: Any, state: ProbeState, result: ProbeResult, examples: int, with_hyperparameters: bool
) -> None:
    step, scalars = training_step(result), scalar_tags(result.values)
    shown = hyperparameter_metrics(scalars) if with_hyperparameters else {}
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


def _log_hyperparameters(logger: Any, config: dict[str, Any]) -> None:
    """Log the configuration with a logger that is not TensorBoard's."""
    try:
        logger.log_hyperparams(config)
    except NotImplementedError:
        # Fabric's CSVLogger has the method only to say that it cannot.
        return
