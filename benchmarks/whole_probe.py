"""What a whole probe costs, in units of one plain forward and backward over E and U.

The unit is what a trainer pays for the same tokens in the same microbatches: transformers' own logits over the whole
vocabulary, log-prob and entropy from their log-softmax, and one backward to the trainable weights. Probe and unit take
turns in one process on one thread; a phase's cost is the median of paired ratios. Sampling is left out on both sides;
the first scoring of E, which belongs to the phase `sample`, has a row of its own.

    python benchmarks/whole_probe.py [--policy demo|large] [--B_E 256] [--rounds 5] [--derivative_mode auto]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.files import read_config_file
from probe.data.batch import RolloutBatch
from probe.module import EntropyProbe
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.snapshot import evaluation_mode, one_thread
from tests.support.loaded import loaded_probe

LARGE = {"hidden_size": 896, "num_hidden_layers": 6, "vocab_size": 151_936, "intermediate_size": 4864}
"""The shape of a small Qwen2 with its vocabulary, and fewer layers."""


def even_length(completions: list[str], **_: Any) -> list[float]:
    """A reward that a random policy gets half of the time, so that its update is one."""
    return [float(len(text) % 2 == 0) for text in completions]


def plain_pass(policy: Policy, batch: RolloutBatch) -> None:
    """Forward and backward as a trainer does them, microbatch by microbatch."""
    parameters = list(policy.parameters.values())
    totals = [torch.zeros_like(p) for p in parameters]
    for inputs in replace(policy, share_prompts=False).microbatches(batch):
        first = int(inputs.column.min())
        logits = policy.model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            logits_to_keep=inputs.input_ids.shape[1] - first,
            use_cache=False,
        ).logits.float()
        logp = torch.log_softmax(logits / policy.temperature, dim=-1)
        chosen = logp[inputs.row, inputs.column - first]
        value = chosen.gather(-1, inputs.labels.unsqueeze(-1)).sum() - (chosen.exp() * chosen).sum()
        for total, grad in zip(totals, torch.autograd.grad(value, parameters), strict=True):
            total += grad


def phases(module: EntropyProbe, sample: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The phases after sampling, each with what it needs of those before."""
    found: dict[str, Any] = {}

    def keep(name: str, compute: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            found[name] = compute()
            return found[name]

        return run

    yield "entropy gradient", keep("X", lambda: module.entropy_gradient(sample))
    yield "update", keep("update", lambda: module.update(sample))
    yield "prediction", keep("predicted", lambda: module.prediction(sample, found["X"], found["update"]))
    yield "ground truth", lambda: module.ground_truth(sample, found["update"], found["predicted"])
    memory = sample.controls.memory
    basis = None if memory is None else memory.basis
    yield "score E", lambda: score_tokens(module.policy, sample.E, basis=basis)


def measure(module: EntropyProbe, rounds: int) -> Mapping[str, list[float]]:
    """Seconds of each phase over those of the unit around it, per round; the first round only warms up."""
    ratios: dict[str, list[float]] = {}
    with evaluation_mode(module):
        sample = module.sample()
        tokens = int(sample.E.mask.sum()), int(sample.U.mask.sum())
        print(f"E: {len(sample.E)} responses, {tokens[0]} tokens; U: {len(sample.U)}, {tokens[1]} tokens")
        for round_number in range(rounds + 1):
            before = _seconds(lambda: _unit(module.policy, sample))
            spent = {name: _seconds(compute) for name, compute in phases(module, sample)}
            unit = (before + _seconds(lambda: _unit(module.policy, sample))) / 2
            if round_number:
                for name, seconds in spent.items():
                    ratios.setdefault(name, []).append(seconds / unit)
    return ratios


def _unit(policy: Policy, sample: Any) -> None:
    """One plain pass over E and U."""
    plain_pass(policy, sample.E)
    plain_pass(policy, sample.U)


def _seconds(compute: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def large_checkpoint(folder: Path, shape: Mapping[str, int] = LARGE, heads: int = 14) -> Path:
    """A random LoRA policy of a shape, with the demo's tokenizer and a fresh Adam state."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from probe.data.arithmetic import vocabulary_texts
    from probe.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(vocabulary_texts())
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **shape,
            num_attention_heads=heads,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with (
        torch.no_grad()
    ):  # a policy that mostly chooses among the tokenizer's words and still has all of the others
        weight = model.get_input_embeddings().weight
        weight[: len(tokenizer)] *= 7.0
        weight[len(tokenizer) :] *= 0.2
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), low_cpu_mem_usage=False
    )
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=1e-3)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    for p in trainable:
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "checkpoint" / "optimizer.pt")
    return folder / "checkpoint"


def main() -> int:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=("demo", "large"), default="demo")
    parser.add_argument("--B_E", type=int, help="responses in E")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--derivative_mode", default="auto")
    options = parser.parse_args()
    config = dict(read_config_file("quickstart"))
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        if options.policy == "large":
            path = large_checkpoint(Path(scratch))
            config["checkpoint"] = {"checkpoint_path": str(path)}
            config["batch_config"] = {
                **config["batch_config"],
                "B_E": 256,
                "B_U": 8,
                "G": 4,
                "reward": "whole_probe:even_length",
            }
            config["generation"] = {**config["generation"], "max_new_tokens": 5}
            config["memory_config"] = {"microbatch_size": 16}
        if options.B_E is not None:
            config["batch_config"] = {**config["batch_config"], "B_E": options.B_E}
        config["probe_rework"] = {**config["probe_rework"], "derivative_mode": options.derivative_mode}
        ratios = measure(loaded_probe(config), options.rounds)
    found = {name: statistics.median(values) for name, values in ratios.items()}
    counted = [name for name in found if name != "score E"]
    whole = statistics.median(sum(ratios[name][k] for name in counted) for k in range(options.rounds))
    print("\n| phase | units |\n|---|---|")
    for name, ratio in found.items():
        print(f"| {name} | {ratio:.2f} |")
    print(f"| **whole probe after sampling and scoring E** | **{whole:.2f}** |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
