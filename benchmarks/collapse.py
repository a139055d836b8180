"""A training that collapses, with the drop-in probe attached: TRL's GRPOTrainer on the demo's base model.

Two runs that differ in the learning rate only: one whose entropy collapses and a healthy one. The reward is a right
answer plus a format, on few prompts. With the answer alone nothing selects among phrasings, and their entropy stays;
with many prompts the entropy of numbers that the small model cannot work out stays.

Every step is probed (`--every`). E is drawn from the training's prompts, so that the trainer's own metric `entropy`,
which comes from its batches, is an independent measurement of the same thing.

    python benchmarks/collapse.py --folder /tmp/collapse --output docs/collapse.png

A second call with the same `--folder` draws and counts again without training.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from probe.data.arithmetic import PROMPT_TEMPLATE, arithmetic_rows
from probe.data.rewards import exact_number
from probe.demo.cache import ensure_demo_checkpoint
from probe.demo.grpo import LINEAR_LAYERS
from probe.sweep.plots.style import DIFFERENCE, FLOOR, MEASURED, PREDICTED, SPREAD, plot_style

COLLAPSING, HEALTHY = 1e-3, 1e-4
"""Constant learning rates."""
FRACTION = 0.2
"""Share of the first entropy that counts as collapse. The small model's softmax keeps a floor of about 0.13."""
PROMPTS = 16
"""Distinct questions in training."""
FORMAT = (r"^ We see that ", r"\d (plus|minus|times) \d+ is \d", r" So the answer is \d+\.$")
"""What a completion should have: an opening, a calculation, a closing."""
STEPS = 200
BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS = 64, 8, 32
"""Responses per step, responses per prompt, and the cap on their tokens."""
SMOOTHING = 5
"""The collapse counts from the first step at which the running median of the trainer's entropy is at the threshold."""


# ---------------------------------------------------------------- training


def prompt_rows(size: int, seed: int) -> list[dict[str, str]]:
    """Rows with the columns `prompt` and `answer`, as TRL takes them."""
    rows = arithmetic_rows("train", size, seed)
    return [{"prompt": PROMPT_TEMPLATE.format(prompt=r["question"]), "answer": r["answer"]} for r in rows]


def format_reward(completions: list[str], **_: Any) -> list[float]:
    """Share of `FORMAT` that each completion keeps to."""
    return [sum(bool(re.search(part, text)) for part in FORMAT) / len(FORMAT) for text in completions]


def make_trainer(
    output_dir: str | Path,
    learning_rate: float,
    steps: int = STEPS,
    seed: int = 0,
    report_to: str = "none",
    callbacks: Sequence[Any] | None = None,
    **settings: Any,
) -> Any:
    """A GRPOTrainer of a new LoRA adapter on the demo's base model: plain GRPO, one optimizer step per batch.

    Args:
        output_dir: where TRL writes.
        learning_rate: constant.
        steps: optimizer steps.
        seed: of prompts, adapter and responses.
        report_to: loggers of transformers' Trainer, such as `tensorboard`.
        callbacks: of transformers' Trainer.
        settings: further settings of GRPOConfig, which go before those here.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    checkpoint = ensure_demo_checkpoint()
    rewards: list[Any] = [exact_number, format_reward]
    usual: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH_SIZE,
        "num_generations": GROUP_SIZE,
        "max_completion_length": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint.parent / "base"),
        # Not the tokenizer in base/: beside a config of Qwen2, AutoTokenizer splits words as Qwen2 does.
        processing_class=AutoTokenizer.from_pretrained(checkpoint / "model"),
        reward_funcs=rewards,
        train_dataset=Dataset.from_list(prompt_rows(PROMPTS, seed)),
        args=GRPOConfig(output_dir=str(output_dir), report_to=report_to, **{**usual, **settings}),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEAR_LAYERS
        ),
        callbacks=list(callbacks or ()),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def attach_probe(trainer: Any, every: int, B_E: int, seed: int, fraction: float) -> Any:
    """The drop-in probe; prompts, temperature and cap on tokens are by default the trainer's own."""
    from probe.callbacks.training_transformers import EntropyProbeTrainerCallback

    callback = EntropyProbeTrainerCallback(
        trainer,
        every=every,
        B_E=B_E,
        collapse_fraction=fraction,
        microbatch_size=B_E,
        head_chunk_tokens=4096,
        seed=seed,
        strict=True,
    )
    trainer.add_callback(callback)
    return callback


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        learning_rate: constant.
        steps: optimizer steps.
        history: the probe's entries; levels are those of the policy before the step.
        entropy: TRL's metric of each step, nats per token: of the batch that the step was computed from, which was
            drawn from the policy before the step.
        reward: mean reward of that batch.
        seconds: duration of the training, probes included.
    """

    learning_rate: float
    steps: int
    history: list[dict[str, Any]]
    entropy: list[float]
    reward: list[float]
    seconds: float

    @property
    def table(self) -> pd.DataFrame:
        """The history with one row per probe; what is missing or null is NaN."""
        frame = pd.DataFrame(self.history)
        for name in frame.columns.difference(["verdict"]):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
        return frame

    @property
    def threshold(self) -> float:
        """Entropy that counts as collapse, nats per token."""
        return float(self.table["collapse_entropy"].iloc[0])

    @property
    def collapse(self) -> int | None:
        """First step that starts from a collapsed policy, by the trainer's metric; None if there is none."""
        smooth = pd.Series(self.entropy).rolling(SMOOTHING, center=True, min_periods=1).median()
        below = np.flatnonzero(smooth.to_numpy() <= self.threshold)
        return int(below[0]) + 1 if len(below) else None

    @property
    def alarms(self) -> list[int]:
        """Steps after which an alarm was raised."""
        return [step for entry in self.history for step in entry.get("alarms", ())]


