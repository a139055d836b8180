"""Time and memory of scoring and forward mode for long responses: attention in blocks of queries against all at once.

Each measurement is a process of its own (so that peak memory is its own) and is allowed 8 GiB; variants in turn, some
rounds. `at once` is torch's math kernel on all queries, `own` the kernel of the model, which has no forward mode.

    python benchmarks/long_responses.py [--rounds 3] [--lengths 256 1024 4096 8192]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from process_memory import peak
from transformers import Qwen2Config, Qwen2ForCausalLM

from probe.data.batch import RolloutBatch
from probe.errors.memory import is_out_of_memory
from probe.scoring import Policy, attention, score_tokens
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.forward_mode import forward_tangents

VARIANTS = {
    "score": ("own", "at once", "in blocks"),
    "forward mode": ("at once", "in blocks"),
}
HIDDEN, LAYERS, HEADS, VOCABULARY, PROMPT = 256, 4, 4, 8192, 16
ALLOWED = 8 * 2**30
"""Bytes that a measurement may take."""


def setup(length: int) -> tuple[Policy, RolloutBatch]:
    """A random policy, and one response."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=PROMPT + length,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "v_proj" in name)
    ids = torch.randint(0, VOCABULARY, (PROMPT + length,))
    batch = RolloutBatch(
        prompts=("",),
        completions=("",),
        prompt_ids=(tuple(ids[:PROMPT].tolist()),),
        completion_ids=ids[None, PROMPT:],
        mask=torch.ones(1, length, dtype=torch.bool),
        truncated=torch.ones(1, dtype=torch.bool),
        group=torch.zeros(1, dtype=torch.int64),
    )
    return Policy(model, microbatch_size=1), batch


def measure(what: str, variant: str, length: int) -> dict[str, float | None]:
    """Seconds, and peak memory beyond what was there before in bytes; None where it is more than is allowed."""
    torch.set_num_threads(1)
    if variant == "at once":
        attention.WHOLE = 10**9
    policy, batch = setup(length)
    step = {n: 1e-3 * torch.randn_like(p) for n, p in policy.parameters.items()}
    few = setup(32)[1]

    def run(on: RolloutBatch) -> None:
        if what == "forward mode":
            forward_tangents(policy, on, step)
            return
        with nullcontext() if variant == "own" else forward_mode_kernels(policy.model):
            score_tokens(policy, on)

    run(few)  # what is loaded and compiled on the way is not the pass's own
    before = peak()
    resource.setrlimit(resource.RLIMIT_DATA, (ALLOWED, ALLOWED))
    start = time.process_time()
    try:
        run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"seconds": None, "bytes": None}
    seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": 2**20 * (peak() - before)}


def in_own_process(what: str, variant: str, length: int) -> dict[str, float | None]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, variant, str(length)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def table(rounds: int, lengths: list[int]) -> list[str]:
    """The table, a line each."""
    lines = [
        "| | response tokens | ms per token | ratio of times to at once | peak memory, MB | kB per token |",
        "|---|---|---|---|---|---|",
    ]
    for what, variants in VARIANTS.items():
        for length in lengths:
            found: dict[str, list[dict[str, float | None]]] = {variant: [] for variant in variants}
            for _ in range(rounds):
                for variant in variants:
                    found[variant].append(in_own_process(what, variant, length))
            for variant, runs in found.items():
                lines.append(f"| {what}, {variant} | {length:,} | {_cells(runs, found['at once'], length)} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def _cells(runs: list[dict[str, float | None]], base: list[dict[str, float | None]], length: int) -> str:
    """Medians of one variant at one length."""
    seconds, memory = ([run[key] for run in runs] for key in ("seconds", "bytes"))
    if None in seconds:
        return "does not fit into 8 GiB | | |"
    others = [run["seconds"] for run in base]
    pairs = zip(seconds, others, strict=True)
    ratio = "" if None in others else f"{statistics.median(a / b for a, b in pairs):.2f}"  # type: ignore[operator]
    peak = statistics.median(memory)  # type: ignore[type-var]
    each = 1e3 * statistics.median(seconds) / length  # type: ignore[type-var,operator]
    return f"{each:.2f} | {ratio} | {peak / 1e6:.0f} | {peak / 1e3 / length:.0f}"  # type: ignore[operator]


def main() -> int:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, variant, length = options.measure
        print(json.dumps(measure(what, variant, int(length))))
        return 0
    print("\n".join(table(options.rounds, options.lengths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
