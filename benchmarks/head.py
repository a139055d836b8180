"""Time, memory and accuracy of the output head against the bare matrix products, and against the heads of others.

Scoring (log-prob of a token and exact entropy) needs one product of hidden states and output weights, a gradient of `K`
objectives `1 + K`. Each way runs in a process of its own and takes turns with the bare products there; reported are the
medians of paired ratios of processor seconds over all rounds, and the peak of the process's memory above what the
problem itself takes. Accuracy is the largest difference from float64 of a log-prob and of an entropy, in nats.

Others are TRL's functions, and the fall-backs in plain torch of verl and Liger; what cannot be imported is named as
missing. Of verl and Liger one file each is read, which needs torch alone: `make bench` puts them into `build/peers`.

    python benchmarks/head.py [--rounds 3] [--tokens 1024] [--dtype float32] [--vocabulary 151936] [--hidden 896]
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from process_memory import forget_peak, peak
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from probe.scoring.fused_head import head_gradients, token_values
from probe.scoring.head import OutputHead, token_log_probs, token_statistics

ROWS = 256
"""Tokens of a gradient at a time, `memory_config.head_chunk_tokens`."""
TRL_CHUNK = 8192
"""TRL's default width of a chunk of the vocabulary."""
Values = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(hidden, weight, labels) -> (l, h)`, differentiable by `hidden`."""


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, in the type of the weights, and their log-softmax in float32."""
    return token_statistics(token_log_probs((hidden @ weight.T).float(), 1.0), labels)


def trl_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """TRL on all logits."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(hidden @ weight.T, labels)


def trl_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's head in chunks of the vocabulary."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return found[0], found[1]


def verl(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The fused head that verl has for PPO, in chunks of 512 tokens."""
    sys.meta_path.insert(0, _Without("liger_kernel"))  # it would take Liger's, which wants Triton
    head = _file("verl", "utils/experimental/torch_functional.py").FusedLinearForPPO()
    return head(hidden, weight, labels)


class _Without(importlib.abc.MetaPathFinder):
    """Makes a package as good as not installed."""

    def __init__(self, package: str) -> None:
        """Its name."""
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse it and what is in it."""
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's fall-back in torch, in chunks of 512 tokens."""
    head = _file("liger_kernel", "ops/fused_linear_scaled_cross_entropy.py")
    nll, entropy = head.LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, labels, 1.0, -100, 1, True
    )
    return -nll, entropy


def _file(package: str, path: str) -> Any:
    """One file of a package as a module, without what its package imports.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    place = Path(next(iter(found.submodule_search_locations))) / path
    spec = importlib.util.spec_from_file_location(f"{package}_{place.stem}", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHERS: dict[str, Values] = {
    "naive logits": naive,
    "TRL, logits": trl_logits,
    "TRL, chunks": trl_chunks,
    "verl, fused PPO head": verl,
    "Liger, torch fall-back": liger,
}
PASSES = {"score": 0, "gradient K=1": 1, "gradient K=2": 2}
"""Number of objectives by the name of a pass."""


class Problem:
    """A model's output layer, hidden states and labels."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Random, with entropies of some nats."""
        torch.manual_seed(0)
        dtype = getattr(torch, options.dtype)
        config = Qwen2Config(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)
        self.weight = model.lm_head.weight
        self.hidden = (3.0 * torch.randn(options.tokens, options.hidden)).to(dtype)
        self.labels = torch.randint(0, options.vocabulary, (options.tokens,))
        self.weights = torch.randn(2, 2, options.tokens)
        self.head = OutputHead(model)
        with torch.no_grad(), self.head.capture() as states:
            logits = model(torch.zeros(1, 1, dtype=torch.long)).logits
        self.head.check(states[-1], logits)

    def products(self, objectives: int) -> None:
        """What no way can do without, of as many tokens as the probe takes at a time."""
        with torch.no_grad():
            for states in self.hidden.split(ROWS if objectives else len(self.hidden)):
                z = states @ self.weight.T
                for _ in range(objectives):
                    z @ self.weight

    def probe(self, objectives: int) -> tuple[Tensor, Tensor]:
        """The probe's way."""
        if not objectives:
            with torch.no_grad():
                return token_values(self.head, self.hidden, self.labels, 1.0, ROWS)  # type: ignore[return-value]
        seen: list[tuple[Tensor, Tensor]] = []
        gradients = []
        for rows in torch.arange(len(self.labels)).split(ROWS):
            a, b = self.weights[:, :objectives, rows]

            def constants(l: Tensor, h: Tensor, a: Tensor = a, b: Tensor = b) -> tuple[Tensor, Tensor]:
                seen.append((l, h))
                return a, b

            states = self.hidden[rows].float()
            gradients.append(head_gradients(self.head, states, self.labels[rows], 1.0, constants))
        l, h = zip(*seen, strict=True)
        return torch.cat(l), torch.cat(h)

    def other(self, values: Values, objectives: int) -> tuple[Tensor, Tensor]:
        """Another way: backward once for each objective."""
        hidden = self.hidden.detach().clone().requires_grad_(objectives > 0)
        with torch.set_grad_enabled(objectives > 0):
            l, h = values(hidden, self.weight, self.labels)
        for k in range(objectives):
            value = (self.weights[0, k] * l + self.weights[1, k] * h).sum()
            torch.autograd.grad(value, hidden, retain_graph=k < objectives - 1)
        return l.detach(), h.detach()

    def errors(self, found: tuple[Tensor, Tensor]) -> list[float]:
        """The largest differences from float64 of `l` and of `h`, of the first tokens."""
        few = slice(0, 16)
        with torch.no_grad():
            logits = self.hidden[few].double() @ self.weight.double().T
            exact = token_statistics(token_log_probs(logits, 1.0), self.labels[few])
        return [float((x[few] - y).abs().max()) for x, y in zip(found, exact, strict=True)]


def run_one(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of every pass: seconds over those of the products, peak memory in MB above the problem's own, and the errors."""
    problem, results = Problem(options), {}
    for what, objectives in PASSES.items():

        def once(objectives: int = objectives) -> tuple[Tensor, Tensor]:
            if options.variant == "probe":
                return problem.probe(objectives)
            return problem.other(OTHERS[options.variant], objectives)

        forget_peak()
        before = peak()
        found = once()  # also what happens once
        above = peak() - before
        problem.products(objectives)
        seconds: list[float] = []
        for way in (lambda objectives=objectives: problem.products(objectives), once) * 2:
            start = time.process_time()
            way()
            seconds.append(time.process_time() - start)
        ratio = (seconds[1] + seconds[3]) / (seconds[0] + seconds[2])
        results[what] = {"ratio": ratio, "peak": above}
        if not objectives:
            results[what]["errors"] = problem.errors(found)
    return results


def main() -> int:
    """Run all ways in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of verl and Liger")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(options.peers))
    if options.variant:
        try:
            print(json.dumps(run_one(options)))
        except ModuleNotFoundError as error:
            print(json.dumps({what: {"missing": error.name} for what in PASSES}))
        return 0
    names = ["probe", *OTHERS]
    found: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, rounds in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocabulary}, {options.dtype}:"
    )
    print("time / bare products, peak MB\n")
    print("| | " + " | ".join(PASSES) + " | largest error of l, h |")
    print("|---" * (2 + len(PASSES)) + "|")
    for name in names:
        cells = [_cell([one[what] for one in found[name]]) for what in PASSES]
        errors = [one["score"]["errors"] for one in found[name] if "errors" in one["score"]]
        cells.append(", ".join(f"{max(e):.1e}" for e in zip(*errors, strict=True)))
        print(f"| {name} | " + " | ".join(cells) + " |")
    return 0


def _cell(rounds: list[dict[str, Any]]) -> str:
    """What was measured in all rounds, or which module is missing."""
    missing = {r["missing"] for r in rounds if "missing" in r}
    if missing:
        return f"missing: {', '.join(sorted(missing))}"
    ratio, peak = (statistics.median(r[key] for r in rounds) for key in ("ratio", "peak"))
    return f"{ratio:.2f}, {peak:.0f}"


if __name__ == "__main__":
    sys.exit(main())