def train(
    output_dir: Path,
    learning_rate: float,
    steps: int,
    seed: int,
    every: int,
    B_E: int,
    fraction: float,
    report_to: str,
) -> Run:
    """Train with the probe attached."""
    trainer = make_trainer(output_dir, learning_rate, steps, seed, report_to)
    callback = attach_probe(trainer, every, B_E, seed, fraction)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    return Run(
        learning_rate=learning_rate,
        steps=steps,
        history=list(callback.watch.history),
        entropy=[entry["entropy"] for entry in logs],
        reward=[entry["reward"] for entry in logs],
        seconds=trainer.state.log_history[-1]["train_runtime"],
    )


def load_or_train(folder: Path, **settings: Any) -> Run:
    """A run from `folder`, where an earlier call has left it, else a new one that is left there."""
    named = ("learning_rate", "steps", "seed", "every", "B_E", "fraction")
    name = "_".join(f"{key}{settings[key]:g}" for key in named)
    file = folder / f"{name}.json"
    if not file.exists():
        run = train(folder / name, **settings)
        file.write_text(json.dumps(asdict(run)), encoding="utf-8")
    return Run(**json.loads(file.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Agreement:
    """How well deltaH1 follows deltaH_true over the probes of a run, per token.

    Attributes:
        pearson: correlation.
        spearman: rank correlation.
        sign: share of probes where both have the same sign.
        resolved_sign: the same among probes where the 95 % interval of deltaH_true excludes 0.
        resolved: number of those probes.
        probes: number of all probes with both values.
    """

    pearson: float
    spearman: float
    sign: float
    resolved_sign: float
    resolved: int
    probes: int


def agreement(run: Run) -> Agreement:
    """Compare the two, step by step."""
    rows = run.table.dropna(subset=["deltaH1_tok", "deltaH_true_tok"])
    predicted, measured = rows["deltaH1_tok"], rows["deltaH_true_tok"]
    same = np.sign(predicted) == np.sign(measured)
    clear = measured.abs() > 1.96 * rows["deltaH_true_tok_se"]
    return Agreement(
        pearson=float(predicted.corr(measured)),
        spearman=float(predicted.rank().corr(measured.rank())),
        sign=float(same.mean()),
        resolved_sign=float(same[clear].mean()),
        resolved=int(clear.sum()),
        probes=len(rows),
    )


def true_steps_left(run: Run) -> pd.Series:
    """What each forecast should have been: steps after the probed one until the policy has collapsed."""
    collapse = math.nan if run.collapse is None else run.collapse
    return (collapse - 1 - run.table["step"]).clip(lower=0)


def forecast_coverage(run: Run) -> tuple[float, int]:
    """Share of the forecasts before the collapse whose 95 % interval holds the truth, and their number."""
    rows = run.table
    if run.collapse is None or "steps_to_collapse" not in rows:
        return math.nan, 0
    truth = true_steps_left(run)
    made = rows["steps_to_collapse"].notna() & (rows["step"] < run.collapse)
    high = rows["steps_to_collapse_high"].fillna(math.inf)
    held = (rows["steps_to_collapse_low"] <= truth) & (truth <= high)
    return float(held[made].mean()) if made.any() else math.nan, int(made.sum())


def numbers(run: Run) -> dict[str, str]:
    """The rows of the table."""
    found, rows = agreement(run), run.table
    coverage, forecasts = forecast_coverage(run)
    alarm = run.alarms[0] if run.alarms else None
    last = rows.iloc[-1]
    in_probe = float(rows["seconds"].sum())
    both = alarm is not None and run.collapse is not None
    return {
        "learning rate": f"{run.learning_rate:g}",
        "entropy at the first and the last step, trainer's metric (nats per token)": f"{run.entropy[0]:.3f}, "
        f"{run.entropy[-1]:.3f}",
        "reward in the first and the last 10 steps": f"{np.mean(run.reward[:10]):.2f}, "
        f"{np.mean(run.reward[-10:]):.2f}",
        "probes": str(len(rows)),
        "correlation of deltaH1 and deltaH_true: Pearson": f"{found.pearson:.3f}",
        "Spearman": f"{found.spearman:.3f}",
        "same sign": f"{100 * found.sign:.0f} % of {found.probes}",
        "same sign, deltaH_true resolved": f"{100 * found.resolved_sign:.0f} % of {found.resolved}",
        "change up to the last probe: predicted, tracked, of the level": f"{last['cumulative_deltaH1_tok']:+.3f}, "
        f"{last['cumulative_deltaH_true_tok']:+.3f}, {last['cumulative_H_tok']:+.3f}",
        "first alarm after step": "none" if alarm is None else str(alarm),
        "collapse at step": "none" if run.collapse is None else str(run.collapse),
        "lead time (steps)": str(run.collapse - alarm) if both else "-",  # type: ignore[operator]
        "forecasts that hold the truth": f"{100 * coverage:.0f} % of {forecasts}" if forecasts else "-",
        "seconds per training step, per probe": f"{(run.seconds - in_probe) / run.steps:.2f}, "
        f"{in_probe / len(rows):.2f}",
        "share of the wall time in probes": f"{100 * in_probe / run.seconds:.0f} %",
    }


def print_table(runs: Sequence[Run]) -> None:
    """The numbers of several runs beside each other, as Markdown."""
    columns = [numbers(run) for run in runs]
    print("| |" + " |" * len(columns))
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


# ---------------------------------------------------------------- figure


def collapse_figure(run: Run, healthy: Run | None) -> Figure:
    """Levels, changes per step and forecasts of the collapsing run; the healthy one is a thin line in the first."""
    title = f"GRPO with TRL, learning rate {run.learning_rate:g}, {run.steps} steps"
    figure = Figure(figsize=(14.8, 4.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    level, change, ahead = figure.subplots(1, 3)
    level_panel(level, run, healthy)
    change_panel(change, run)
    forecast_panel(ahead, run)
    return figure


def level_panel(axis: Axes, run: Run, healthy: Run | None) -> None:
    """The measured level, the two curves that the changes add up to, and the trainer's metric."""
    rows = run.table
    steps = np.arange(1, len(run.entropy) + 1)
    axis.plot(steps, run.entropy, color=FLOOR, linewidth=0.9, label="trainer's metric")
    if healthy is not None:
        label = f"the same, learning rate {healthy.learning_rate:g}"
        axis.plot(
            steps[: len(healthy.entropy)], healthy.entropy, color=FLOOR, linewidth=0.9, ls=":", label=label
        )
    shown = rows.iloc[:: max(1, len(rows) // 40)]
    axis.errorbar(
        shown["step"],
        shown["H_orig_tok"],
        yerr=1.96 * shown["H_orig_tok_se"],
        fmt="o",
        markersize=3.0,
        color=MEASURED,
        elinewidth=0.9,
        label="$H$ on E, 95 % interval",
        zorder=3,
    )
    for name, color, symbol in (("H_predicted", PREDICTED, "1"), ("H_tracked", SPREAD, "\\mathrm{true}")):
        curve, se = rows[f"{name}_tok"], rows[f"{name}_tok_se"]
        axis.fill_between(
            rows["step"], curve - 1.96 * se, curve + 1.96 * se, color=color, alpha=0.12, linewidth=0
        )
        axis.plot(rows["step"], curve, color=color, label=f"$H_0 + \\sum \\Delta H_{{{symbol}}}$", zorder=4)
    axis.axhline(run.threshold, color=DIFFERENCE, linestyle="--", linewidth=1.0, label="collapse threshold")
    mark_events(axis, run)
    axis.set(title="level", xlabel="optimizer step", ylabel="entropy (nats per token)")
    axis.set_ylim(bottom=0.0, top=1.6 * axis.get_ylim()[1])  # room for the legend
    axis.legend(loc="upper right", ncols=2)


def change_panel(axis: Axes, run: Run) -> None:
    """The predicted against the measured change of each probed step, with their errors."""
    rows, found = run.table.dropna(subset=["deltaH1_tok", "deltaH_true_tok"]), agreement(run)
    axis.errorbar(
        rows["deltaH1_tok"],
        rows["deltaH_true_tok"],
        xerr=rows["deltaH1_tok_se"],
        yerr=rows["deltaH_true_tok_se"],
        fmt="none",
        ecolor=FLOOR,
        elinewidth=0.5,
        alpha=0.5,
        zorder=1,
    )
    points = axis.scatter(
        rows["deltaH1_tok"], rows["deltaH_true_tok"], c=rows["step"], s=12, cmap="viridis", zorder=3
    )
    axis.figure.colorbar(points, ax=axis, label="optimizer step", fraction=0.05)
    ends = np.array([rows[["deltaH1_tok", "deltaH_true_tok"]].min().min(), 0.0])
    ends[1] = rows[["deltaH1_tok", "deltaH_true_tok"]].max().max()
    axis.plot(ends, ends, color=PREDICTED, linewidth=0.9, label="equal", zorder=2)
    axis.set(
        title=f"change per step: r = {found.pearson:.2f}, Spearman {found.spearman:.2f}",
        xlabel="$\\Delta H_1$, predicted (nats per token)",
        ylabel="$\\Delta H_\\mathrm{true}$, measured (nats per token)",
    )
    axis.legend(loc="upper left")


def forecast_panel(axis: Axes, run: Run) -> None:
    """Forecast and true number of steps until the collapse."""
    rows = run.table
    axis.set(title="forecast", xlabel="optimizer step", ylabel="steps until collapse")
    if "steps_to_collapse" not in rows:
        return
    top = 1.5 * (run.collapse or run.steps)
    made = rows[rows["steps_to_collapse"].notna()]
    axis.fill_between(
        made["step"],
        made["steps_to_collapse_low"].clip(upper=2 * top),
        made["steps_to_collapse_high"].fillna(math.inf).clip(upper=2 * top),
        color=MEASURED,
        alpha=0.15,
        linewidth=0,
        label="95 % interval",
    )
    # an infinite forecast is drawn beyond the frame
    point = made["steps_to_collapse"].clip(upper=2 * top)
    axis.plot(made["step"], point, color=MEASURED, marker=".", markersize=3.5, label="forecast")
    if run.collapse is not None:
        axis.plot(rows["step"], true_steps_left(run), color=PREDICTED, label="what was left")
    mark_events(axis, run)
    axis.set(ylim=(0, top))
    axis.legend(loc="upper right")


def mark_events(axis: Axes, run: Run) -> None:
    """Vertical lines at the first alarm and at the collapse."""
    if run.alarms:
        axis.axvline(run.alarms[0], color=DIFFERENCE, linewidth=1.0, label="first alarm")
    if run.collapse is not None:
        axis.axvline(run.collapse, color=DIFFERENCE, linewidth=1.0, linestyle=":", label="collapse")


def main() -> int:
    """Train both, draw and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="docs/collapse.png", help="where the plot goes")
    parser.add_argument("--folder", default=None, help="keep the runs here: a second call does not train")
    parser.add_argument("--learning_rate", type=float, default=COLLAPSING)
    parser.add_argument(
        "--healthy", type=float, default=HEALTHY, help="learning rate of the second run; 0: none"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=1, help="steps from probe to probe")
    parser.add_argument("--B_E", type=int, default=64, help="responses per probe")
    parser.add_argument(
        "--fraction", type=float, default=FRACTION, help="share of the first entropy that counts as collapse"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report_to", default="none", help="a logger of transformers, such as tensorboard")
    options = parser.parse_args()
    names = ("steps", "seed", "every", "B_E", "fraction", "report_to")
    shared = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rates = [rate for rate in (options.learning_rate, options.healthy) if rate > 0]
        runs = [load_or_train(folder, learning_rate=rate, **shared) for rate in rates]
    with plot_style():
        figure = collapse_figure(runs[0], runs[1] if len(runs) > 1 else None)
        FigureCanvasAgg(figure).print_png(options.output)
    print_table(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
