from __future__ import annotations

import math

import pytest
import torch

from probe.errors.exceptions import DataError
from probe.estimators.advantages import combined_advantages, count_zero_advantage_groups, group_advantages


def naive(rewards: list[float], group: list[int], kind: str) -> list[float]:
    out = []
    for reward, own in zip(rewards, group, strict=True):
        members = [r for r, g in zip(rewards, group, strict=True) if g == own]
        mean = math.fsum(members) / len(members)
        if kind == "dr_grpo":
            out.append(reward - mean)
            continue
        spread, centre = members, mean
        if kind == "batch":
            spread, centre = rewards, math.fsum(rewards) / len(rewards)
        variance = math.fsum((r - centre) ** 2 for r in spread) / max(len(spread) - 1, 1)
        out.append((reward - mean) / (math.sqrt(variance) + 1e-4))
    return out


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "batch"])
def test_against_a_naive_loop_with_scattered_groups_of_different_size(kind):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(40, generator=generator, dtype=torch.float64)
    group = torch.randint(-3, 6, (40,), generator=generator)
    expected = torch.tensor(naive(rewards.tolist(), group.tolist(), kind), dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, group, kind), expected, rtol=1e-13, atol=1e-13)


def test_grpo_equals_torch_std_per_group():
    rewards = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.5, -1.0]])
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    found = group_advantages(rewards.flatten(), torch.tensor([0, 0, 0, 1, 1, 1]), "grpo")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.flatten().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_equal_rewards_give_exactly_zero_and_the_group_is_kept(kind):
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0] * 7 + [1, 1])
    advantages = group_advantages(rewards, group, kind)
    assert advantages.shape == (9,)
    assert advantages[:7].tolist() == [0.0] * 7
    assert count_zero_advantage_groups(advantages, group) == 1


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_group_of_one_has_advantage_zero(kind):
    assert group_advantages(torch.tensor([5.0, -2.0]), torch.tensor([1, 2]), kind).tolist() == [0.0, 0.0]


def test_count_needs_every_advantage_of_a_group_to_be_zero():
    advantages = torch.tensor([0.0, 0.0, 0.0, 1e-30, -1.0, 1.0])
    assert count_zero_advantage_groups(advantages, torch.tensor([0, 0, 1, 1, 2, 2])) == 1
    assert count_zero_advantage_groups(torch.zeros(3), torch.tensor([4, 5, 4])) == 2


def test_empty_batch():
    empty = torch.empty(0)
    group = torch.empty(0, dtype=torch.int64)
    assert group_advantages(empty, group, "grpo").shape == (0,)
    assert count_zero_advantage_groups(empty, group) == 0


def test_shape_mismatch():
    with pytest.raises(ValueError, match=r"rewards and group: expected two .* found \(3,\) and \(2,\)"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64), "grpo")
    with pytest.raises(ValueError, match=r"found \(2, 2\) and \(2, 2\)"):
        group_advantages(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64), "grpo")
    with pytest.raises(ValueError, match=r"advantages and group: .* found \(1,\) and \(2,\)"):
        count_zero_advantage_groups(torch.zeros(1), torch.zeros(2, dtype=torch.int64))


def test_group_has_to_be_integers():
    with pytest.raises(ValueError, match=r"group: expected integers, found torch\.float32"):
        group_advantages(torch.zeros(2), torch.zeros(2), "grpo")


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind: expected one of grpo, dr_grpo, batch, found 'gae'"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "gae")


@pytest.mark.parametrize("bad", [-math.inf, math.inf])
def test_non_finite_reward_names_the_index(bad):
    with pytest.raises(DataError, match=rf"rewards: expected finite numbers, found {bad} at index 1"):
        group_advantages(torch.tensor([0.0, bad]), torch.tensor([0, 0]), "grpo")


def test_a_reward_of_nan_is_left_out_and_has_advantage_zero():
    rewards = torch.tensor([1.0, math.nan, 4.0, 2.0, math.nan, math.nan, 5.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    there = ~rewards.isnan()
    for kind in ("grpo", "dr_grpo", "batch"):
        found = group_advantages(rewards, group, kind)
        assert found[~there].tolist() == [0.0] * 3
        expected = naive(rewards[there].tolist(), group[there].tolist(), kind)
        torch.testing.assert_close(found[there], torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(DataError, match="found inf at index 0"):
        group_advantages(torch.tensor([math.inf]), torch.tensor([0]), "grpo")


def test_several_rewards_are_normalised_before_or_after_they_are_added_up():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    rewards[1, 0] = rewards[5, 2] = rewards[7] = math.nan
    group, weights = torch.arange(3).repeat_interleave(4), [1.0, 0.5, -2.0]
    total = [
        math.nan
        if all(map(math.isnan, row))
        else sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))
        for row in rewards.tolist()
    ]
    found, advantages = combined_advantages(rewards, weights, group, "grpo", "sum_then_normalize")
    torch.testing.assert_close(found, torch.tensor(total, dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(advantages, group_advantages(found, group, "grpo"))

    parts = torch.full((12, 3), math.nan, dtype=torch.float64)
    for k in range(3):
        for g in range(3):
            rows = [i for i in range(4 * g, 4 * g + 4) if not math.isnan(rewards[i, k])]
            values = rewards[rows, k]
            parts[rows, k] = (values - values.mean()) / (values.std() + 1e-4)
    sums = (parts * torch.tensor(weights, dtype=torch.float64)).nansum(1)
    there = ~parts.isnan().all(1)
    expected = torch.where(there, (sums - sums[there].mean()) / (sums[there].std() + 1e-4), 0.0)
    found, advantages = combined_advantages(rewards, weights, group, "dr_grpo", "normalize_then_sum")
    torch.testing.assert_close(found, torch.tensor(total, dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(advantages, expected)
    with pytest.raises(ValueError, match="expected 3, one for each reward, found 2"):
        combined_advantages(rewards, [1.0, 2.0], group, "grpo", "sum_then_normalize")
    with pytest.raises(ValueError, match="expected one of sum_then_normalize"):
        combined_advantages(rewards, None, group, "grpo", "sum")
