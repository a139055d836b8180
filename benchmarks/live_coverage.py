"""How often the intervals of the drop-in probe cover while a policy of known tails is trained.

The policies of `tests/support/tabular.py` as a transformers model (`tests/support/tabular_model.py`), trained by AdamW
on the gradient of GRPO with random rewards, `probe.watch` attached, every step probed. The exact change of entropy and
its exact first order come from enumeration in float64, from the parameters before and after each step. Weight decay
draws the policy back to its table, so that its tails stay what the family's name says; `drifting` ones have none, and
are rewarded for what they find likely anyway: their entropy falls.

    python benchmarks/live_coverage.py [--steps 400] [--sizes 64] [--seed 0] [--rows FILE] [--no-controls]

`--rows` keeps every probe: what it logged, and the exact values.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import probe
from probe.estimand import ESTIMANDS, SEQUENCE, TOKEN, Estimand
from tests.support.intervals import (
    VERDICT_HEADS,
    Interval,
    bias,
    coverage_cell,
    spread,
    verdict_cells,
)
from tests.support.tabular import CAP, FAMILIES, enumeration, tabular
from tests.support.tabular_model import PROMPT, TabularModel, as_inputs, sampled, word_tokenizer

RATE, PULL = 3e-3, 0.03
"""Learning rate, and the share of its distance from the table that a policy loses per step by weight decay: entropies
stay within half of the table's."""
DRIFTING_RATE = 3e-4
"""Learning rate of drifting policies: entropy per token about halves in 400 steps."""
GROUPS, RESPONSES = 2, 8
"""Of each update."""
NOISE = 0.3
"""Standard deviation of the noise in the rewards of drifting policies, nats."""
DRIFTING = ("light", "low")
QUANTITIES = ("deltaH1", "deltaH_true", "H_orig")
HEADLINES = ("deltaH1", "deltaH_true")

Row = dict[str, Any]
"""A probe: `family`, `drifting`, `B_E`, `step`, `logged` (an entry of the watch's history) and `exact` (nats, by the
names of what is logged; `length` in tokens; `kl` of the policies before and after, nats per response)."""


def gradient_loss(model: TabularModel, drifting: bool, g: torch.Generator) -> Tensor:
    """GRPO's loss at the policy that made the responses, in nats: advantages within groups, mean over tokens."""
    every = enumeration()
    total = torch.zeros(())
    for _ in range(GROUPS):
        rows = sampled(model, every, RESPONSES, g)
        logp = model(input_ids=as_inputs(every, rows)).logits.log_softmax(-1)
        mask = every.mask[rows]
        l = torch.where(mask, logp.gather(-1, every.token[rows].unsqueeze(-1)).squeeze(-1), 0.0)
        noise = torch.randn(RESPONSES, generator=g)
        reward = l.detach().sum(1) + NOISE * noise if drifting else noise
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        total = total - (advantage.unsqueeze(1) * l).sum() / mask.sum() / GROUPS
    return total


def exact_values(old: Tensor, new: Tensor) -> dict[str, float]:
    """What a step from one table of logits to another did, by enumeration; see `Row`."""
    every = enumeration()
    H, change, slope = every.change(old, new - old)
    l_old, l_new = (every.scored(x)[0].sum(1) for x in (old, new))
    found = {
        "length": float(H[0] / H[1]),
        "kl": float((l_old.exp() * (l_old - l_new)).sum()),
    }
    for name, values in (("deltaH1", slope), ("deltaH_true", change), ("H_orig", H)):
        found |= {SEQUENCE.key(name): float(values[0]), TOKEN.key(name): float(values[1])}
    return found


