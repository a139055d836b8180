"""Names of the numbers of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from probe.estimand import TOKEN, Estimand
from probe.report.tags import PREFIX
from probe.results import diagnostic_keys, keys
from probe.results.quantity import Part, Quantity
from probe.verdict.words import WORDS

_ERROR = (Part("_se", "its standard error"),)


def _errors(logged: tuple[Estimand, ...] = ()) -> tuple[Part, ...]:
    """Standard error, interval and degrees of freedom; `logged` says for which estimands the interval is."""
    interval = Part("_ci95", "its 95 % interval", interval=True, logged=logged)
    return (*_ERROR, interval, Part("_df", "of its error"))


_DELTA_ERRORS, _MEAN_ERRORS = _errors(), _errors(logged=(TOKEN,))
_CURVE_ERRORS = (
    Part("_se", "its standard error", logged=(TOKEN,)),
    Part("_ci95", "1.96 of these on either side: a sum over many probes", interval=True, logged=(TOKEN,)),
)
CURVES, DETAILS = "curves", "details"
"""Groups of the errors of curves, and of most that is not among `MAIN`: they leave TensorBoard's first page to the
rest."""
MAIN = (
    "H_orig_tok",
    "H_predicted_tok",
    "H_tracked_tok",
    "deltaH1_tok",
    "deltaH_true_tok",
    "mean_deltaH_true_tok",
    "collapse_chance",
    "explosion_chance",
    "steps_to_collapse",
    "collapse_alarm",
    "explosion_alarm",
    "verdict_code",
)
"""What is logged under the probe's own prefix: the numbers to look at first."""
OF_A_TRAINING: tuple[Quantity, ...] = (
    Quantity(
        "cumulative_deltaH1",
        "sum of deltaH1 over all steps since the first probe, interpolated linearly between probes",
        per_token=True,
        parts=_CURVE_ERRORS,
        group=CURVES,
    ),
    Quantity(
        "cumulative_deltaH_true",
        "the same of deltaH_true",
        per_token=True,
        parts=_CURVE_ERRORS,
        group=CURVES,
    ),
    Quantity(
        "cumulative_H",
        "H_orig now minus H_orig at the first probe: what the two above should be",
        per_token=True,
        parts=_CURVE_ERRORS,
        group=CURVES,
    ),
    Quantity(
        "H_predicted",
        "entropy at the first probe, by the levels of all probes so far, plus cumulative_deltaH1",
        per_token=True,
        parts=_CURVE_ERRORS,
        group=CURVES,
    ),
    Quantity(
        "H_tracked",
        "the same plus cumulative_deltaH_true",
        per_token=True,
        parts=_CURVE_ERRORS,
        group=CURVES,
    ),
    Quantity(
        "mean_deltaH1",
        "mean of deltaH1 per optimizer step from the first to the last of the last `average_over` probes, the steps "
        "between interpolated linearly",
        per_token=True,
        parts=_MEAN_ERRORS,
    ),
    Quantity("mean_deltaH_true", "the same of deltaH_true", per_token=True, parts=_MEAN_ERRORS),
    Quantity(
        "deltaH1_momentum",
        "part of deltaH1 that earlier batches have in the step, through the optimizer's momentum",
        per_token=True,
        parts=_DELTA_ERRORS,
    ),
    Quantity("deltaH1_decay", "part of deltaH1 from weight decay", per_token=True, parts=_DELTA_ERRORS),
    Quantity(
        "deltaH1_gradient",
        "part of deltaH1 from this step's own gradient: the rest",
        per_token=True,
        parts=_DELTA_ERRORS,
    ),
)
"""Quantities that only a training has: changes of entropy with errors; those of `CURVES` are sums over the training."""
_FORECAST = {
    "momentum_share_tok": "deltaH1_momentum_tok / deltaH1_tok; absent where deltaH1_tok cannot be told from 0",
    "decay_share_tok": "deltaH1_decay_tok / deltaH1_tok; absent likewise",
    "steps_to_collapse": "optimizer steps from the end of this one until H_orig_tok falls to `collapse_entropy`, the "
    "median; None before the third probe, infinite where it is more likely not to",
    "steps_to_collapse_low": "lower end of its 95 % interval",
    "steps_to_collapse_high": "upper end of its 95 % interval; absent where it is infinite",
    "collapse_chance": "probability that H_orig_tok is at `collapse_entropy` or below after one of the next `horizon` "
    "steps, the likeliest of them; that a wavering entropy is there at any of them is somewhat likelier",
    "explosion_chance": "the same of `explosion_entropy` or above",
    "entropy_rate": "mean relative change of H_orig_tok per step now, as the forecast takes it",
    "collapse_entropy": "the entropy that counts as collapse, nats per token",
    "explosion_entropy": "the entropy that counts as explosion, nats per token; absent where none does",
    "collapse_alarm": "1 for the step after which an alarm of a collapse was raised, by a probe or by an entropy that "
    "the training has logged, 0 for other probed steps; in logs alone, the history has `alarms`",
    "explosion_alarm": "the same of an explosion",
    "verdict_code": "0 trustworthy, 1 caution, 2 unresolved, 3 invalid: how far this probe's numbers can be believed",
}
_OF_TOKENS = {
    f"deltaH1_{name}_tok": f"what {words} of the training's own batch add to deltaH1_tok, without an error; with "
    "`attribution`"
    for name, words in {
        "positive": "tokens of positive advantage",
        "negative": "tokens of negative advantage",
        "right": "tokens of right responses (reward above the middle of the batch's; where rewards are known)",
        "wrong": "tokens of wrong responses",
        "high_entropy": "the fifth of the tokens of highest entropy",
        "eos": "the ends that the policy chose",
        "digits": "tokens of digits",
        "words": "tokens with letters",
    }.items()
} | {
    "attribution_scale": "what the contributions of the batch's tokens had to be multiplied by to add up to "
    "deltaH1_gradient_tok on the same E: the factor of gradient clipping, and what dropout makes of it",
}
_COST = {
    "seconds": "time of this probe",
    "cost_share": "time in probes over training time without them, since the second step",
    "every": "steps from probe to probe",
}


