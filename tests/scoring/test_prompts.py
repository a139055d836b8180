"""Prompts that go through the model once give what they give response by response."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close

import probe.scoring.attention as attention
from probe.scoring import Policy, prompts, score_tokens
from probe.scoring.forward_mode import scores_and_tangents, second_order_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.microbatch import START, UNSHARED, positions, split, worth_sharing
from probe.scoring.prompts import can_share_prompts
from tests.rollouts.test_sampling import recurrent
from tests.scoring.test_fused_head import ARCHITECTURES, V, tiny
from tests.support.enumerable import as_batch, ragged_batch

ALLOWED = set(ARCHITECTURES) - {"Mistral", "Gemma2", "Gemma3Text"}
"""The others have layers that attend to a window."""


def groups(lengths=(6, 9, 2), size=4, longest=7):
    """Groups of responses to prompts of these lengths, in a shuffled order; the last response is empty."""
    generator = torch.Generator().manual_seed(0)
    of = torch.arange(len(lengths)).repeat_interleave(size)[
        torch.randperm(len(lengths) * size, generator=generator)
    ]
    each = [tuple(torch.randint(3, V, (n,), generator=generator).tolist()) for n in lengths]
    counts = torch.randint(1, longest + 1, (len(of),), generator=generator)
    counts[-1] = 0
    responses = [tuple(torch.randint(3, V, (int(n),), generator=generator).tolist()) for n in counts]
    batch = as_batch([r or (3,) for r in responses])
    mask = torch.arange(batch.mask.shape[1]) < counts.unsqueeze(1)
    return replace(batch, prompt_ids=tuple(each[k] for k in of), mask=mask, group=of)


def both(model, **settings):
    """The policy with prompts shared and not."""
    settings = {"microbatch_size": None, "tokens_per_microbatch": 64, **settings}
    return Policy(model, **settings), Policy(model, **settings, share_prompts=False)


def is_shared(policy, batch):
    return any(inputs.prompts is not None for inputs in policy.microbatches(batch))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_gradients_and_derivatives_of_every_architecture(name):
    model, batch = tiny(name), groups()
    shared, plain = both(model, temperature=0.7)
    assert is_shared(shared, batch) == (name in ALLOWED)
    assert not is_shared(plain, batch)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 2, *batch.mask.shape, generator=generator, dtype=torch.float64)

    def constants(i, t, l, h):
        return weights[0, :, i, t], weights[1, :, i, t]

    direction = {
        n: 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in shared.parameters.items()
    }
    found, expected = (
        (
            score_tokens(p, batch),
            token_gradients(p, batch, constants, 2)[0],
            scores_and_tangents(p, batch, direction)[1],
        )
        for p in (shared, plain)
    )
    # norms are computed in float32 whatever the model's type
    assert_close(found[0].logprob, expected[0].logprob, rtol=1e-5, atol=1e-5)
    assert_close(found[0].entropy, expected[0].entropy, rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        for n in a:
            assert_close(a[n], b[n], rtol=1e-5, atol=1e-5 * (1 + float(b[n].abs().max())))
    for one, other in ((found[2].logprob, expected[2].logprob), (found[2].entropy, expected[2].entropy)):
        assert_close(one, other, rtol=1e-5, atol=1e-5 * (1 + float(other.abs().max())))


def test_second_derivatives_and_long_responses(monkeypatch):
    """Nested forward mode, and attention a few queries at a time beside the prompts' keys."""
    batch, model = groups(longest=20), tiny("Llama")
    shared, plain = both(model, tokens_per_microbatch=256)
    generator = torch.Generator().manual_seed(1)
    step = {
        n: 0.05 * torch.randn(p.shape, generator=generator).double() for n, p in shared.parameters.items()
    }
    expected = [t.vector() for t in second_order_tangents(plain, batch, step)]
    monkeypatch.setattr(attention, "WHOLE", 5)
    monkeypatch.setattr(attention, "CELLS", 100)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 3)
    assert is_shared(shared, batch)
    for a, b in zip(second_order_tangents(shared, batch, step), expected, strict=True):
        assert_close(a.vector(), b, rtol=1e-5, atol=1e-5 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
def test_what_has_other_states_than_attentions_goes_response_by_response(name):
    shared, plain = both(recurrent(name))
    assert not is_shared(shared, groups())
    assert_close(score_tokens(shared, groups()).entropy, score_tokens(plain, groups()).entropy)


class Forgetful(transformers.LlamaForCausalLM):
    """A model that does not go on from what its cache holds."""

    def forward(self, input_ids=None, past_key_values=None, **arguments):
        if past_key_values is not None:
            arguments.pop("attention_mask"), arguments.pop("position_ids")
        return super().forward(input_ids=input_ids, **arguments)


class Strict(transformers.LlamaForCausalLM):
    """A model that takes no positions."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Forgetful, "its states differ"), (Strict, "does not go on from a cache")]
)
def test_a_model_is_tried_before_its_prompts_are_shared(kind, reason, caplog):
    model = kind(tiny("Llama").config).eval()
    with caplog.at_level("DEBUG", "probe"):
        assert not is_shared(both(model)[0], groups())
    assert reason in caplog.text
    calls = len(caplog.records)
    assert not can_share_prompts(model, both(model)[0].autocast, groups())
    assert len(caplog.records) == calls


def test_no_position_is_beyond_a_sequences_own():
    """Long prompts with short responses beside short prompts with long ones: each fits, the rectangle does not."""
    batch = groups(lengths=(50, 30), longest=30)
    counts = torch.where(torch.tensor([len(ids) == 50 for ids in batch.prompt_ids]), 10, 30)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (len(batch), 30), generator=generator)
    mask = torch.arange(30) < counts.unsqueeze(1)
    batch = replace(
        batch, completion_ids=ids * mask, mask=mask, truncated=torch.zeros(len(batch), dtype=torch.bool)
    )
    shared, plain = both(tiny("GPT2"), tokens_per_microbatch=2048)
    assert is_shared(shared, batch)
    assert len(shared.split(batch)) == 1
    assert_close(
        score_tokens(shared, batch).logprob, score_tokens(plain, batch).logprob, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_are_not_shared(kind):
    """The prompt's keys would have other factors than those of the whole sequence."""
    config = tiny("Llama").config
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4} if kind == "longrope" else {}
    config.rope_parameters = {
        "rope_type": kind,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        **factors,
    }
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert not is_shared(both(model)[0], groups())


