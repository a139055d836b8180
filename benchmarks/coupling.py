"""Whose doing the change of a state's entropy is, over training and against the rank of the adapter; the league table.

The demo's recipe with other numbers of GRPO steps, and other ranks of its adapter, from several seeds; each policy is
attributed as `entropy-probe attribute` does. Tables of shares and of the predictors' ranks, and a figure.

    python benchmarks/coupling.py --output docs/coupling.png
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from probe import OfflineEntropyProbe
from probe.attribution.coupling import TOKEN_TERMS
from probe.config.files import read_config_file
from probe.demo.build import build_demo
from probe.demo.recipe import DemoRecipe
from probe.sweep.plots.style import CURVES, plot_style

STEPS = (2, 5, 10, 20, 40, 80)
RANKS = (1, 2, 4, 8, 16, 32)
Found = Mapping[str, Any]


def attributed(folder: Path, recipe: DemoRecipe, seed: int, states: int) -> Found:
    """The key `attribution` of a run on a policy made by a recipe."""
    place = folder / f"{recipe.grpo_steps}_{recipe.lora_rank}_{seed}"
    kept = place / "attribution.json"
    if kept.exists():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    if not place.exists():
        place.mkdir()
        build_demo(place, place / "base", 0, seed, recipe, progress=False)
    config = read_config_file("quickstart")
    config["checkpoint"] = {
        "checkpoint_path": str(place / "checkpoint" / "model"),
        "optimizer_path": str(place / "checkpoint" / "optimizer.pt"),
    }
    config["probe_rework"] = {**config["probe_rework"], "master_seed": seed}
    config["detailed_logging"] = {"enabled": False}
    config["attribution"] = {"enabled": True, "states": states, "responses": 32}
    config["trainer"] = {"accelerator": "cpu", "logger": False}
    found: Found = OfflineEntropyProbe(config).run_mixed_probe()["attribution"]
    kept.write_text(json.dumps({key: found[key] for key in ("coupling", "league")}))
    return found


def shares(
    found: Found, of: str = "states", which: str = "size_share"
) -> dict[str, tuple[float, float, float]]:
    """Shares of the sizes with their intervals."""
    table = found["coupling"][of][which]
    return {name: (table[name]["value"], *(table[name]["value_ci95"] or (0.0, 1.0))) for name in TOKEN_TERMS}


def row(found: Found) -> list[str]:
    """Cells of a table: shares of states and responses, momentum beside them, signs."""
    states, responses = shares(found), shares(found, "responses")
    size = found["coupling"]["states"]["size"]
    times = size["momentum"]["value"] / sum(size[name]["value"] for name in TOKEN_TERMS)
    own, alike = states["own"], shares(found, which="mean_share")["own"]
    block = responses["own"][0] + responses["group"][0]
    return [
        f"{100 * own[0]:.1f} [{100 * max(own[1], 0):.1f}, {100 * own[2]:.1f}]",
        f"{100 * alike[0]:.1f} [{100 * alike[1]:.1f}, {100 * alike[2]:.1f}]",
        *(f"{100 * states[name][0]:.1f}" for name in TOKEN_TERMS[1:]),
        f"{100 * responses['own'][0]:.1f}, {100 * block:.1f}",
        f"{times:.1f}",
        f"{100 * found['coupling']['states']['sign_agreement']['value']:.0f}",
        f"{found['coupling']['states']['share']['own']['value']:+.3f}",
    ]


HEAD = " | ".join(
    (
        "own token, % [95 %]",
        "mean of states",
        "rest of response, %",
        "group, %",
        "other prompts, %",
        "response on itself, diagonal block, %",
        "momentum, times all tokens",
        "signs of own token right, %",
        "own share with sign",
    )
)


def print_rows(what: str, table: Mapping[int, Sequence[Found]]) -> None:
    """A table, one row per policy."""
    print(f"\n| {what} | {HEAD} |\n|{'---|' * 10}")
    for value, runs in table.items():
        for found in runs:
            print(f"| {value} | {' | '.join(row(found))} |")


def print_league(runs: Sequence[Found]) -> None:
    """Rank correlations of each predictor, mean and standard deviation over the policies that have one."""
    ranks: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for found in runs:
        for one in found["league"]:
            if one["spearman"] is not None:  # tokens of equal scores have no rank
                ranks[one["predictor"], one["ranked"], one["target"]].append(one)
    targets = ("deltaH1", "state_fixed", "own_state")
    names = sorted(
        {(name, ranked) for name, ranked, target in ranks if target == "deltaH1"},
        key=lambda key: (key[1], -mean(abs(one["spearman"]) for one in ranks[(*key, "deltaH1")])),
    )
    heads = " | ".join(f"{target}: Spearman | signs, % | largest tenth holds, %" for target in targets)
    print(f"\n| predictor | ranked | {heads} |\n|{'---|' * 11}")
    for name, ranked in names:
        cells = []
        for target in targets:
            own = ranks.get((name, ranked, target), [])
            if not own:
                cells += ["-"] * 3
                continue
            values = [one["spearman"] for one in own]
            signs = [one["sign_agreement"] for one in own if one["sign_agreement"] is not None]
            spread = f" +/- {stdev(values):.2f}" if len(values) > 1 else ""
            cells += [
                f"{mean(values):+.2f}{spread}",
                f"{100 * mean(signs):.0f}" if signs else "-",
                f"{100 * mean(one['captured_top_10'] for one in own):.0f}",
            ]
        print(f"| {name} | {ranked} | {' | '.join(cells)} |")


def figure_of(by_steps: Mapping[int, Sequence[Found]], by_rank: Mapping[int, Sequence[Found]]) -> Figure:
    """Shares over training and against the rank: of all changes, and the mean over states."""
    with plot_style():
        figure = Figure(figsize=(10.2, 6.9), layout="constrained")
        figure.suptitle("Whose doing is the change of a state's entropy?", fontsize=11)
        axes = figure.subplots(2, 2)
        ways = (("size_share", "share of all changes"), ("mean_share", "share, mean of states"))
        for row, (which, words) in zip(axes, ways, strict=True):
            for axis, table, label in zip(
                row, (by_steps, by_rank), ("GRPO steps", "rank of the adapter"), strict=True
            ):
                _panel(axis, table, which)
                axis.set_xlabel(label)
            row[0].set_ylabel(words)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _panel(axis: Axes, table: Mapping[int, Sequence[Found]], which: str) -> None:
    """One curve per term; bars are the 95 % intervals of single policies."""
    labels = {
        "own": "the token sampled there",
        "response": "rest of its response",
        "group": "other responses to the prompt",
        "others": "other prompts",
    }
    for k, name in enumerate(TOKEN_TERMS):
        xs, ys, low, high = [], [], [], []
        for value, runs in table.items():
            for n, found in enumerate(runs):
                share = shares(found, which=which)[name]
                xs.append(value * 1.04 ** (n + 0.5 * (k - 1.5)))
                ys.append(share[0])
                low.append(max(share[0] - max(share[1], 0.0), 0.0))
                high.append(max(min(share[2], 1.0) - share[0], 0.0))
        axis.errorbar(
            xs,
            ys,
            yerr=[low, high],
            fmt="o",
            markersize=3.5,
            linewidth=0.8,
            color=CURVES[k],
            label=labels[name],
        )
        means = [mean(shares(found, which=which)[name][0] for found in runs) for runs in table.values()]
        axis.plot(list(table), means, color=CURVES[k], linewidth=1.0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(table), [str(value) for value in table])
    axis.minorticks_off()
    axis.set_ylim(0, 1)


def main() -> int:
    """Make the policies, attribute them, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="docs/coupling.png", help="where the figure goes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--states", type=int, default=96)
    parser.add_argument("--folder", default=None, help="keep the policies here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        plain = DemoRecipe()

        def runs(recipe: DemoRecipe) -> list[Found]:
            return [attributed(folder, recipe, seed, options.states) for seed in range(options.seeds)]

        by_steps = {steps: runs(replace(plain, grpo_steps=steps)) for steps in STEPS}
        # the scale of the adapter stays
        by_rank = {
            rank: runs(replace(plain, lora_rank=rank, lora_alpha=2 * rank)) if rank != plain.lora_rank
            else by_steps[plain.grpo_steps]
            for rank in RANKS
        }  # fmt: skip
    print_rows("GRPO steps", by_steps)
    print_rows("rank", by_rank)
    print_league([found for table in (by_steps, by_rank) for own in table.values() for found in own])
    figure = figure_of(by_steps, by_rank)
    FigureCanvasAgg(figure)
    figure.savefig(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