def _changes() -> tuple[Quantity, ...]:
    """The changes of entropy that a training has, those of a run first."""
    shared = (replace(one, words=one.live) for one in keys.QUANTITIES if one.live and one.per_token)
    return (*shared, *OF_A_TRAINING)


def _shared_numbers() -> dict[str, str]:
    """The other numbers that a training has in common with a run; of two estimands the headline one."""
    numbers = (one for one in keys.QUANTITIES if not one.per_token)
    return {
        TOKEN.key(one.key) if one.per_token else one.key: one.live
        for one in (*diagnostic_keys.DIAGNOSTICS, *keys.STATISTICS, *numbers)
        if one.live
    }


LIVE_KEYS: dict[str, str] = {one.key: one.words for one in _changes()}
"""Quantities in nats per response, and with the suffix `_tok` in nats per token; `_se` is the standard error,
`_ci95_low` and `_ci95_high` the ends of the 95 % interval. Errors are those of sampling E; those of cumulative sums
count the scatter of steps between probes too."""
LIVE_NUMBERS: dict[str, str] = {**_FORECAST, **_OF_TOKENS, **_shared_numbers(), **_COST}
"""Further numbers, without a suffix."""
STEPS = ("steps_to_collapse", "steps_to_collapse_low", "steps_to_collapse_high")
ALARMS = {False: "collapse_alarm", True: "explosion_alarm"}
"""Under what alarms are logged, by whether the entropy rises."""
LIVE_TEXTS: dict[str, str] = {
    "verdict_reasons": "why the verdict is not better, a list of sentences",
    "alarms": "optimizer steps after which an alarm was raised, from this probe on until the next, a list; absent "
    "where there was none",
    "attribution_reason": "why there are no parts of classes of tokens; absent where there are, or nobody asked",
    "shares_reason": "why there are no parts of momentum and decay; absent where there are",
    "outlook": "the forecast in words; `flattening` where entropy moves towards a threshold at a rate that would "
    "reach it within 3,000 steps, and more likely than not does not, `no collapse in sight` where it is far",
}
"""Texts and lists in the history; they are not logged."""


_ERRORS_OF_CURVES = {
    name
    for one in OF_A_TRAINING
    if one.group == CURVES
    for key, part in one.keyed_parts().items()
    for name in part.flat(key, None)
}


_ERRORS_OF_MAIN = {
    name: one.group
    for one in keys.QUANTITIES
    for key, part in one.keyed_parts().items()
    if one.live and key.removesuffix(part.ending) in MAIN
    for name in part.flat(key, None)
}
"""Errors of what a run logs under the same name, with their groups there. TensorBoard's chart of a band reports every
run as faulty that has a part of its tags: those of a training and of runs beside it have to be all the same."""


