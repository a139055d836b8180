"""What control variates carry from batch to batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import probe.phases.fit_memory as module
from probe.errors.exceptions import DataError
from probe.estimators.control_variates import FitStatistics
from probe.phases.fit_memory import FitMemory, fingerprint, read_fit_memory, write_fit_memory
from probe.scoring.features import FeatureBasis
from tests.support.enumerable import all_sequences


def basis():
    g = torch.Generator().manual_seed(0)
    return FeatureBasis(torch.randn(4, 3, generator=g), torch.randn(8, 2, generator=g))


def statistics(k):
    return FitStatistics(
        torch.full((2, 2), float(k)).double(), torch.full((2, 2), -float(k)).double(), 10.0 * k
    )


def batches(n):
    """Batches that differ in their first sequence."""
    every = all_sequences()
    return [every.subset(torch.tensor([k, 7, 8])) for k in range(n)]


def test_a_batch_never_learns_from_itself():
    first, second, third = batches(3)
    memory = FitMemory(basis(), "policy")
    assert memory.earlier_than(first) == []
    memory = memory.with_batch(first, statistics(1))
    memory = memory.with_batch(second, statistics(2))
    assert [s.tokens for s in memory.earlier_than(first)] == [20.0]
    assert [s.tokens for s in memory.earlier_than(second)] == [10.0]
    assert [s.tokens for s in memory.earlier_than(third)] == [10.0, 20.0]
    memory = memory.with_batch(
        first, statistics(3)
    )  # again, with another step: it takes the place of the earlier one
    assert sorted(s.tokens for s in memory.earlier_than(third)) == [20.0, 30.0]


def test_a_larger_batch_of_the_same_draw_is_the_same_draw():
    every = all_sequences()
    small, large = every.subset(torch.tensor([3, 7])), every.subset(torch.tensor([3, 7, 9, 11, 2]))
    assert fingerprint(small) == fingerprint(large)
    memory = FitMemory(basis(), "policy")
    memory = memory.with_batch(small, statistics(1))
    assert memory.earlier_than(large) == []
    for other in (
        every.subset(torch.tensor([3, 8])),
        every.subset(torch.tensor([7, 3])),
        replace(small, prompt_ids=((0, 1), (0, 2))),
    ):
        assert fingerprint(other) != fingerprint(small)
    padded = replace(
        small,
        completion_ids=torch.nn.functional.pad(small.completion_ids, (0, 2), value=3),
        mask=torch.nn.functional.pad(small.mask, (0, 2)),
    )
    assert fingerprint(padded) == fingerprint(small)


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "folder" / "memory.safetensors"
    path.parent.mkdir()
    assert read_fit_memory(path, "policy") is None
    memory = FitMemory(basis(), "policy")
    for k, batch in enumerate(batches(3), start=1):
        memory = memory.with_batch(batch, statistics(k))
    write_fit_memory(path, memory)
    found = read_fit_memory(path, "policy")
    assert torch.equal(found.basis.tokens, memory.basis.tokens)
    assert torch.equal(found.basis.directions, memory.basis.directions)
    assert list(found.batches) == list(memory.batches)
    for name, expected in memory.batches.items():
        assert torch.equal(found.batches[name].gram, expected.gram)
        assert torch.equal(found.batches[name].cross, expected.cross)
        assert found.batches[name].gram.dtype == torch.float64
        assert found.batches[name].tokens == expected.tokens
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_oldest_batches_go_first(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_MEMORY", 3)
    memory, some = FitMemory(basis(), "policy"), batches(5)
    for k, batch in enumerate(some, start=1):
        memory = memory.with_batch(batch, statistics(k))
    assert [s.tokens for s in memory.batches.values()] == [30.0, 40.0, 50.0]


def test_refusals(tmp_path):
    path = tmp_path / "memory.safetensors"
    write_fit_memory(path, FitMemory(basis(), "one"))
    with pytest.raises(
        DataError, match=r"control_variates_path: expected a file of the policy two, found one of one"
    ):
        read_fit_memory(path, "two")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="control_variates_path: cannot read"):
        read_fit_memory(path, "one")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(
        DataError, match="expected a file of the format entropy-probe/control-variates/1, found None"
    ):
        read_fit_memory(path, "one")
    with pytest.raises(DataError, match="cannot read"):
        read_fit_memory(tmp_path, "one")
