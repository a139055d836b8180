"""The torchmetrics: streaming, reducing over ranks, and use in a training loop."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.multiprocessing as mp

from probe.estimators.ground_truth import reweighted_change
from probe.metrics import EntropyChange, PolicyEntropy
from probe.scoring import TokenScores


def draw(B=23, T=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    mask[0] = True
    l, h, dl, dh = (torch.randn(B, T, generator=g, dtype=torch.float64) * mask for _ in range(4))
    old = TokenScores(l, h.abs(), mask)
    return old, TokenScores(l + 0.1 * dl, (h + 0.1 * dh).abs(), mask), torch.arange(B) // 2


def part(scores, rows):
    """Some sequences, as narrow as they can be."""
    width = int(scores.mask[rows].sum(1).max())
    return TokenScores(scores.logprob[rows, :width], scores.entropy[rows, :width], scores.mask[rows, :width])


def feed(entropy, change, old, new, group, rows):
    a, b = part(old, rows), part(new, rows)
    entropy.update(a.entropy, a.mask)
    change.update(a, b, group[rows])


def numbers(*metrics):
    return {name: float(v) for metric in metrics for name, v in metric.compute().items()}


@pytest.mark.parametrize("reported", ["per_decision", "snis"])
def test_streaming_over_microbatches_is_one_call(reported):
    old, new, group = draw()
    entropy, change = PolicyEntropy(), EntropyChange(reported)
    for rows in torch.randperm(23, generator=torch.Generator().manual_seed(1)).split([1, 6, 2, 5, 9]):
        feed(entropy, change, old, new, group, rows)
    found = numbers(entropy, change)
    truth = reweighted_change(old, new, group, reported)
    assert found == pytest.approx(
        {
            "H": truth.H_orig.sequence.value,
            "H_tok": truth.H_orig.token.value,
            "deltaH": truth.change.sequence.value,
            "deltaH_se": truth.change.sequence.se,
            "deltaH_tok": truth.change.token.value,
            "deltaH_tok_se": truth.change.token.se,
            "ESS": truth.weights.ess,
        },
        rel=1e-12,
    )
    in_order = EntropyChange(reported)
    for rows in torch.arange(23).split(4):
        in_order.update(part(old, rows), part(new, rows), group[rows])
    whole = EntropyChange(reported)
    whole.update(old, new, group)
    assert numbers(in_order) == numbers(whole)  # the same sums in the same order: to the last bit
    details = whole.ground_truth()
    assert details.estimates.keys() == {"snis", "per_decision"}
    assert details.reported == reported
    assert torch.equal(details.scores_new.entropy, new.entropy)


def test_clipping_is_passed_on():
    old, new, group = draw()
    change = EntropyChange(clip=0.1)
    change.update(old, new, group)
    truth = change.ground_truth()
    assert truth.clipped_fraction > 0.1
    assert "snis_clipped" in truth.estimates


def test_reset_forgets():
    old, new, group = draw()
    entropy, change = PolicyEntropy(), EntropyChange()
    feed(entropy, change, old, new, group, torch.arange(23))
    first = numbers(entropy, change)
    rows = torch.arange(10)
    for metric in (entropy, change):
        metric.reset()
    feed(entropy, change, old, new, group, rows)
    second = numbers(entropy, change)
    assert second["deltaH"] == pytest.approx(
        reweighted_change(part(old, rows), part(new, rows), group[rows]).change.sequence.value
    )
    assert second["H"] != first["H"]


def test_calling_gives_the_batch_and_adds_to_the_whole():
    """`metric(...)` as Lightning's training loops use it."""
    old, new, group = draw()
    entropy, change = PolicyEntropy(), EntropyChange()
    for rows in torch.arange(23).split(8):
        a, b = part(old, rows), part(new, rows)
        alone = entropy(a.entropy, a.mask)
        assert float(alone["H"]) == pytest.approx(float(a.sequence_entropy.mean()))
        alone = change(a, b, group[rows])
        assert float(alone["deltaH"]) == pytest.approx(
            reweighted_change(a, b, group[rows]).change.sequence.value
        )
    whole = PolicyEntropy(), EntropyChange()
    feed(*whole, old, new, group, torch.arange(23))
    assert numbers(entropy, change) == pytest.approx(numbers(*whole), rel=1e-12)


def test_values_are_what_a_logger_takes():
    """Scalars by name, in float64; copies and half-precision masks do no harm."""
    old, new, group = draw()
    entropy, change = PolicyEntropy(), EntropyChange()
    feed(entropy, change, old, new, group, torch.arange(23))
    for metric in (entropy, change):
        for value in metric.compute().values():
            assert value.shape == ()
            assert value.dtype == torch.float64
        assert numbers(copy.deepcopy(metric)) == numbers(metric)
    assert set(change.compute()) == {"deltaH", "deltaH_se", "deltaH_tok", "deltaH_tok_se", "ESS"}


def test_refusals():
    old, new, group = draw()
    with pytest.raises(ValueError, match="same batch"):
        EntropyChange().update(old, part(new, torch.arange(3)), group)


def one_rank(rank, world, init, updates, out):
    """What a process of a distributed run does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=init, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    try:
        old, new, group = draw()
        entropy, change = PolicyEntropy(), EntropyChange("snis")
        for rows in updates[rank]:
            feed(entropy, change, old, new, group, torch.tensor(rows))
        before = [x.clone() for x in change.rows]
        found = numbers(entropy, change)
        truth = change.ground_truth()
        found["ground_truth"] = truth.change.token.value
        found["sequences"] = len(truth.scores_new.mask)
        assert all(torch.equal(a, b) for a, b in zip(before, change.rows, strict=True))  # back to its own
        torch.save(found, f"{out}.{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_numbers_of_updates_are_one(tmp_path):
    updates = [[[0, 1, 2, 3], [4, 5], [10, 11, 6, 7, 8, 9], [20, 21, 22]], [[12, 13, 14, 15, 16, 17, 18, 19]]]
    mp.spawn(
        one_rank, args=(2, f"file://{tmp_path}/store", updates, str(tmp_path / "found")), nprocs=2, join=True
    )
    old, new, group = draw()
    entropy, change = PolicyEntropy(), EntropyChange("snis")
    feed(entropy, change, old, new, group, torch.arange(23))
    expected = numbers(entropy, change)
    expected |= {"ground_truth": expected["deltaH_tok"], "sequences": 23}
    for rank in range(2):
        assert torch.load(f"{tmp_path}/found.{rank}") == pytest.approx(expected, rel=1e-12)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="of one shape"):
        PolicyEntropy().update(torch.rand(4, 5), torch.ones(4, 1, dtype=torch.bool))
