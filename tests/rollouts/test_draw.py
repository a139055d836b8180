from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from probe.errors.exceptions import DataError
from probe.rollouts.draw import draw_prompts


def test_sizes_ranges_and_disjointness():
    E, U = draw_prompts(50, B_E=200, B_U=20, disjoint=True, seed=1)
    assert (len(E), len(U)) == (200, 20)
    assert len(set(U)) == 20
    assert not set(E) & set(U)
    assert set(E) | set(U) <= set(range(50))
    assert all(type(index) is int for index in E + U)


def test_same_seed_same_batches_and_other_seed_other_batches():
    assert draw_prompts(100, 30, 10, True, seed=5) == draw_prompts(100, 30, 10, True, seed=5)
    first, second = draw_prompts(100, 30, 10, True, seed=5), draw_prompts(100, 30, 10, True, seed=6)
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("disjoint", [True, False])
def test_larger_batches_extend_smaller_ones(disjoint):
    E, U = draw_prompts(100, 1000, 10, disjoint, seed=2)
    small_E, same_U = draw_prompts(100, 16, 10, disjoint, seed=2)
    assert same_U == U
    assert E[:16] == small_E
    _, large_U = draw_prompts(100, 16, 30, disjoint, seed=2)
    assert large_U[:10] == U


def test_larger_u_only_takes_draws_out_of_e():
    E, _ = draw_prompts(100, 40, 10, disjoint=True, seed=2)
    other_E, large_U = draw_prompts(100, 40, 30, disjoint=True, seed=2)
    kept = [index for index in E if index not in large_U]
    assert other_E[: len(kept)] == kept


def test_not_disjoint_shares_prompts_and_e_ignores_b_u():
    E, U = draw_prompts(5, 100, 5, disjoint=False, seed=0)
    assert set(E) == set(U) == set(range(5))
    assert draw_prompts(5, 100, 1, disjoint=False, seed=0)[0] == E


def test_e_and_u_streams_differ():
    E, U = draw_prompts(10_000, 64, 64, disjoint=False, seed=0)
    assert E != U


def test_e_is_uniform_over_the_prompts_outside_u():
    E, U = draw_prompts(8, 60_000, 3, disjoint=True, seed=4)
    counts = np.bincount(E, minlength=8)
    expected = 60_000 / 5
    kept = [index for index in range(8) if index not in U]
    # 5 standard deviations of a binomial count: false alarm below 1e-5
    assert np.all(np.abs(counts[kept] - expected) < 5 * np.sqrt(expected * 0.8))


def test_u_is_uniform_over_prompts():
    counts = np.zeros(6)
    for seed in range(3000):
        for index in draw_prompts(6, 1, 2, disjoint=True, seed=seed)[1]:
            counts[index] += 1
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(3000 * (1 / 3) * (2 / 3)))


def test_the_last_prompt_is_left_for_e():
    E, U = draw_prompts(4, 7, 3, disjoint=True, seed=0)
    assert set(E) == set(range(4)) - set(U)


def test_empty_batches():
    assert draw_prompts(4, 0, 0, disjoint=True, seed=0) == ([], [])
    E, U = draw_prompts(4, 0, 4, disjoint=True, seed=0)
    assert E == []
    assert sorted(U) == [0, 1, 2, 3]


def test_global_generators_are_left_alone():
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())
    draw_prompts(100, 10, 10, True, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_too_few_prompts_for_u():
    with pytest.raises(DataError, match=r"B_U: expected at most the 5 prompts .* found 6"):
        draw_prompts(5, 4, 6, disjoint=False, seed=0)


def test_no_prompt_left_for_e():
    with pytest.raises(DataError, match=r"disjoint: expected at least 6 prompts .*1 for E\), found 5"):
        draw_prompts(5, 4, 5, disjoint=True, seed=0)


def test_no_prompts_at_all():
    with pytest.raises(DataError, match=r"B_E: expected at least 1 prompt to draw from, found 0 for B_E = 2"):
        draw_prompts(0, 2, 0, disjoint=False, seed=0)


@pytest.mark.parametrize("name", ["num_prompts", "B_E", "B_U", "seed"])
def test_negative_sizes(name):
    sizes = {"num_prompts": 9, "B_E": 2, "B_U": 2, "seed": 0, name: -1}
    with pytest.raises(DataError, match=rf"^{name}: expected an integer of at least 0, found -1"):
        draw_prompts(disjoint=True, **sizes)
