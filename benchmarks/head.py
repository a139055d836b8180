"""The output head beside its floor and beside other libraries': log-prob of the realised token and exact entropy.

Every variant runs in a process of its own (peak memory), in turn, on one thread: hidden states `(tokens, hidden)` in
float32, a frozen output layer. The floor of scoring is the bare matrix product; that of a gradient to the hidden states
are the two products that it cannot do without. Other libraries are imported from their released packages and never
rewritten; one that is not installed is named as missing (`pip install trl`, `pip install --no-deps liger-kernel verl`).

    python benchmarks/head.py [--rounds 3] [--tokens 1024] [--hidden 896] [--vocabulary 151936]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

FLOORS = ("floor: product", "floor: two products")
PEERS = ("naive logits", "TRL", "verl", "Liger")
TILE = 256
"""Rows of the products that the floors are made of."""


def file_of(package: str, path: str) -> ModuleType:
    """One file of an installed package, without what its `__init__` imports.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(package)
    spec = importlib.util.spec_from_file_location(
        f"bench_{package}", Path(found.submodule_search_locations[0]) / path
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(name: str, weight: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`(hidden, labels) -> (l, h)` of a library, differentiable."""
    if name == "naive logits":

        def naive(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logp = torch.log_softmax(hidden @ weight.T, dim=-1)
            return logp.gather(1, labels.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(1)

        return naive
    if name == "TRL":
        trl = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        return lambda hidden, labels: trl.apply(
            hidden, weight, None, labels, 1.0, 8192, None, 1.0, ("entropy",)
        )[:2]
    if name == "verl":
        verl = file_of("verl", "utils/experimental/torch_functional.py").FusedLinearForPPOFunction
        return lambda hidden, labels: verl.apply(hidden, weight, labels, 1.0, 512)
    liger = file_of(
        "liger_kernel", "ops/fused_linear_scaled_cross_entropy.py"
    )._FusedLinearPPOFallbackFunction

    def scaled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = liger.apply(hidden, weight, labels, 1.0, -100, True)
        return -nll, entropy

    return scaled


def variant(name: str, tokens: int, hidden_size: int, vocabulary: int) -> Callable[[], object]:
    """What a variant computes once."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(hidden_size, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weight = layer.weight
    a, b = (torch.randn(2, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    if name == "floor: product":
        return lambda: [rows @ weight.T for rows in hidden.split(TILE)]
    if name == "floor: two products":
        return lambda: [(rows @ weight.T) @ weight for rows in hidden.split(TILE)]
    kind, _, who = name.partition(": ")
    if who == "probe":
        from probe.scoring.fused_head import head_gradients, token_values
        from probe.scoring.head import OutputHead

        head = OutputHead(_Bare(layer))
        with torch.no_grad():
            head.check(hidden[None, :1], layer(hidden[None, :1]))
        if kind == "score":

            def score() -> object:
                with torch.no_grad():
                    return token_values(head, hidden, labels, 1.0, TILE)

            return score
        count = 2 if kind == "two gradients" else 1
        return lambda: [
            head_gradients(
                head,
                hidden[rows],
                labels[rows],
                1.0,
                lambda l, h, rows=rows: (a[:count, rows], b[:count, rows]),
            )
            for rows in torch.arange(tokens).split(TILE)
        ]
    run = peer(who, weight)
    if kind == "score":

        def scored() -> object:
            with torch.no_grad():
                return run(hidden, labels)

        return scored

    def gradient() -> object:
        leaf = hidden.clone().requires_grad_()
        l, h = run(leaf, labels)
        return torch.autograd.grad((a[0].float() * l + b[0].float() * h).sum(), leaf)

    return gradient


class _Bare(nn.Module):
    """As much of a model as an output head looks at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.config = layer, argparse.Namespace()

    def get_output_embeddings(self) -> nn.Module:
        return self.layer


def measured(name: str, options: argparse.Namespace) -> dict[str, float] | None:
    """Seconds of the faster of two calls after one to warm up, and peak memory in MB; None without its package."""
    try:
        compute = variant(name, options.tokens, options.hidden, options.vocabulary)
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        compute()
    except ModuleNotFoundError:
        return None
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    return {"seconds": min(seconds), "peak": peak / 1024}


def main() -> int:
    """Run all variants in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.variant:
        print(json.dumps(measured(options.variant, options)))
        return 0
    ours = ("score: probe", "gradient: probe", "two gradients: probe")
    names = [*FLOORS, *ours, *(f"{kind}: {who}" for who in PEERS for kind in ("score", "gradient"))]
    found: dict[str, list[dict[str, float] | None]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{options.tokens} tokens, hidden {options.hidden}, V = {options.vocabulary:,}, float32, one thread"
    )
    print("\n| | time / floor | peak above the layer and hidden states, MB |\n|---|---|---|")
    for name in names[len(FLOORS) :]:
        rounds = found[name]
        if any(r is None for r in rounds):
            print(f"| {name} | not installed | |")
            continue
        floors = found["floor: product" if name.startswith("score") else "floor: two products"]
        times = [r["seconds"] / f["seconds"] for r, f in zip(rounds, floors, strict=True) if r and f]
        if name.startswith("two"):  # its floor has a third product
            one = found["floor: product"]
            times = [
                r["seconds"] / (2 * f["seconds"] - o["seconds"])
                for r, f, o in zip(rounds, floors, one, strict=True)
                if r and f and o
            ]
        peak = statistics.median(r["peak"] for r in rounds if r)
        print(f"| {name} | {statistics.median(times):.2f} | {peak:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
