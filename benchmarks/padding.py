"""How much of what goes through a model is padding: a fixed number of sequences, greedy cuts, and those of the probe.

`fixed` takes eight sequences of similar length every time, `greedy` as many as a budget of tokens holds, the longest
first, and `probe` the cut with the least work (`probe.scoring.microbatch.split`). For each kind of lengths the share of
padding and the number of microbatches, for prompts of 32 tokens; `work` counts what a microbatch costs of its own as
the probe does, and is relative to no padding at all.

    python benchmarks/padding.py [--responses 64] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch

from probe.data.batch import RolloutBatch
from probe.scoring.microbatch import START, at_a_time, split

FIXED, PROMPT, LONGEST = 8, 32, 1024


def lengths(responses: int) -> Mapping[str, torch.Tensor]:
    """Lengths of responses as they occur, tokens."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(responses, generator=generator)
    geometric = torch.empty(responses).geometric_(1 / 150, generator=generator)
    mixed = torch.where(torch.arange(responses) % 2 == 0, 40 + 8 * normal, 700 + 90 * normal)
    kinds = {
        "nearly equal": 200 + 10 * normal,
        "log-normal": (5.0 + 0.8 * normal).exp(),
        "geometric": geometric,
        "short and long": mixed,
        "a third cut off": torch.where(torch.arange(responses) % 3 == 0, torch.tensor(1e9), geometric),
    }
    return {name: x.round().clamp(2, LONGEST).long() for name, x in kinds.items()}


def batch_of(sizes: torch.Tensor) -> RolloutBatch:
    """Responses of those lengths."""
    n = len(sizes)
    return RolloutBatch(
        prompts=("",) * n,
        completions=("",) * n,
        prompt_ids=((1,) * PROMPT,) * n,
        completion_ids=torch.ones(n, LONGEST, dtype=torch.long),
        mask=torch.arange(LONGEST) < sizes[:, None],
        truncated=torch.zeros(n, dtype=torch.bool),
        group=torch.arange(n),
    )


def greedy(longest: Sequence[int], tokens: int) -> list[int]:
    """Sizes of microbatches, each as large as the budget allows."""
    sizes, start = [], 0
    while start < len(longest):
        sizes.append(min(at_a_time(longest[start], None, tokens) or 1, len(longest) - start))
        start += sizes[-1]
    return sizes


def described(longest: Sequence[int], sizes: Sequence[int], tokens: int) -> str:
    """Padding, number of microbatches and work of a cut."""
    padded, start = 0, 0
    for size in sizes:
        padded += size * longest[start]
        start += size
    useful = sum(longest)
    work = (padded + START * tokens * len(sizes)) / useful
    return f"{1 - useful / padded:.1%}, {len(sizes)}, {work:.2f}"


def main() -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    print(f"{options.responses} responses, {options.tokens} tokens at a time: padding, microbatches, work.\n")
    print("| lengths | fixed | greedy | probe |\n|---|---|---|---|")
    for name, sizes in lengths(options.responses).items():
        batch = batch_of(sizes)
        longest = sorted((PROMPT + int(size) - 1 for size in sizes), reverse=True)
        cuts = {
            "fixed": [len(part) for part in split(batch, FIXED, None)],
            "greedy": greedy(longest, options.tokens),
            "probe": [len(part) for part in split(batch, None, options.tokens)],
        }
        print(
            f"| {name} | "
            + " | ".join(described(longest, cut, options.tokens) for cut in cuts.values())
            + " |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
