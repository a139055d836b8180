"""Variance of every estimator on the demo policy, relative to plain SNIS at equal cost, for several sizes of E.

One large E is sampled, scored and differentiated; smaller ones are disjoint parts of it. The ratio at a size is the
mean squared standard error of SNIS over the parts, divided by the estimator's. A second table compares one response
per prompt with four at the same number of responses, a third gives small batches the fit of an earlier batch.

    python benchmarks/variance.py --responses 8192

With `--families` instead the policies of known tails (`tests/support/tabular.py`): there the variance is that of many
draws, of an estimate with control variates over that of the same draws without, and coverage is shown beside it.

    python benchmarks/variance.py --families [--repetitions 1000] [--sizes 64 128 256 1024]
"""

from __future__ import annotations

import argparse
import operator
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.files import read_config_file
from probe.estimators.control_variates import FitStatistics, control_variates
from probe.estimators.estimate import Estimate
from probe.estimators.ground_truth import change_by, reweighted_change
from probe.estimators.prediction import token_first_order
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.scores import TokenScores, TokenTangents
from probe.snapshot import evaluation_mode, one_thread
from tests.support.experiment import Drawn, variance_ratio
from tests.support.loaded import loaded_probe
from tests.support.tabular import FAMILIES, Tabular, draw, tabular

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Scored:
    """E with everything the estimators need."""

    def __init__(self, config: dict[str, Any], responses: int, per_prompt: int, seed: int) -> None:
        """Sample and score."""
        batch = {"B_E": responses // per_prompt, "G_E": per_prompt}
        rework = {"control_variates": "on", "update_spread": False}
        module = loaded_probe(
            {
                **config,
                "batch_config": {**config["batch_config"], **batch},
                "probe_rework": rework,
                "seed_everything": seed,
            }
        )
        with evaluation_mode(module):
            sample = module.sample()
            step = module.update(sample)
            assert sample.controls.memory is not None
            basis = sample.controls.memory.basis
            self.group, self.old = sample.E.group, sample.E_scores
            self.tangents = forward_tangents(module.policy, sample.E, step.step, basis)
            from probe.scoring.score import score_tokens

            self.new = score_tokens(module.policy.at(step.new_parameters), sample.E)
            self.psi = basis.tokens[sample.E.completion_ids.clamp(0, len(basis.tokens) - 1)]
        self.basis = basis

    def estimates(
        self, rows: Tensor, earlier: list[FitStatistics]
    ) -> tuple[dict[str, tuple[Estimate, Estimate]], FitStatistics]:
        """Every estimator on a part of E."""
        old, new = (
            TokenScores(*(None if x is None else x[rows] for x in vars(s).values()))  # type: ignore[arg-type]
            for s in (self.old, self.new)
        )
        tangents = TokenTangents(*(None if x is None else x[rows] for x in vars(self.tangents).values()))  # type: ignore[arg-type]
        group = self.group[rows]
        found = dict(reweighted_change(old, new, group).estimates)
        for name in ("matched", "causal"):
            found[name] = token_first_order(old, tangents, group, name).total  # type: ignore[arg-type]
        fitted = control_variates(old, tangents, self.psi[rows], group, earlier)
        parts = {
            "causal": lambda r: token_first_order(old.rows(r), tangents.rows(r), group[r]).total,
            "per_decision": lambda r: change_by("per_decision", old.rows(r), new.rows(r), group[r]),
        }
        for name, on in parts.items():
            Z = fitted.shrunk(old, group, on)
            found[f"{name}+cv"] = found[name].with_other(operator.sub, Z)
        return found, fitted.statistics


def ratios(scored: Scored, size: int, earlier: list[FitStatistics]) -> dict[str, tuple[float, float]]:
    """Variance of SNIS over that of each estimator, per response and per token, averaged over disjoint parts."""
    total: dict[str, list[float]] = {}
    for rows in torch.arange(len(scored.group)).split(size)[:16]:
        if len(rows) < size:
            continue
        for name, pair in scored.estimates(rows, earlier)[0].items():
            sums = total.setdefault(name, [0.0, 0.0])
            for k, one in enumerate(pair):
                sums[k] += one.se**2
    return {name: (total["snis"][0] / s, total["snis"][1] / t) for name, (s, t) in total.items() if s and t}


def table(scored: Scored, sizes: list[int], earlier: list[FitStatistics]) -> None:
    """Print one table."""
    names = ("snis", "per_decision", "per_decision+cv", "matched", "causal", "causal+cv")
    print(f"| responses in E | {' | '.join(names)} |\n|---|{'---|' * len(names)}", flush=True)
    for size in sizes:
        found = ratios(scored, size, earlier)
        cells = [f"{found[n][1]:.2f} / {found[n][0]:.2f}" for n in names]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


def families(sizes: list[int], repetitions: int) -> None:
    """Print the table of the policies of known tails."""
    print(
        "| family | B_E | estimate | variance with / without: response | token | coverage: response | token |"
    )
    print(f"|{'---|' * 7}", flush=True)
    for family, (kind, rare) in FAMILIES.items():
        space = tabular(kind, rare)
        for size in sizes:
            g = torch.Generator().manual_seed(7)
            runs = [draw(space, size, g, controls=True) for _ in range(repetitions)]
            for name in ("causal", "per_decision"):
                found = [compared(space, runs, name, which) for which in (0, 1)]
                (v_seq, c_seq), (v_tok, c_tok) = found
                print(f"| {family} | {size} | {name} | {v_seq} | {v_tok} | {c_seq} | {c_tok} |", flush=True)


def compared(space: Tabular, runs: list[Drawn], name: str, which: int) -> tuple[str, str]:
    """The ratio of variances with its standard error, and the coverages in %, without and with control variates."""
    names = (f"{name}+cv", name)
    with_, without = (torch.tensor([list(run.estimates[n])[which].value for run in runs]) for n in names)
    ratio, error = variance_ratio(with_, without)
    covered = [sum(run.covers(n, space.exact[n])[which] for run in runs) / len(runs) for n in names]
    return f"{ratio:.3f} +/- {error:.3f}", f"{100 * covered[1]:.1f} to {100 * covered[0]:.1f}"


def main() -> int:
    """Print the tables; cells are per token / per response."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 1024])
    options = parser.parse_args()
    if options.families:
        with one_thread():
            families(options.sizes, options.repetitions)
        return 0
    config = read_config_file(options.config)
    sizes = [size for size in SIZES if size <= options.responses]
    with one_thread():
        print("Variance of snis over that of each estimator, per token / per response\n")
        single = Scored(config, options.responses, 1, seed=1)
        table(single, sizes, [])
        print("\nWith what one earlier batch of 2,048 taught the control variates\n")
        half = torch.arange(len(single.group) // 2, len(single.group))[:2048]
        _, taught = single.estimates(half, [])
        rest = torch.arange(len(single.group) // 2)
        front = replace_rows(single, rest)
        table(front, [s for s in sizes if s <= 1024], [taught])
        print(
            "\nFour responses per prompt, at the same number of responses: SNIS's variance over that with one\n"
        )
        grouped = Scored(config, min(options.responses, 4096), 4, seed=1)
        print("| responses in E | per token | per response |\n|---|---|---|")
        for size in (256, 1024, 4096):
            if size <= min(options.responses, 4096):
                one, four = (mean_variance(s, size) for s in (single, grouped))
                print(f"| {size} | {one[1] / four[1]:.2f} | {one[0] / four[0]:.2f} |", flush=True)
    return 0


def mean_variance(scored: Scored, size: int) -> tuple[float, float]:
    """Mean squared standard error of SNIS over disjoint parts."""
    parts = [p for p in torch.arange(len(scored.group)).split(size)[:16] if len(p) == size]
    found = [scored.estimates(p, [])[0]["snis"] for p in parts]
    return sum(a.se**2 for a, _ in found) / len(found), sum(b.se**2 for _, b in found) / len(found)


def replace_rows(scored: Scored, rows: Tensor) -> Scored:
    """A part of E as an E of its own."""
    part = object.__new__(Scored)
    part.group, part.psi, part.basis = scored.group[rows], scored.psi[rows], scored.basis
    for name in ("old", "new", "tangents"):
        whole = getattr(scored, name)
        taken = {k: None if x is None else x[rows] for k, x in vars(whole).items()}
        setattr(part, name, replace(whole, **taken))
    return part


if __name__ == "__main__":
    sys.exit(main())
