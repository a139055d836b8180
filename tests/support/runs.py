"""Runs of the whole probe on tiny checkpoints, and what they must leave as it was."""

from __future__ import annotations

import json

import torch

from probe import OfflineEntropyProbe


def digits(prompts, completions, **columns):
    """A reward: how many digits the completion has."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def number_prompts(folder):
    """A file of 40 prompts with their answers in a folder."""
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(40))
    )
    return path


def small_config(checkpoint, prompts):
    """A run of a tiny checkpoint that takes a second and writes nothing."""
    return {
        "checkpoint": {"checkpoint_path": str(checkpoint)},
        "batch_config": {
            "dataset_name": str(prompts),
            "split": "train",
            "reward": "tests.support.runs:digits",
            "B_E": 24,
            "B_U": 4,
            "G": 4,
        },
        "generation": {"max_new_tokens": 8, "batch_size": 64},
        "memory_config": {"microbatch_size": 8},
        "detailed_logging": {"enabled": False},
        "trainer": {"accelerator": "cpu", "logger": False},
    }


def changed(config, **sections):
    return {**config, **{name: {**config.get(name, {}), **keys} for name, keys in sections.items()}}


def run(config, **sections):
    return OfflineEntropyProbe(changed(config, **sections)).run_mixed_probe()


def numbers(results):
    """The results without what depends on time, place, or on how the settings were given."""
    left_out = ("timing", "throughput", "checkpoint_path", "training_step", "settings")
    return {k: v for k, v in results.items() if k not in left_out}


def fingerprint(probe):
    """Everything a run must leave as it was."""
    module = probe._module
    return (
        {n: p.detach().clone() for n, p in module.named_parameters()},
        {n: p.grad for n, p in module.named_parameters()},
        {n: p.requires_grad for n, p in module.named_parameters()},
        {n: m.training for n, m in module.named_modules()},
        {
            k: {a: b.clone() for a, b in s.items()}
            for k, s in module.optimizer.optimizer.state_dict()["state"].items()
        },
        [{k: v for k, v in g.items() if k != "params"} for g in module.optimizer.optimizer.param_groups],
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def owner(key):
    """`deltaH_true_se` belongs to `deltaH_true`."""
    for ending in ("_se", "_ci95", "_df", "_sd_U"):
        key = key.removesuffix(ending)
    return key
