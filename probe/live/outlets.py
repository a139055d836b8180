"""Where numbers go: loggers of several makers, and the charts of TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from probe.errors.exceptions import ConfigError
from probe.live.names import PREFIX
from probe.live.say import say
from probe.snapshot import isolated_rng
from probe.text import error_text

Log = Callable[[Mapping[str, float], int], None]
"""Called with numbers by name (`entropy_probe/...`) and the optimizer step they belong to."""
LAYOUT: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "Entropy: predicted and realised": {
        "nats per token": (
            "Multiline",
            ("H_orig_tok", "H_predicted_tok", "H_tracked_tok", "collapse_entropy"),
        ),
        "change since the first probe": (
            "Multiline",
            ("cumulative_H_tok", "cumulative_deltaH1_tok", "cumulative_deltaH_true_tok"),
        ),
    },
    "Change of entropy per step, with 95 % interval": {
        "deltaH1 (predicted), nats per token": (
            "Margin",
            ("deltaH1_tok", "deltaH1_tok_ci95_low", "deltaH1_tok_ci95_high"),
        ),
        "deltaH_true (measured), nats per token": (
            "Margin",
            ("deltaH_true_tok", "deltaH_true_tok_ci95_low", "deltaH_true_tok_ci95_high"),
        ),
        "parts of deltaH1": (
            "Multiline",
            ("deltaH1_tok", "deltaH1_gradient_tok", "deltaH1_momentum_tok", "deltaH1_decay_tok"),
        ),
    },
    "Forecast": {
        # the upper end is often far away, and would set the scale
        "steps to collapse, and the lower end of the interval": (
            "Multiline",
            ("steps_to_collapse", "steps_to_collapse_low"),
        ),
    },
}
"""The charts of TensorBoard's tab CUSTOM SCALARS: chart type and names."""


def tensorboard_layout(prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """The layout for `SummaryWriter.add_custom_scalars`.

    Args:
        prefix: what the host puts before names (`train/` in transformers' Trainer).
    """

    def tags(kind: str, names: tuple[str, ...]) -> list[str]:
        full = [f"{prefix}{PREFIX}/{name}" for name in names]
        # in charts of several lines TensorBoard takes tags for regular expressions
        return [f"^{name}$" for name in full] if kind == "Multiline" else full

    return {
        category: {title: [kind, tags(kind, names)] for title, (kind, names) in charts.items()}
        for category, charts in LAYOUT.items()
    }


def as_log(target: Any) -> Log | None:
    """A function that logs to `target`.

    Args:
        target: None, a function of a mapping and a step (Fabric's `log_dict`), a Lightning logger (`log_metrics`), a
            `SummaryWriter` (`add_scalar`), or a Weights & Biases run (`log`).

    Raises:
        ConfigError: it is none of these.
    """
    if target is None:
        return None
    if hasattr(target, "log_metrics"):
        return lambda metrics, step: target.log_metrics(dict(metrics), step=step)
    if hasattr(target, "add_scalar"):
        if hasattr(target, "add_custom_scalars"):
            target.add_custom_scalars(tensorboard_layout())

        def write(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                target.add_scalar(name, value, step)

        return write
    if callable(target):
        return lambda metrics, step: target(dict(metrics), step)
    if callable(getattr(target, "log", None)):
        return lambda metrics, step: target.log(dict(metrics), step=step)
    raise ConfigError(
        "log: expected a function of (mapping, step), a Lightning logger, a SummaryWriter or a wandb run, found "
        f"{type(target).__name__}"
    )


def log_or_say(write: Callable[[], object], name: str, strict: bool) -> bool:
    """Give numbers to a host's log; what fails there is said and ends no training.

    Args:
        write: writes them.
        name: of the log, for the message.
        strict: raise what `write` raises.

    Returns:
        Whether it worked; a log that failed is to get nothing any more.
    """
    try:
        with isolated_rng():  # loggers draw names for files and runs
            write()
    except Exception as error:
        if strict:
            raise
        say(
            f"{name} failed and gets nothing from the probe any more ({error_text(error)}); the numbers are still in "
            "`watch.history`",
            warn=True,
        )
        return False
    return True
