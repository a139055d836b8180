"""What goes through a model at a time: splits, out of memory, padding, and the trial."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch

import probe.scoring.tuning as tuning
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.scoring.forward_mode import scores_and_tangents, second_order_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.microbatch import START, at_a_time, split
from probe.scoring.policy import DEFAULT_TOKENS, Policy
from probe.scoring.score import score_tokens
from probe.scoring.traffic import Traffic
from probe.scoring.tuning import Tuned, tuned
from probe.snapshot import operator_threads
from tests.support.enumerable import all_sequences, ragged_batch, tiny_policy
from tests.support.exact import random_step

KINDS = ("forward", "forward mode", "backward")


def positions(batch, index: int) -> int:
    return len(batch.prompt_ids[index]) + int(batch.mask[index].sum()) - 1


@pytest.mark.parametrize("tokens", [1, 11, 20, 33, None])
@pytest.mark.parametrize("sequences", [1, 3, None])
def test_a_split_holds_every_sequence_once_and_what_is_allowed(tokens, sequences):
    batch = ragged_batch()
    found = split(batch, sequences, tokens)
    assert sorted(i for part in found for i in part) == [0, 1, 2, 3]
    longest = [positions(batch, i) for part in found for i in part]
    assert longest == sorted(longest, reverse=True)
    for part in found:
        size = len(part) * positions(batch, part[0])
        assert tokens is None or size <= tokens or len(part) == 1
        assert sequences is None or len(part) <= sequences
    assert found == split(batch, sequences, tokens)


def test_a_budget_of_tokens_takes_more_of_short_sequences():
    batch = ragged_batch()
    assert [len(part) for part in split(batch, None, 14)] == [1, 2, 1]


def of_lengths(lengths) -> RolloutBatch:
    """Responses of those lengths to prompts of one token."""
    completions = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return replace(
        ragged_batch().subset(torch.zeros(len(lengths), dtype=torch.int64)),
        prompt_ids=((1,),) * len(lengths),
        completion_ids=completions,
        mask=mask,
    )


def work(parts, batch, tokens) -> float:
    """Positions with padding, and what the microbatches cost of their own."""
    return sum(len(part) * positions(batch, part[0]) + START * tokens for part in parts)


@pytest.mark.parametrize("sequences", [2, None])
@pytest.mark.parametrize("tokens", [8, 20, 64])
@pytest.mark.parametrize("lengths", [[9, 9, 4, 3, 3, 2, 1], [30, 8, 8, 8, 7, 1], [5] * 7, [12, 11, 10, 3, 2]])
def test_no_other_cut_costs_less(lengths, tokens, sequences):
    batch = of_lengths(lengths)
    found, costs = split(batch, sequences, tokens), []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        parts = [list(range(start, end)) for start, end in itertools.pairwise(ends)]
        if all(len(part) <= (at_a_time(lengths[part[0]], sequences, tokens) or 1) for part in parts):
            costs.append(work(parts, batch, tokens))
    assert work(found, batch, tokens) == pytest.approx(min(costs), rel=1e-12)


def test_lengths_far_apart_are_not_padded_to_the_longest():
    """Geometric lengths, as of responses that end with the same chance at every token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(1000).geometric_(1 / 150, generator=generator).long().clamp(2, 1024).tolist()
    batch = of_lengths(lengths)
    padded = work(split(batch, None, 2048), batch, 0)
    useful = sum(positions(batch, i) for i in range(len(batch)))
    assert 1 - useful / padded < 0.1


def test_numbers_do_not_depend_on_the_budget_and_padding_is_counted(monkeypatch):
    batch, found = all_sequences(cap=3), []
    for tokens in (1, 23, 10_000):
        policy = tiny_policy(monkeypatch, microbatch_size=None, tokens_per_microbatch=tokens)
        policy = replace(policy, share_prompts=False)
        found.append(score_tokens(policy, batch).entropy)
        traffic = policy.traffic
        assert traffic.useful == sum(positions(batch, i) for i in range(len(batch)))
        assert traffic.padded >= traffic.useful
        assert (tokens > 1) == (traffic.padded > traffic.useful)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


