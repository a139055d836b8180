"""Passes over groups of responses: their prompts through the model once, and once for each response.

A random Qwen2-shaped model, groups of `G` responses of different lengths, 2,048 tokens at a time, one thread. The ways
take turns in one process; what is printed are medians of paired ratios, and the positions that go through the model.

    python benchmarks/shared_prompts.py [--hidden 256] [--layers 2] [--G 8] [--prompts 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.data.batch import RolloutBatch
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens

VOCABULARY = 4096
LENGTHS = ((400, 100), (200, 200), (100, 200), (20, 200), (20, 10))
"""Tokens of a prompt, and of its longest response."""


def groups(prompts: int, G: int, P: int, R: int) -> RolloutBatch:
    """Random groups; responses of half of `R` up to `R` tokens, prompts of four fifths of `P` up to `P`."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    each = [
        tuple(integers(2, VOCABULARY - 1, int(n)).tolist()) for n in integers(max(4 * P // 5, 1), P, prompts)
    ]
    B = prompts * G
    mask = torch.arange(R) < integers(max(R // 2, 1), R, B).unsqueeze(1)
    return RolloutBatch(
        prompts=("",) * B,
        completions=("",) * B,
        prompt_ids=tuple(ids for ids in each for _ in range(G)),
        completion_ids=integers(2, VOCABULARY - 1, B, R) * mask,
        mask=mask,
        truncated=torch.zeros(B, dtype=torch.bool),
        group=torch.arange(prompts).repeat_interleave(G),
        rows=({},) * B,
    )


def ones(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one objective."""
    return torch.ones(1, len(l)), torch.ones(1, len(l))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 256), ("layers", 2), ("G", 8), ("prompts", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            vocab_size=VOCABULARY,
            intermediate_size=4 * args.hidden,
            num_attention_heads=max(args.hidden // 64, 2),
            num_key_value_heads=2,
        )
    ).eval()
    shared = Policy(model, microbatch_size=None, tokens_per_microbatch=2048)
    plain = replace(shared, share_prompts=False)
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator) for n, p in shared.parameters.items()}
    passes: dict[str, Callable[[Policy, RolloutBatch], object]] = {
        "scores": score_tokens,
        "gradient": lambda policy, batch: token_gradients(policy, batch, ones, 1),
        "forward mode": lambda policy, batch: forward_tangents(policy, batch, direction),
    }
    print(f"Hidden {args.hidden}, {args.layers} layers, {args.prompts} groups of {args.G}; times as fast.\n")
    print(f"| prompt, response | positions | {' | '.join(passes)} |\n|---|---|{'---|' * len(passes)}")
    for P, R in LENGTHS:
        batch = groups(args.prompts, args.G, P, R)
        through = [sum(inputs.padded for inputs in policy.microbatches(batch)) for policy in (plain, shared)]
        cells = [f"{through[1] / through[0]:.2f}"]
        for run in passes.values():
            ratios = []
            for _ in range(args.rounds):
                seconds = []
                for policy in (plain, shared):
                    start = time.perf_counter()
                    run(policy, batch)
                    seconds.append(time.perf_counter() - start)
                ratios.append(seconds[0] / seconds[1])
            cells.append(f"{statistics.median(ratios):.2f}")
        print(f"| {P}, {R} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