def _logged(one: Quantity) -> list[str]:
    """The names under which a change is logged, with its errors."""
    parts = [
        name
        for part in one.parts
        for estimand in part.logged
        for name in part.flat(estimand.key(one.key, part.ending), None)
    ]
    return [*(estimand.key(one.key) for estimand in one.logged), *parts]


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a history entry that are logged, by their full names.

    Not logged are the errors of parts, nor these and sums per response.

    >>> scalars({"step": 3, "H_orig_tok": 0.5, "pareto_k": None, "ESS": math.inf, "H_tracked_tok_se": 0.1})
    {'entropy_probe/H_orig_tok': 0.5, 'entropy_probe_curves/H_tracked_tok_se': 0.1}
    """
    logged = {name for one in _changes() for name in _logged(one)}.union(LIVE_NUMBERS)
    found = {}
    for name, value in entry.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in logged and number and math.isfinite(value):
            found[full_name(name)] = float(value)
    return found


def probe_scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a probe: `scalars`, and 0 for the alarms that can follow, so that one is a peak in a chart.

    >>> probe_scalars({"collapse_entropy": 0.05})
    {'entropy_probe_details/collapse_entropy': 0.05, 'entropy_probe/collapse_alarm': 0.0}
    """
    ends = {ALARMS[False]: "collapse_entropy", ALARMS[True]: "explosion_entropy"}
    return scalars({**entry, **{name: 0.0 for name, end in ends.items() if entry.get(end) is not None}})


def full_name(name: str) -> str:
    """The name under which loggers get a number of the history.

    >>> full_name("H_tracked_tok"), full_name("H_tracked_tok_ci95_low"), full_name("ESS")
    ('entropy_probe/H_tracked_tok', 'entropy_probe_curves/H_tracked_tok_ci95_low', 'entropy_probe_details/ESS')
    >>> full_name("deltaH1_tok"), full_name("deltaH1_tok_se")
    ('entropy_probe/deltaH1_tok', 'entropy_probe_prediction/deltaH1_tok_se')
    """
    if name in MAIN:
        return f"{PREFIX}/{name}"
    group = CURVES if name in _ERRORS_OF_CURVES else _ERRORS_OF_MAIN.get(name, DETAILS)
    return f"{PREFIX}_{group}/{name}"


def history_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The probe's numbers in a log, by their names in the history: what `scalars` has named, or an older version."""
    groups = (f"{PREFIX}/", f"{PREFIX}_{CURVES}/", f"{PREFIX}_{DETAILS}/")
    short = {name: name.partition("/")[2] for name in logs}
    return {
        short[name]: x
        for name, x in logs.items()
        if name.startswith(groups) or (short[name] in _ERRORS_OF_MAIN and name == full_name(short[name]))
    }


def monitored(entry: Mapping[str, Any]) -> dict[str, float]:
    """The main numbers of an entry that are there at every probe, for callbacks that watch a number.

    >>> monitored({"H_orig_tok": 0.5, "steps_to_collapse": 3.0, "ESS": 60.0, "collapse_chance": None})
    {'entropy_probe/H_orig_tok': 0.5}
    """
    return {
        full_name(name): float(entry[name])
        for name in MAIN
        if name not in (*STEPS, *ALARMS.values())
        and entry.get(name) is not None
        and math.isfinite(entry[name])
    }


def band(key: str) -> tuple[str, ...]:
    """The names of a change per token and of the ends of its interval."""
    (one,) = (one for one in _changes() if one.key == key)
    return tuple(one.band(TOKEN))


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one probe's values under the names of `LIVE_KEYS` and `LIVE_NUMBERS`, its verdict and texts."""
    entry: dict[str, Any] = {"verdict": values["verdict"], "verdict_code": WORDS.index(values["verdict"])}
    for one in _changes():
        for estimand in one.estimands:
            name = estimand.key(one.key)
            entry |= {name: values[name]} if name in values else {}
            for part in one.parts:
                name = estimand.key(one.key, part.ending)
                entry |= part.flat(name, values[name]) if name in values else {}
    for source in (values, values["diagnostics"]):
        entry |= {name: source[name] for name in LIVE_NUMBERS if name in source}
    entry |= {name: values[name] for name in LIVE_TEXTS if name in values}
    return entry