class Full:
    """A model's forward that has memory for so many tokens."""

    def __init__(
        self, policy: Policy, room: int, error: type[BaseException] = torch.OutOfMemoryError
    ) -> None:
        self.calls, self.room, self.error = [], room, error
        policy.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        size = kwargs["input_ids"].numel()
        self.calls.append(size)
        if size > self.room:
            raise self.error("out of memory: tried to allocate")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_what_goes_through_and_loses_nothing(monkeypatch, caplog, error):
    batch = all_sequences(cap=3)
    plain = tiny_policy(monkeypatch, microbatch_size=None, tokens_per_microbatch=10_000)
    policy = tiny_policy(monkeypatch, microbatch_size=None, tokens_per_microbatch=10_000)
    direction = random_step(policy, 0.1)

    def weights(i, t, l, h):
        return torch.stack([l.exp(), h]), torch.stack([h, l])

    expected = [
        score_tokens(plain, batch).logprob,
        scores_and_tangents(plain, batch, direction)[1].vector(),
        *(g.flatten() for k in range(2) for g in token_gradients(plain, batch, weights, 2)[0][k].values()),
    ]
    full = Full(policy, 100, error)
    done = []
    with caplog.at_level(logging.WARNING):
        found = [
            score_tokens(policy, batch, lambda count, total: done.append((count, total))).logprob,
            scores_and_tangents(policy, batch, direction)[1].vector(),
            *(
                g.flatten()
                for k in range(2)
                for g in token_gradients(policy, batch, weights, 2)[0][k].values()
            ),
        ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert done[-1] == (len(batch), len(batch))
    assert [count for count, _ in done] == sorted({count for count, _ in done})
    assert {kind: most <= 100 for kind, most in policy.traffic.room.items()} == dict.fromkeys(KINDS, True)
    assert sum(size > 100 for size in full.calls) <= 4 * len(KINDS)  # only until it is known
    assert "going on with at most" in caplog.text


def test_what_a_derivative_has_no_memory_for_changes_no_shape_of_scores(monkeypatch):
    batch = all_sequences(cap=3)
    policy = tiny_policy(monkeypatch, microbatch_size=None, tokens_per_microbatch=10_000)
    before = score_tokens(policy, batch)
    full = Full(policy, 100)
    scores_and_tangents(policy, batch, random_step(policy, 0.1))
    full.room = 10_000
    after = score_tokens(policy, batch)
    assert "forward" not in policy.traffic.room
    torch.testing.assert_close(after.logprob, before.logprob, rtol=0, atol=0)


def test_nested_forward_mode_has_a_room_of_its_own(monkeypatch):
    batch = all_sequences(cap=3)
    policy = tiny_policy(monkeypatch, microbatch_size=None, tokens_per_microbatch=64)
    step = random_step(policy, 0.1)
    expected = second_order_tangents(policy, batch, step)[1].vector()
    Full(policy, 20)
    found = second_order_tangents(policy, batch, step)[1].vector()
    assert set(policy.traffic.room) == {"nested forward mode"}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_one_sequence_that_does_not_fit_is_an_error(monkeypatch):
    policy = tiny_policy(monkeypatch)
    Full(policy, 1)
    with pytest.raises(torch.OutOfMemoryError):
        score_tokens(policy, all_sequences(cap=3))


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    policy = replace(tiny_policy(monkeypatch), share_prompts=False)
    full = Full(policy, 1, ValueError)
    with pytest.raises(ValueError, match="out of memory"):
        score_tokens(policy, all_sequences(cap=3))
    assert len(full.calls) == 1


def test_memory_that_goes_in_the_middle_of_the_backwards_is_said(monkeypatch):
    """What has been added to the sums cannot be taken off again."""
    policy, batch, calls = tiny_policy(monkeypatch), all_sequences(cap=2), []
    grad = torch.autograd.grad

    def second_fails(outputs, inputs, *args, **options):
        if "retain_graph" in options and isinstance(inputs, list) and len(inputs) == len(policy.parameters):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("gone")
        return grad(outputs, inputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", second_fails)
    with pytest.raises(NumericalError, match="found it gone after 1"):
        token_gradients(policy, batch, lambda i, t, l, h: (torch.ones(2, len(l)), torch.ones(2, len(l))), 2)


@pytest.mark.parametrize(
    ("size", "tokens"), [(8, None), (1, None), (None, 4096), (None, None), (None, 1), (3, 40)]
)
def test_other_shapes_are_other_ones_however_little_the_batch_fills(monkeypatch, size, tokens):
    batch = all_sequences(cap=3)
    policy = tiny_policy(monkeypatch, microbatch_size=size, tokens_per_microbatch=tokens)

    def shapes(of):
        found = {}
        for part in of.split(batch):
            for i in part:
                found[i] = (len(part), max(positions(batch, j) for j in part))
        return found

    own, other = shapes(policy), shapes(policy.in_other_shapes(batch))
    alike = sum(own[i] == other[i] for i in own)
    assert alike <= 1  # an odd one left over


@pytest.fixture
def timed(monkeypatch):
    """A trial whose time is what is put in: seconds by threads and tokens."""

    def use(seconds):
        monkeypatch.setattr(tuning, "_seconds", lambda policy, batch: seconds(policy, batch))

    return use


@pytest.mark.parametrize(("many", "chosen"), [(0.5, 4), (0.95, 1), (13.0, 1)])
def test_more_threads_are_taken_where_they_are_faster(monkeypatch, timed, many, chosen):
    timed(lambda policy, batch: 1.0 if torch.get_num_threads() == 1 else many)
    with operator_threads(4):
        found = tuned(tiny_policy(monkeypatch), all_sequences(cap=2))
        assert torch.get_num_threads() == 4
    assert found == Tuned(DEFAULT_TOKENS, chosen)


def test_the_budget_rises_while_that_is_faster(monkeypatch, timed):
    monkeypatch.setattr(tuning, "TRIAL_SHARE", 1e6)
    batch = ragged_batch()
    monkeypatch.setattr(tuning, "BUDGETS", (8, 14, 30, 60))
    monkeypatch.setattr(tuning, "bound_by_free_memory", lambda *_: None)
    rates = {8: 1.0, 14: 2.0, 30: 3.0, 60: 3.01}
    timed(lambda policy, batch: tuning._positions(batch) / rates[policy.tokens_per_microbatch])
    policy = Policy(torch.nn.Linear(1, 1), microbatch_size=None)
    monkeypatch.setattr(Policy, "device", torch.device("cpu"))
    monkeypatch.setattr(Policy, "split", lambda self, b: split(b, None, self.tokens_per_microbatch))
    assert tuned(policy, batch, threads=1) == Tuned(30, 1)
    assert tuned(replace(policy, tokens_per_microbatch=77), batch, threads=1).tokens == 77


def test_a_small_batch_is_not_tried_on(monkeypatch):
    policy = tiny_policy(monkeypatch, microbatch_size=None)
    assert tuned(policy, all_sequences(cap=2), threads=1) == Tuned(DEFAULT_TOKENS, 1)
    assert policy.traffic == Traffic()
