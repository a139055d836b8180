"""Forward mode, backward and central differences on the demo policy: agreement, chosen step, time against a forward.

python benchmarks/derivatives.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.files import read_config_file
from probe.errors.exceptions import NumericalError
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.prediction import first_order, token_first_order
from probe.scoring.differences import choose_scale, difference_pair
from probe.scoring.forward_mode import forward_tangents, second_order_tangents
from probe.scoring.score import score_tokens
from probe.snapshot import evaluation_mode, one_thread
from tests.support.loaded import loaded_probe


def compare(config: dict[str, Any], dtype: str, learning_rate: float, rounds: int) -> list[str]:
    """One row of the table."""
    module = loaded_probe(
        {
            **config,
            "checkpoint": {**config["checkpoint"], "dtype": dtype},
            "batch_config": {**config["batch_config"], "B_E": 256},
            "probe_rework": {"learning_rate": learning_rate},
        }
    )
    with evaluation_mode(module):
        sample = module.sample()
        update, policy, E, scores = module.update(sample), module.policy, sample.E, sample.E_scores
        assert E is not None
        assert scores is not None
        exact = forward_tangents(policy, E, update.step)
        few = E.subset(torch.arange(64))
        try:
            scale, error = choose_scale(policy, few, update.step)
        except NumericalError:  # 16-bit forwards: no step at which differences settle
            return [dtype, f"{learning_rate:.2g}", *["none"] * 9]
        pair = difference_pair(policy, E, update.step, scale, error)
        a, b = (torch.stack([t.logprob, t.entropy]) for t in (exact, pair.tangents))
        by_tokens = [token_first_order(scores, t, E.group).total.token.value for t in (exact, pair.tangents)]
        X = entropy_gradient(policy, E, scores)
        backward = first_order(X, update.step, update.learning_rate).deltaH1.token
        passes: dict[str, Callable[[], object]] = {
            "forward": lambda: score_tokens(policy, E),
            "backward": lambda: entropy_gradient(policy, E, scores),
            "forward mode": lambda: forward_tangents(policy, E, update.step),
            "differences": lambda: difference_pair(policy, E, update.step, scale),
            "nested": lambda: second_order_tangents(policy, E, update.step),
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(rounds):
            for name, run in passes.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    ratio = [
        statistics.median(t / f for t, f in zip(seconds[name], seconds["forward"], strict=True))
        for name in list(passes)[1:]
    ]
    return [
        dtype,
        f"{learning_rate:.2g}",
        f"{scale:.3g}",
        f"{error:.1e}",
        f"{float((a - b).norm() / a.norm()):.1e}",
        f"{abs(by_tokens[1] / by_tokens[0] - 1):.1e}",
        f"{abs(backward / by_tokens[0] - 1):.1e}",
        *(f"{r:.1f}" for r in ratio),
    ]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = read_config_file("quickstart")
    heads = (
        "weights", "learning rate", "chosen scale", "its estimated error", "differences vs forward mode, tokens",
        "the same, deltaH1", "backward vs forward mode, deltaH1", "backward (3 gradients): time / forward",
        "forward mode", "differences", "nested forward mode",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with one_thread(), contextlib.suppress(BrokenPipeError):
        for dtype in ("float32", "bfloat16", "float64"):
            for rate in (7e-6, 7e-4):
                print(f"| {' | '.join(compare(config, dtype, rate, options.rounds))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
