"""What interventions were predicted to do, against what their steps do: over several U, and on an independent E.

For every seed an E and a U of the demo policy are drawn, and interventions are compared as `entropy-probe whatif` does:
by the optimizer's own step to first order, and by the shortcut that holds Adam's denominator and the clipping. The
change of entropy that the step makes, less that of the update as it is, is then measured on a large E that none of the
predictions has seen. The table says how far shortcut and step are apart, and how often their 95 % intervals hold the
measured difference (whose own error, from the large E, is added to theirs).

    python benchmarks/what_if.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from statistics import mean

import torch

from probe.attribution.interventions import parse_intervention
from probe.attribution.what_if import Shortcut
from probe.config.files import read_config_file
from probe.estimators.estimate import Estimate
from probe.estimators.ground_truth import change_by
from probe.estimators.student import student_quantile
from probe.phases.what_if import StepTaker
from probe.scoring.score import score_tokens
from probe.snapshot import evaluation_mode
from tests.support.loaded import loaded_probe

INTERVENTIONS = (
    "positive_advantage",
    "negative_advantage",
    "top_entropy",
    "drop(tokens_of=right)",
    "drop(tokens_of=digits)",
    "drop(tokens_of=highest fifth)",
    "steer",
    "clip_cov(ratio=0.02)",
    "advantage(kind=dr_grpo)",
    "quantile_baseline",
    "entropy_bonus(coef=0.3)",
    "entropic",
    "learning_rate(factor=0.5)",
)


def sections(seed: int, B_E: int) -> dict[str, object]:
    """The demo policy with batches of its own."""
    config = read_config_file("quickstart")
    config["batch_config"] = {**config["batch_config"], "B_E": B_E, "B_U": 16}
    config["probe_rework"] = {**config["probe_rework"], "master_seed": seed, "control_variates": "off"}
    config["attribution"] = {"enabled": True, "states": 0, "responses": 0, "league": False}
    config["whatif"] = {"enabled": True}
    return config


def holds(predicted: Estimate, measured: Estimate) -> bool:
    """Whether the difference of two independent estimates is within its 95 % interval."""
    error = math.hypot(predicted.se, measured.se)
    return abs(predicted.value - measured.value) <= student_quantile(predicted.df) * error


def main() -> int:
    """Compare, take the steps, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--B_E", type=int, default=512)
    parser.add_argument("--B_large", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    large = loaded_probe(sections(10_000, options.B_large))
    with evaluation_mode(large):
        reference = large.sample()
        table: dict[str, list[dict[str, float]]] = defaultdict(list)
        for seed in range(options.updates):
            module = loaded_probe(sections(seed, options.B_E))
            with evaluation_mode(module):
                for name, found in compared(module, reference, large).items():
                    table[name].append(found)
    heads = (
        "difference, measured | of the step, first order | shortcut | spread of the measured over U | "
        "shortcut less step, rms, % | step's interval holds, % | shortcut's, %"
    )
    print(f"\n| intervention | {heads} |\n|{'---|' * 8}")
    for name, rows in table.items():
        measured = [one["measured"] for one in rows]
        size = math.sqrt(mean(x**2 for x in measured))
        off = math.sqrt(mean((one["shortcut"] - one["step"]) ** 2 for one in rows))
        spread = math.sqrt(mean((x - mean(measured)) ** 2 for x in measured))
        print(
            f"| {name} | {mean(measured):+.2e} | {mean(one['step'] for one in rows):+.2e} | "
            f"{mean(one['shortcut'] for one in rows):+.2e} | {spread:.1e} | {100 * off / max(size, 1e-300):.0f} | "
            f"{100 * mean(one['step_holds'] for one in rows):.0f} | "
            f"{100 * mean(one['shortcut_holds'] for one in rows):.0f} |"
        )
    for which in ("step", "shortcut"):
        held = [one[f"{which}_holds"] for rows in table.values() for one in rows]
        print(
            f"\nIntervals of the {which} hold the measured difference in {100 * mean(held):.1f} % of {len(held)}."
        )
    return 0


def compared(module, reference, large):  # type: ignore[no-untyped-def]
    """For each intervention: the predicted, the first-order and the measured difference, per token (nats)."""
    sample = module.sample()
    derivative, update = module.entropy_gradient(sample), module.update(sample)
    predicted = module.prediction(sample, derivative, update)
    attributed = module.attribution(sample, update, predicted)
    shortcut = Shortcut(attributed.contributions, attributed.tokens, update.loss, update.inputs)
    taker = StepTaker(module.batch_source, sample, update, module.loaded_optimizer, shortcut)

    def measured(parameters):  # type: ignore[no-untyped-def]
        new = score_tokens(large.policy.at(parameters), reference.E)
        return change_by("per_decision", reference.E_scores, new, reference.E.group).token

    before, found = measured(update.new_parameters), {}
    for name in INTERVENTIONS:
        effect = shortcut.effect(parse_intervention(name))
        taken = taker.take(effect.plan)
        effect = taker.with_step(effect, taken)
        true = measured(taken.new_parameters) - before
        step, short = effect.step_difference.deltaH1.token, effect.difference.deltaH1.token
        found[name] = {
            "shortcut": short.value,
            "step": step.value,
            "measured": true.value,
            "shortcut_holds": holds(short, true),
            "step_holds": holds(step, true),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
