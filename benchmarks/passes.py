"""Time and memory of the model passes against the plain way: full logits of the whole microbatch, and autograd.

Each variant runs in a process of its own (so that peak memory is its own), variants in turn, several rounds; reported
are the medians of paired ratios. Prints a Markdown table.

    python benchmarks/passes.py [--rounds 5] [--hidden 256] [--vocabulary 65536] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from probe.data.batch import RolloutBatch
from probe.scoring import Policy, score_tokens, token_gradients

VARIANTS = ("load only", "score: full logits", "score: probe", "gradient: full logits", "gradient: probe")
SEQUENCES, PROMPT, RESPONSE, LAYERS = 8, 64, 192, 2


def setup(hidden: int, vocabulary: int) -> tuple[Qwen2ForCausalLM, RolloutBatch]:
    """A random model and a batch."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    ).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "v_proj" in name)
    ids = torch.randint(0, vocabulary, (SEQUENCES, PROMPT + RESPONSE))
    batch = RolloutBatch(
        prompts=("",) * SEQUENCES,
        completions=("",) * SEQUENCES,
        prompt_ids=tuple(tuple(row) for row in ids[:, :PROMPT].tolist()),
        completion_ids=ids[:, PROMPT:],
        mask=torch.ones(SEQUENCES, RESPONSE, dtype=torch.bool),
        truncated=torch.zeros(SEQUENCES, dtype=torch.bool),
        group=torch.arange(SEQUENCES),
    )
    return model, batch


def full_logits(model: Qwen2ForCausalLM, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies as trainers compute them: log_softmax of all response logits at once."""
    ids = torch.cat([torch.tensor(batch.prompt_ids), batch.completion_ids], dim=1)
    logits = model(input_ids=ids[:, :-1], logits_to_keep=RESPONSE, use_cache=False).logits.float()
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def run_variant(name: str, hidden: int, vocabulary: int) -> dict[str, float]:
    """Seconds of the second of two calls, and the process's peak memory in MB."""
    model, batch = setup(hidden, vocabulary)
    policy = Policy(model, microbatch_size=SEQUENCES)

    def once() -> None:
        if name == "score: full logits":
            with torch.no_grad():
                full_logits(model, batch)
        elif name == "score: probe":
            score_tokens(policy, batch)
        elif name == "gradient: full logits":
            l, h = full_logits(model, batch)
            torch.autograd.grad((l + h).sum(), list(policy.parameters.values()))
        elif name == "gradient: probe":
            token_gradients(
                policy, batch, lambda i, t, l, h: (torch.ones(1, len(l)), torch.ones(1, len(l))), 1
            )

    once()
    start = time.perf_counter()
    once()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> int:
    """Run all variants in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant:
        print(json.dumps(run_variant(options.variant, options.hidden, options.vocabulary)))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    idle = statistics.median(r["peak"] for r in found["load only"])
    print(
        f"{SEQUENCES} x ({PROMPT} + {RESPONSE}) tokens, hidden {options.hidden}, vocabulary {options.vocabulary}"
    )
    print("\n| pass | time / full logits | peak memory above the loaded model, MB (full logits) |")
    print("|---|---|---|")
    for kind in ("score", "gradient"):
        ours, plain = found[f"{kind}: probe"], found[f"{kind}: full logits"]
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, plain, strict=True))
        memory = [statistics.median(r["peak"] for r in rs) - idle for rs in (ours, plain)]
        print(f"| {kind} | {ratio:.2f} | {memory[0]:.0f} ({memory[1]:.0f}) |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
