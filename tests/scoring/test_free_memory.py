"""What a gradient keeps is counted, and bounded by the memory that is there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from probe.scoring import free_memory, tuning
from probe.scoring.free_memory import kept_per_position
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.tuning import DEFAULT_TOKENS, tuned
from tests.scoring.test_prompts import groups
from tests.support.enumerable import ragged_batch
from tests.support.tiny_models import tiny_model


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Free bytes of the machine, and files of a container."""

    def use(available, **files):
        monkeypatch.setattr(
            free_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available)
        )
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_D_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(free_memory, "CGROUPS", tmp_path)
        return free_memory.free_memory()

    return use


def test_without_a_container_it_is_the_machines(machine):
    assert machine(1000) == 1000


@pytest.mark.parametrize(
    ("limit", "free"), [("max\n", 1000), ("700\n", 700 - 600 + 50), ("500\n", 0), ("90000\n", 1000)]
)
def test_a_containers_limit_counts(machine, limit, free):
    files = {
        "memory_D_max": limit,
        "memory_D_current": "600\n",
        "memory_D_stat": "anon 550\ninactive_file 50\n",
    }
    assert machine(1000, **files) == free


def test_a_containers_limit_of_version_1_counts(machine):
    files = {
        "memory__memory_D_limit_in_bytes": "700\n",
        "memory__memory_D_usage_in_bytes": "600\n",
        "memory__memory_D_stat": "cache 80\ntotal_inactive_file 20\n",
    }
    assert machine(1000, **files) == 120


class Wide(nn.Module):
    """Keeps one tensor of `width` float32 numbers for each position, and its weights."""

    def __init__(self, width):
        super().__init__()
        self.inner = tiny_model()
        self.config, self.width = self.inner.config, width
        self.wide = nn.Linear(self.config.hidden_size, width, bias=False)

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        embedded = self.get_input_embeddings()(input_ids)
        hidden = embedded + self.wide(embedded).tanh().mean(-1, keepdim=True)
        logits = self.get_output_embeddings()(hidden)
        return SimpleNamespace(logits=logits)


def test_what_is_kept_is_counted_once_and_weights_are_not():
    """Of a wider layer, so many bytes more: tanh keeps its output."""
    small, large = (
        kept_per_position(Policy(Wide(w), share_prompts=False), ragged_batch()) for w in (64, 4064)
    )
    assert large - small == pytest.approx(4 * 4000, rel=0.01)


def test_gradients_are_bounded_and_nothing_else(monkeypatch):
    policy, batch = Policy(tiny_model().eval(), microbatch_size=None), groups(lengths=(4, 9, 7))
    batch = replace(batch, prompt_ids=tuple(tuple(t % 30 for t in ids) for ids in batch.prompt_ids))
    batch = replace(batch, completion_ids=batch.completion_ids % 30)

    def constants(i, t, l, h):
        return torch.ones(1, len(l)), torch.ones(1, len(l))

    (expected,), _ = token_gradients(policy, batch, constants, 1)
    assert tuned(policy, batch, threads=1).tokens == DEFAULT_TOKENS
    assert policy.traffic.room == {}  # there is enough
    kept = kept_per_position(policy, batch)
    monkeypatch.setattr(
        tuning.bound_by_free_memory.__globals__["psutil"],
        "virtual_memory",
        lambda: SimpleNamespace(available=60 * kept),
    )
    assert tuned(policy, batch, threads=1).tokens == DEFAULT_TOKENS
    assert set(policy.traffic.room) == {"backward"}
    assert policy.traffic.room["backward"] == pytest.approx(30, rel=0.5)
    assert len(policy.split(batch, "backward")) > len(policy.split(batch)) == 1
    (found,), _ = token_gradients(policy, batch, constants, 1)
    for name in expected:
        assert float((found[name] - expected[name]).norm()) <= 1e-4 * float(expected[name].norm())
    larger = Policy(policy.model, microbatch_size=None)
    monkeypatch.setattr(tuning, "TRIAL_SHARE", 1e6)
    monkeypatch.setattr(tuning, "_seconds", lambda policy, batch: 1 / policy.tokens_per_microbatch)
    of_machine = SimpleNamespace(available=2 * 3000 * kept)
    monkeypatch.setattr(
        tuning.bound_by_free_memory.__globals__["psutil"], "virtual_memory", lambda: of_machine
    )
    assert tuned(larger, batch, threads=1).tokens > DEFAULT_TOKENS
    assert larger.traffic.room["backward"] == pytest.approx(3000, rel=0.5)  # of the budget that was chosen
    fixed = Policy(policy.model, microbatch_size=4)
    tuned(fixed, batch, threads=1)
    assert fixed.traffic.room == {}  # what a user has chosen is tried
