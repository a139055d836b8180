"""How many tokens of responses are drawn per second: `generate` to the last row, with rows taken together, continuous.

A random Qwen2-shaped model whose responses end by chance, so that their lengths are geometric (`--mean`), or all run to
the cap. Every way draws the same responses from the same uniform numbers; the ways take turns in one process on one
thread, and what is printed are medians of paired ratios to `generate` that keeps each batch to its last row.

    python benchmarks/sampling.py [--hidden 256] [--layers 4] [--mean 100] [--cap 512] [--B 128] [--batch_size 64]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.batches import GenerationConfig
from probe.rollouts import inverse_cdf
from probe.rollouts.continuous import by_continuous_batching
from probe.rollouts.decoding import Decoding, Response, by_generate
from probe.rollouts.generation import own_generation_config
from probe.scoring.policy import Policy

VOCABULARY = 4096
EOS, PAD = 0, 1


class Tokenizer:
    """What sampling asks a tokenizer for."""

    eos_token_id, pad_token_id = EOS, PAD


def ragged_model(hidden: int, layers: int, mean: int) -> Qwen2ForCausalLM:
    """Nearly uniform next tokens, of which one in `mean` is EOS."""
    torch.manual_seed(0)
    heads = max(hidden // 64, 2)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            vocab_size=VOCABULARY,
            intermediate_size=4 * hidden,
            num_attention_heads=heads,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    bias = torch.zeros(VOCABULARY)
    bias[EOS] = math.log(VOCABULARY / mean)
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def responses(
    model: Qwen2ForCausalLM,
    prompts: Sequence[tuple[int, ...]],
    args: argparse.Namespace,
    way: Callable[..., None],
) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens."""
    settings = GenerationConfig(max_new_tokens=args.cap, batch_size=args.batch_size)
    policy = Policy(model, ("lm_head.weight",))
    with own_generation_config(model, Tokenizer, settings) as eos_ids:
        decoding = Decoding(policy, Tokenizer, settings, 0, eos_ids, [Response(p) for p in prompts])
        start = time.perf_counter()
        way(decoding, range(len(prompts)))
        return time.perf_counter() - start, [r.ids for r in decoding.responses]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("hidden", 256),
        ("layers", 4),
        ("mean", 100),
        ("cap", 512),
        ("prompt", 128),
        ("B", 128),
        ("batch_size", 64),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = ragged_model(args.hidden, args.layers, args.mean)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        tuple(torch.randint(2, VOCABULARY, (args.prompt,), generator=generator).tolist())
        for _ in range(args.B)
    ]

    def quiet() -> None:
        """Nothing to report."""

    def kept(decoding: Decoding, entries: Any) -> None:
        by_generate(decoding, entries, True, quiet)

    ways: dict[str, Callable[..., None]] = {
        "generate, batches kept": kept,
        "generate, rows taken together": lambda d, e: by_generate(d, e, False, quiet),
        "continuous batching": lambda d, e: by_continuous_batching(d, e, quiet),
    }
    draw = partial(responses, model, prompts, args)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            taken, tokens[name] = draw(way)
            seconds[name].append(taken)
    first = next(iter(ways))
    lengths = [len(ids) for ids in tokens[first]]
    print(
        f"hidden {args.hidden}, {args.layers} layers, {args.B} responses to prompts of {args.prompt}, batches of "
        f"{args.batch_size}; lengths: mean {statistics.mean(lengths):.0f}, largest {max(lengths)}; prefill "
        f"{inverse_cdf.PREFILL}, restart {inverse_cdf.RESTART}"
    )
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        rate = sum(lengths) / statistics.median(seconds[name])
        same = sum(a == b for a, b in zip(tokens[first], tokens[name], strict=True))
        print(
            f"  {name:<30} {ratio:5.2f} times as fast   {rate:7.0f} tokens/s   {same} of {args.B} responses alike"
        )


if __name__ == "__main__":
    main()