class Windowed(transformers.LlamaForCausalLM):
    """A model whose cache is of use for short sequences only, and whose configuration does not say so."""

    def forward(self, input_ids=None, past_key_values=None, **arguments):
        if past_key_values is not None and past_key_values.get_seq_length() > 12:
            arguments["attention_mask"][:, :5] = 0
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **arguments)


def test_a_model_is_tried_at_the_lengths_that_occur():
    model = Windowed(tiny("Llama").config).double().eval()
    assert is_shared(both(model)[0], groups(lengths=(6, 9, 2)))
    longer = groups(lengths=(20, 25, 18))
    shared, plain = both(model)
    assert not is_shared(shared, longer)
    assert_close(score_tokens(shared, longer).logprob, score_tokens(plain, longer).logprob)


def test_keys_and_values_of_shared_prompts_are_bounded():
    """Positions that go through are few, and the cache is there for each response."""
    batch = groups(lengths=(400,), size=200, longest=2)
    for part in split(batch, None, 2048, True):
        assert positions(batch, part, False) <= UNSHARED * 2048
    assert max(map(len, split(batch, None, 2048, True))) > max(map(len, split(batch, None, 2048)))


def test_a_trial_that_memory_does_not_suffice_for_decides_nothing(monkeypatch):
    model = tiny("Llama")

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(prompts, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            both(model)[0].split(groups())
    assert is_shared(both(model)[0], groups())


def test_memory_that_does_not_suffice_halves_what_goes_through(monkeypatch):
    model, batch = tiny("Llama"), groups(size=8)
    shared, plain = both(model, tokens_per_microbatch=400)
    expected = score_tokens(plain, batch)
    own, seen = prompts.forward, []
    assert is_shared(shared, batch)

    def full(model, prompts, input_ids, attention_mask):
        seen.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return own(model, prompts, input_ids, attention_mask)

    monkeypatch.setattr("probe.scoring.policy.forward", full)
    assert_close(score_tokens(shared, batch).entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert max(seen) > 3
    assert "forward" in shared.traffic.room


@pytest.mark.parametrize("tokens", [20, 64, 300])
@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize("lengths", [(20, 25, 18, 30), (2, 3, 2), (40,)])
def test_the_cut_keeps_to_the_budget_and_is_no_more_work(lengths, sequences, tokens):
    batch = groups(lengths, size=6)
    shared, plain = (split(batch, sequences, tokens, share) for share in (True, False))
    assert sorted(i for part in shared for i in part) == sorted(i for part in plain for i in part)
    assert sorted(i for part in shared for i in part) == [
        i for i in range(len(batch)) if batch.lengths[i] > 0
    ]
    for part in shared:
        assert len(part) == 1 or positions(batch, part, True) <= tokens
        assert sequences is None or len(part) <= sequences

    def work(parts, share):
        return sum(positions(batch, part, share) + START * tokens for part in parts)

    assert work(shared, True) <= work(plain, False)
    if min(lengths) > 10 and tokens == 300:
        assert work(shared, True) < 0.7 * work(plain, False)


def test_positions_are_counted_as_they_go_through():
    model, batch = tiny("Llama"), groups(lengths=(20, 25, 18))
    policy, _ = both(model, tokens_per_microbatch=300)
    score_tokens(policy, batch)
    parts = policy.split(batch)
    assert policy.traffic.padded == sum(positions(batch, part, True) for part in parts)
    once = sum(len(ids) - 1 for part in parts for ids in {batch.prompt_ids[i] for i in part})
    assert policy.traffic.useful == once + int(batch.lengths.sum())


def test_prompts_that_are_all_different_are_no_reason_to_try():
    batch = ragged_batch(vocabulary=V)
    different = replace(batch, prompt_ids=tuple((5 + i, 7, 9) for i in range(len(batch))))
    assert not worth_sharing(different)
    assert worth_sharing(groups())
    assert not worth_sharing(
        replace(batch, prompt_ids=((5,),) * len(batch))
    )  # the last token is the response's start
