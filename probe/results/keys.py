"""Every quantity of a result: what mappings, reports, loggers, logs, sweeps and reference pages are made from.

The order is that of reports and logs.
"""

from __future__ import annotations

from probe.estimand import SEQUENCE, TOKEN
from probe.results.quantity import Part, Quantity, Shown


def _errors(of: str, se: str, logged: bool = False) -> tuple[Part, Part, Part]:
    """Standard error and interval of a change; a training logs those of the main changes, the interval per token."""
    return (
        Part("_se", se, core=True, logged=_BOTH if logged else ()),
        Part(
            "_ci95",
            f"[low, high], 95 % interval of {of}: minus and plus Student's t standard errors",
            core=True,
            interval=True,
            logged=(TOKEN,) if logged else (),
        ),
        Part(
            "_df",
            "degrees of freedom of that standard error: near the number of prompts where all contribute alike, about 2 "
            "where one of them carries the error",
        ),
    )


_BOTH = (SEQUENCE, TOKEN)
QUANTITIES: tuple[Quantity, ...] = (
    Quantity("verdict", "trustworthy, caution, unresolved or invalid; see probe.verdict", core=True),
    Quantity("verdict_reasons", "sentences that say why", core=True),
    Quantity(
        "H_orig",
        "entropy of a response before the update, nats",
        per_token=True,
        parts=_errors("H_orig", "standard error of H_orig over E, nats per response", logged=True),
        group="ground_truth",
        headline=True,
        metric=4,
        core=True,
        row=Shown("H before", "level", "entropy of the policy as it is"),
        live="entropy of the policy before the step",
        logged=_BOTH,
    ),
    Quantity(
        "H_upd",
        "entropy of a response after the update, nats: H_orig + deltaH_true",
        per_token=True,
        group="ground_truth",
        headline=True,
        core=True,
        row=Shown("H after", "level", "entropy after the update, on the same E reweighted"),
    ),
    Quantity(
        "bars_dot",
        "deltaH1 / learning_rate = <X, Y>, nats per response and unit of learning rate",
        per_token=True,
        core=True,
    ),
    Quantity(
        "deltaH1",
        "predicted first-order entropy change <grad H, step>, nats per response",
        per_token=True,
        parts=(
            *_errors(
                "deltaH1",
                "standard error of deltaH1 over E, for this very step, nats per response",
                logged=True,
            ),
            Part(
                "_sd_U",
                "standard deviation of deltaH1 over update batches of this size, nats per response",
                row=Shown(
                    "  spread over U", "plain", "another U of this size would move deltaH1 by this much"
                ),
            ),
        ),
        headline=True,
        metric=1,
        core=True,
        row=Shown("deltaH1", "change", "change predicted: entropy gradient times optimizer step"),
        live="change predicted: entropy gradient times the optimizer's step",
        logged=_BOTH,
    ),
    Quantity(
        "pathwise",
        "part of deltaH1 from the entropy of the states visited, nats per response",
        per_token=True,
    ),
    Quantity(
        "score",
        "part of deltaH1 from which states are visited, nats per response",
        per_token=True,
    ),
    Quantity(
        "deltaH_true",
        "measured entropy change H_upd - H_orig, nats per response; null below the noise floor",
        per_token=True,
        parts=_errors("deltaH_true", "standard error of deltaH_true over E, nats per response", logged=True),
        group="ground_truth",
        headline=True,
        metric=2,
        core=True,
        row=Shown("deltaH_true", "change", "change measured: H after minus H before"),
        live="change measured: E rescored after the step",
        logged=_BOTH,
    ),
    Quantity(
        "residual",
        "same-E difference deltaH1 (matched) - deltaH_true (snis), nats per response: curvature and code error; "
        "sampling errors of E mostly cancel; absent with step: preconditioned",
        per_token=True,
        parts=_errors("residual", "standard error of the residual over E, nats per response"),
        group="ground_truth",
        headline=True,
        metric=3,
        core=True,
        row=Shown(
            "difference",
            "change",
            "same E: matched estimate minus snis, whichever stand above; their sampling errors mostly cancel",
            without_error="predicted minus measured",
        ),
        live="same-E difference of the two: curvature and code error; sampling errors of E mostly cancel",
    ),
    Quantity(
        "deltaH2",
        "second-order term 1/2 step' (hess H) step, nats per response",
        per_token=True,
        parts=(Part("_se", "standard error of deltaH2 over E, nats per response"),),
        core=True,
        row=Shown("deltaH2", "change", "second order: what the prediction leaves out"),
    ),
    Quantity(
        "eta_10",
        "learning rate at which |deltaH2| = 0.1 |deltaH1|; null where either cannot be told from 0",
        per_token=True,
        core=True,
        row=Shown("eta_10", "plain", "learning rate at which deltaH2 is a tenth of deltaH1"),
    ),
    Quantity(
        "estimates",
        "every estimator of deltaH1 and deltaH_true with value, se, ci95 and variance_ratio (variance of plain matched "
        "or snis over its own)",
    ),
    Quantity(
        "attribution",
        "what earlier gradients (momentum), weight decay, the tokens of U and other terms of the loss add to deltaH1, "
        "and sums of the tokens' contributions; see docs/attribution.md",
    ),
    Quantity(
        "what_if",
        "what interventions on the update would do to deltaH1 and to the expected reward; see docs/attribution.md",
    ),
    Quantity(
        "learning_rate",
        "reference learning rate of the optimizer's groups, the one the step was taken with",
        headline=True,
        core=True,
        live="largest learning rate of the watched parameters",
    ),
    Quantity(
        "B_E",
        "sequences in E (prompts times G_E)",
        live="responses in E of this probe",
        group="batch",
        core=True,
        integer=True,
    ),
    Quantity("B_U", "prompts (groups) in U", group="batch", core=True, integer=True),
    Quantity(
        "G",
        "responses per prompt of U (null where a rollout file has groups of several sizes)",
        group="batch",
        core=True,
        integer=True,
    ),
    Quantity(
        "settings",
        "where the settings of the update come from: checkpoint (its training arguments), configuration or default, "
        "each with its values by key; overruled: what the file says where the configuration counts",
        core=True,
    ),
    Quantity("timing", "seconds per phase that ran, and their total", core=True),
    Quantity(
        "throughput", "of the passes of every phase: `tokens_per_second` without padding, share of `padding`"
    ),
    Quantity("diagnostics", "quality of the estimates, see DIAGNOSTIC_KEYS"),
    Quantity("batch_statistics", "lengths, rewards and advantages of E and U"),
    Quantity("checkpoint_path", "the checkpoint that was probed"),
    Quantity(
        "training_step",
        "its training step, from trainer_state.json or its name; null where neither says",
        integer=True,
    ),
)
"""Of the result mapping."""


def parts() -> dict[str, Part]:
    """Errors and intervals of the result mapping by their keys, of both estimands."""
    return {key: part for one in QUANTITIES for key, part in one.keyed_parts().items()}


STATISTICS: tuple[Quantity, ...] = (
    Quantity(
        "avg_generation_length",
        "tokens per response of E and U",
        group="batch",
        live="tokens per response of E",
    ),
    Quantity("avg_reward", "mean reward of U", group="batch"),
)
"""Of `batch_statistics`: its numbers that are not of E or U alone."""
RESULT_KEYS: dict[str, str] = {key: words for one in QUANTITIES for key, words in one.described().items()}
"""Keys of the result mapping. Those in nats per response exist with the suffix `_tok` in nats per token too; the
keys of a phase that did not run are absent."""
