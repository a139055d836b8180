"""Names of the numbers of a training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from probe.verdict.words import WORDS

PREFIX = "entropy_probe"
LIVE_KEYS: dict[str, str] = {
    "H_orig": "entropy of the policy before the step",
    "deltaH1": "change predicted: entropy gradient times the optimizer's step",
    "deltaH_true": "change measured: E rescored after the step",
    "residual": "same-E difference of the two: curvature and code error only",
    "cumulative_deltaH1": "sum of deltaH1 over all steps since the first probe, interpolated linearly between probes",
    "cumulative_deltaH_true": "the same of deltaH_true",
    "cumulative_H": "H_orig now minus H_orig at the first probe: what the two above should be",
    "H_predicted": "H_orig at the first probe plus cumulative_deltaH1",
    "H_tracked": "H_orig at the first probe plus cumulative_deltaH_true",
    "deltaH1_momentum": "part of deltaH1 that earlier batches have in the step, through the optimizer's momentum",
    "deltaH1_decay": "part of deltaH1 from weight decay",
    "deltaH1_gradient": "part of deltaH1 from this step's own gradient: the rest",
}
"""Quantities in nats per response, and with the suffix `_tok` in nats per token; `_se` is the standard error,
`_ci95_low` and `_ci95_high` the ends of the 95 % interval. Errors are those of sampling E; those of cumulative sums
count the scatter of steps between probes too."""
LIVE_NUMBERS: dict[str, str] = {
    "momentum_share_tok": "deltaH1_momentum_tok / deltaH1_tok; absent where deltaH1_tok cannot be told from 0",
    "decay_share_tok": "deltaH1_decay_tok / deltaH1_tok; absent likewise",
    "steps_to_collapse": "optimizer steps until H_orig_tok is forecast to fall to the collapse threshold; None before "
    "the third probe, infinite where it does not fall",
    "steps_to_collapse_low": "lower end of its 95 % interval",
    "steps_to_collapse_high": "upper end of its 95 % interval; absent where it is infinite",
    "entropy_rate": "mean relative change of H_orig_tok per step over the last probes",
    "collapse_entropy": "the threshold, nats per token",
    "verdict_code": "0 trustworthy, 1 caution, 2 unresolved, 3 invalid: how far this probe's numbers can be believed",
    "ESS": "effective sample size of the importance weights, at most B_E",
    "pareto_k": "shape of the tail of the importance weights; absent where it cannot be fitted",
    "noise_floor_tok": "size that a change of 0 can seem to have by rounding, nats per token",
    "truncated_fraction": "share of E cut off by max_new_tokens",
    "avg_generation_length": "tokens per response of E",
    "learning_rate": "largest learning rate of the watched parameters",
    "step_norm": "Euclidean norm of the step",
    "seconds": "time of this probe",
    "cost_share": "time in probes over training time without them, since the second step",
    "every": "steps from probe to probe",
}
"""Further numbers, without a suffix."""
STEPS = ("steps_to_collapse", "steps_to_collapse_low", "steps_to_collapse_high")
LIVE_TEXTS: dict[str, str] = {
    "verdict_reasons": "why the verdict is not better, a list of sentences",
    "shares_reason": "why there are no parts of momentum and decay; absent where there are",
    "outlook": "the forecast in words; `no collapse in sight` where the drift is not clearly downward, or it is far",
}
"""Texts in the history; they are not logged."""


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a history entry that are logged, by their full names.

    >>> scalars({"step": 3, "H_orig_tok": 0.5, "pareto_k": None, "steps_to_collapse": math.inf, "verdict": "caution"})
    {'entropy_probe/H_orig_tok': 0.5}
    """
    found = {}
    for name, value in entry.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if _is_logged(name) and number and math.isfinite(value):
            found[f"{PREFIX}/{name}"] = float(value)
    return found


def _is_logged(name: str) -> bool:
    """Whether a number of the history goes to the log: not the errors of parts and sums, nor these per response."""
    key = re.sub(r"(_se|_ci95_low|_ci95_high)$", "", name)
    if key.removesuffix("_tok") not in LIVE_KEYS:
        return name in LIVE_NUMBERS
    plain = key.removesuffix("_tok") in ("H_orig", "deltaH1", "deltaH_true")
    if name == key:
        return plain or key.endswith("_tok")
    return plain and (name.endswith("_se") or (key.endswith("_tok") and key != "H_orig_tok"))


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one probe's values under the names of `LIVE_KEYS` and `LIVE_NUMBERS`, its verdict and texts."""
    entry: dict[str, Any] = {"verdict": values["verdict"], "verdict_code": WORDS.index(values["verdict"])}
    for key in LIVE_KEYS:
        for name in (key, f"{key}_tok"):
            if name in values:
                entry[name] = values[name]
            if f"{name}_se" in values:
                entry[f"{name}_se"] = values[f"{name}_se"]
            if f"{name}_ci95" in values:
                entry[f"{name}_ci95_low"], entry[f"{name}_ci95_high"] = values[f"{name}_ci95"]
    for source in (values, values["diagnostics"]):
        entry |= {name: source[name] for name in LIVE_NUMBERS if name in source}
    entry |= {name: values[name] for name in LIVE_TEXTS if name in values}
    return entry
