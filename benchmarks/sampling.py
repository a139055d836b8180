"""How many tokens of responses are drawn per second: `generate` to the last row, with rows taken together, continuous.

A random Qwen2-shaped model whose responses end by chance, so that their lengths are geometric (`--means`) or, with a
large mean, all at the cap. Every way draws the same responses from the same uniform numbers; the ways take turns in one
process on one thread, and what is printed are medians of paired ratios to `generate` that keeps each batch to its last
row.

    python benchmarks/sampling.py [--means 60 1000000000] [--hidden 128] [--layers 2] [--cap 256] [--batch_size 64]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.batches import GenerationConfig
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


def compare(args: argparse.Namespace, mean: int) -> str:
    """A table of the ways, for responses of one in `mean` tokens EOS."""
    model = ragged_model(args.hidden, args.layers, mean)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        tuple(torch.randint(2, VOCABULARY, (args.prompt,), generator=generator).tolist())
        for _ in range(args.B)
    ]

    def quiet() -> None:
        """Nothing to report."""

    ways: dict[str, Callable[..., None]] = {
        "`generate`, batches kept": lambda d, e: by_generate(d, e, True, quiet),
        "`generate`, rows taken together": lambda d, e: by_generate(d, e, False, quiet),
        "continuous batching": lambda d, e: by_continuous_batching(d, e, quiet),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            taken, tokens[name] = responses(model, prompts, args, way)
            seconds[name].append(taken)
    first = next(iter(ways))
    lengths = [len(ids) for ids in tokens[first]]
    lines = [
        f"{args.B} responses of {statistics.mean(lengths):.0f} tokens in the mean, {max(lengths)} at most, in "
        f"batches of {args.batch_size}, to prompts of {args.prompt}; hidden {args.hidden}, {args.layers} layers.",
        "",
        "| way | times as fast | tokens per second | the same responses |",
        "|---|---|---|---|",
    ]
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        rate = sum(lengths) / statistics.median(seconds[name])
        same = sum(a == b for a, b in zip(tokens[first], tokens[name], strict=True))
        lines.append(f"| {name} | {ratio:.2f} | {rate:,.0f} | {same} of {args.B} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--means", type=int, nargs="+", default=[60, 10**9])
    for name, default in (
        ("hidden", 128),
        ("layers", 2),
        ("cap", 256),
        ("prompt", 64),
        ("B", 128),
        ("batch_size", 64),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("\n\n".join(compare(args, mean) for mean in args.means))


if __name__ == "__main__":
    main()