def train(
    family: str, size: int, steps: int, drifting: bool = False, seed: int = 0, **settings: Any
) -> list[Row]:
    """Train a policy with the probe attached.

    Args:
        family: of `FAMILIES`.
        size: responses in E.
        steps: of the optimizer, each of them probed.
        drifting: see the module.
        seed: of rewards and of what is sampled.
        settings: further ones of the probe.

    Returns:
        A row for each step.
    """
    model = TabularModel(tabular(*FAMILIES[family]))
    trained = [p for p in model.parameters() if p.requires_grad]
    rate, decay = (DRIFTING_RATE, 0.0) if drifting else (RATE, PULL / RATE)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    g = torch.Generator().manual_seed(11 + seed)
    watch = probe.watch(
        model,
        optimizer,
        [PROMPT],
        word_tokenizer(),
        every=1,
        B_E=size,
        max_new_tokens=CAP,
        microbatch_size=size,
        generation_batch_size=size,
        seed=seed,
        strict=True,
        **settings,
    )
    rows = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        gradient_loss(model, drifting, g).backward()
        old = model.table()
        optimizer.step()
        row = {"family": family, "drifting": drifting, "B_E": size, "step": step}
        rows.append({**row, "logged": dict(watch.last or {}), "exact": exact_values(old, model.table())})
    return rows


def interval(row: Row, name: str, estimand: Estimand) -> Interval:
    """What a probe logged of a quantity, beside the truth."""
    logged, key = row["logged"], estimand.key(name)
    # a level is logged with its standard error alone
    value, se = logged[key], logged[f"{key}_se"]
    normal = (value - 1.96 * se, value + 1.96 * se)
    low, high = (
        logged.get(f"{key}_ci95_{end}", one) for end, one in zip(("low", "high"), normal, strict=True)
    )
    return Interval(value, se, (low, high), row["exact"][key])


def wrong(row: Row) -> bool:
    """Whether the interval of the prediction or of the measurement, per token, does not hold the exact value."""
    return not all(interval(row, name, TOKEN).holds for name in HEADLINES)


def wrong_sign(row: Row) -> bool:
    """Whether a probe whose verdict says that the sign is known has the wrong one, per token."""
    known = row["logged"]["verdict"] in ("trustworthy", "caution")
    return known and interval(row, "deltaH_true", TOKEN).value * row["exact"]["deltaH_true_tok"] < 0


def estimate_lines(shown: str, rows: list[Row]) -> list[str]:
    """A line per quantity: coverage, spread and bias per token and per response."""
    lines = []
    for name in QUANTITIES:
        pairs = [[interval(row, name, estimand) for row in rows] for estimand in ESTIMANDS]
        cells = [f"{coverage_cell(found)} | {spread(found):.2f} | {bias(found):+.1f}" for found in pairs]
        lines.append(f"| {shown} | {name} | {' | '.join(cells)} |")
    return lines


def verdict_line(shown: str, rows: list[Row]) -> str:
    """Shares of verdicts, of intervals and signs that are wrong, and from where to where entropy per token went."""
    shares = verdict_cells([row["logged"]["verdict"] for row in rows], [wrong(row) for row in rows])
    signs = 100 * sum(map(wrong_sign, rows)) / len(rows)
    levels = " to ".join(f"{rows[i]['exact']['H_orig_tok']:.2f}" for i in (0, -1))
    return f"| {shown} | {shares} | {signs:.1f} | {levels} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--no-controls", action="store_true", help="without control variates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("probe.live").addHandler(logging.NullHandler())  # a line for each step
    settings = {"control_variates": False} if options.no_controls else {}
    policies = [*((family, False) for family in FAMILIES), *((family, True) for family in DRIFTING)]
    kept: list[Row] = []
    verdicts = []
    per = " | ".join(f"{one.per}: covers | sd | bias" for one in ESTIMANDS)
    print(f"| family | B_E | estimate | {per} |\n|---|---|---|---|---|---|---|---|---|")
    for size, (family, drifting) in itertools.product(options.sizes, policies):
        rows = train(family, size, options.steps, drifting, options.seed, **settings)
        shown = f"{family}{', drifting' * drifting} | {size}"
        print("\n".join(estimate_lines(shown, rows)), flush=True)
        verdicts.append(verdict_line(shown, rows))
        kept += rows
        if options.rows:
            torch.save(kept, options.rows)
    print(f"\n| family | B_E | {VERDICT_HEADS} | sign known and wrong | H per token |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
