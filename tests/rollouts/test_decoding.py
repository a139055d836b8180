"""However rows are taken together, the responses are those of batches that are kept to their last row."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.generation.continuous_batching import continuous_api

from probe.config.batches import GenerationConfig
from probe.data.batch import PromptExample
from probe.errors.exceptions import ConfigError, RolloutError
from probe.rollouts import continuous as continuous_batching
from probe.rollouts import decoders, inverse_cdf
from probe.rollouts.continuous import by_continuous_batching, refusal
from probe.rollouts.decoding import Decoding, Response, by_generate
from probe.rollouts.generation import own_generation_config
from probe.rollouts.inverse_cdf import StopRule
from probe.rollouts.sampling import check_sampling, sample_rollouts
from probe.scoring import Policy, score_tokens
from tests.rollouts.test_sampling import TokenizerStub, assert_drawn_from, char_model, draw, recurrent
from tests.support.enumerable import CAP, EOS, tiny_policy
from tests.support.helpers import char_tokenizer


def leave_early(monkeypatch):
    """Batches are left as soon as a row is over."""
    monkeypatch.setattr(inverse_cdf, "PREFILL", 0.0)
    monkeypatch.setattr(inverse_cdf, "RESTART", 1)


def assert_same(found, expected):
    (a, seen_a), (b, seen_b) = found, expected
    assert torch.equal(a.completion_ids, b.completion_ids)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.truncated, b.truncated)
    assert_close(seen_a.logprob, seen_b.logprob, rtol=0, atol=1e-5)
    assert_close(seen_a.entropy, seen_b.entropy, rtol=0, atol=1e-5)


def counted(monkeypatch, model):
    """Numbers of rows that `generate` is called with."""
    own, rows = model.generate, []

    def generate(input_ids, **settings):
        rows.append(len(input_ids))
        return own(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    return rows


def test_rows_taken_together_are_the_same_responses(monkeypatch):
    policy = tiny_policy(monkeypatch)
    expected = draw(policy, 40, batch_size=10)
    leave_early(monkeypatch)
    rows = counted(monkeypatch, policy.model)
    assert_same(draw(policy, 40, batch_size=10), expected)
    assert len(rows) > 4
    assert max(rows) == 10
    assert rows[4:] != sorted(rows[4:])  # rows of several batches have filled one up, and were left in turn


@pytest.mark.parametrize("way", ["taken together", "continuous"])
def test_frequencies_are_the_policys_probabilities(monkeypatch, way):
    policy = tiny_policy(monkeypatch)
    if way == "taken together":
        leave_early(monkeypatch)
    sampled, _ = draw(policy, 3000, seed=7, batch_size=300, continuous_batching=way == "continuous")
    assert_drawn_from(policy, sampled)


def test_stop_strings_reach_over_the_seam(monkeypatch):
    """A string that begins before a batch is left and ends after it ends the response, and a prompt's end does not."""
    model = char_model()
    with torch.no_grad():
        model.lm_head.bias[char_tokenizer()("2")["input_ids"][0]] += 3
    policy = Policy(model)
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["a1", "bcd1", "1", "xyzz2"] * 25)]
    settings = GenerationConfig(max_new_tokens=12, stop_strings=["222", "12"], batch_size=16)
    expected = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=1)
    leave_early(monkeypatch)
    rows = counted(monkeypatch, policy.model)
    found = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=1)
    assert_same(found, expected)
    assert len(rows) > 2 * 7
    ends = [text.endswith("222") for text in found[0].completions]
    assert sum(ends) > 5
    assert not all(ends)


def test_mixed_lengths_stay_within_cap_and_agree_with_scoring(monkeypatch):
    leave_early(monkeypatch)
    policy = Policy(recurrent("llama"))
    mixed = [PromptExample("abcdefghijk"[: 3 + i % 7], {}, i) for i in range(60)]
    settings = GenerationConfig(max_new_tokens=9, batch_size=8)
    batch, seen = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3)
    check_sampling(policy, seen, score_tokens(policy, batch))
    assert int(batch.lengths.max()) == 9
    assert bool((batch.lengths[batch.truncated] == 9).all())


def test_a_model_that_padding_reaches_keeps_its_batches(monkeypatch):
    leave_early(monkeypatch)
    policy = Policy(recurrent("recurrent_gemma"))
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["abcde", "bcdefgh"] * 8)]
    settings = GenerationConfig(max_new_tokens=6)
    sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=0)
    rows = counted(monkeypatch, policy.model)
    sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=0)
    assert rows == [8, 8]


def test_what_is_wasted_at_most_doubles():
    """A batch is left once its idle rows have cost what reading the others again costs, not before."""
    width = 100
    stop = StopRule((EOS,), torch.full((64,), width), torch.full((64,), 10_000), [], None, leave=True)
    ids = torch.full((64, width + 1), EOS + 1)
    ids[:32, -1] = EOS
    idle = 0
    while not bool(stop(ids, torch.zeros(64, 5)).all()):
        idle += 32
        ids = torch.cat([ids, torch.full((64, 1), EOS + 1)], dim=1)
    price = inverse_cdf.PREFILL * 32 * ids.shape[1] + inverse_cdf.RESTART
    assert idle < price <= idle + 32
    assert stop.length.tolist() == [1] * 32 + [0] * 32


def decoding_of(policy, prompts, eos_ids, tokenizer=TokenizerStub, **settings):
    settings = GenerationConfig(**{"max_new_tokens": 8, "batch_size": 4, **settings})
    return Decoding(policy, tokenizer, settings, 0, eos_ids, [Response(tuple(p)) for p in prompts])


PROMPTS = [[5] * (3 + i % 5) for i in range(16)]


def drawn(policy, way, prompts=PROMPTS, **settings):
    with own_generation_config(policy.model, TokenizerStub, GenerationConfig(**settings)) as eos_ids:
        decoding = decoding_of(policy, prompts, eos_ids, **settings)
        way(decoding, range(len(prompts)))
        return decoding.responses


def plain(decoding, entries):
    by_generate(decoding, entries, True, lambda: None)


def continuous(decoding, entries):
    assert refusal(decoding) is None
    by_continuous_batching(decoding, entries, lambda: None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "adapter"])
def test_continuous_batching_draws_what_generate_draws(monkeypatch, kind, attention):
    policy = tiny_policy(monkeypatch) if kind == "adapter" else Policy(recurrent("llama"))
    policy.model.set_attn_implementation(attention)
    prompts = [[1] * (1 + i % 3) for i in range(16)] if kind == "adapter" else PROMPTS
    settings = {"max_new_tokens": CAP, "temperature": policy.temperature} if kind == "adapter" else {}
    state = torch.get_rng_state()
    expected, found = (drawn(policy, way, prompts, **settings) for way in (plain, continuous))
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.config._attn_implementation == attention
    assert [(r.ids, r.over, r.truncated) for r in found] == [(r.ids, r.over, r.truncated) for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.entropies == pytest.approx(b.entropies, abs=1e-5)


def test_continuous_batching_leaves_no_thread_and_says_what_went_wrong(monkeypatch):
    policy = Policy(recurrent("llama"))
    before = threading.active_count()

    def stop(decoding, entries):
        def report():
            raise KeyboardInterrupt

        by_continuous_batching(decoding, entries, report)

    with pytest.raises(KeyboardInterrupt):
        drawn(policy, stop)
    assert threading.active_count() == before
    with torch.no_grad():
        policy.model.lm_head.weight[7] = torch.inf
    with pytest.raises(RolloutError, match="expected finite logits"):
        drawn(policy, continuous)
    assert threading.active_count() == before
    assert policy.model.config._attn_implementation == "sdpa"


def test_long_prompts_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(continuous_batching, "PREFILL_TOKENS", 4)
    policy = Policy(recurrent("llama"))
    expected, found = (drawn(policy, way) for way in (plain, continuous))
    assert [r.ids for r in found] == [r.ids for r in expected]


def test_attention_is_put_back_where_continuous_batching_does_not_even_begin(monkeypatch):
    policy = Policy(recurrent("llama"))
    policy.model.set_attn_implementation("eager")

    def broken(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(continuous_api, "resolve_continuous_batching_config", broken)
    with pytest.raises(RuntimeError, match="no room"):
        drawn(policy, continuous)
    assert policy.model.config._attn_implementation == "eager"


def test_a_manager_of_the_users_own_is_left_alone(monkeypatch):
    policy = Policy(recurrent("llama"))
    policy.model._cached_continuous_batching_manager = object()
    with pytest.raises(ConfigError, match="persistent manager of its own"):
        sample_rollouts(
            policy,
            char_tokenizer(),
            [PromptExample("abc", {}, 0)],
            GenerationConfig(max_new_tokens=5, continuous_batching=True),
            seed=0,
        )


def test_where_continuous_batching_stops_generate_goes_on(monkeypatch, caplog):
    policy = Policy(recurrent("llama"))
    settings = GenerationConfig(max_new_tokens=6, batch_size=4)
    mixed = [PromptExample("abcdefghijk"[: 3 + i % 7], {}, i) for i in range(24)]
    expected = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3)
    calls = []

    def stops(decoding, entries, report):
        by_continuous_batching(decoding, entries, report) if len(calls) < 2 else None
        calls.append(entries)
        if len(calls) == 3:
            by_continuous_batching(decoding, entries[:3], report)
            raise RolloutError("no room")

    monkeypatch.setattr(decoders, "by_continuous_batching", stops)
    monkeypatch.setattr(decoders, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(decoders, "FASTER", 0.0)
    with caplog.at_level("INFO", "probe"):
        found = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3)
    assert len(calls) == 3
    assert_same(found, expected)
    assert found[1].continuous == 4 + 3
    assert "sampling: generate from here on (continuous batching stopped: no room)" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("mamba", {}, "MambaForCausalLM has layers that are not attention"),
        ("recurrent_gemma", {}, "layers that are not attention"),
        ("llama", {"stop_strings": ["x"]}, "knows no generation.stop_strings"),
    ],
)
def test_what_continuous_batching_cannot_do_is_refused(name, settings, reason):
    policy = Policy(recurrent(name))
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["abcde", "bcdef"])]
    settings = GenerationConfig(max_new_tokens=5, continuous_batching=True, **settings)
    with pytest.raises(ConfigError, match=rf"generation.continuous_batching: expected .*{reason}"):
        sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=0)


def test_attention_that_continuous_batching_does_not_have_is_noticed():
    """Gemma 2 caps its attention's logits; the attention that continuous batching brings does not."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(
        vocab_size=100,
        num_hidden_layers=2,
        head_dim=8,
        attn_logit_softcapping=0.01,
        query_pre_attn_scalar=1,
        **size,
    )
    model = Gemma2ForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["abcdefgh", "bcdefhgi", "fhgdecba"])]
    settings = GenerationConfig(max_new_tokens=6, continuous_batching=True)
    with pytest.raises(
        ConfigError, match=r"found that (its entropies differ from generate's|it fails on this model)"
    ):
        sample_rollouts(Policy(model), char_tokenizer(), mixed, settings, seed=0)


@pytest.mark.parametrize(
    "seconds", [{"generate": 10.0, "continuous": 1.0}, {"generate": 1.0, "continuous": 0.9}]
)
def test_the_faster_way_is_taken_and_nothing_of_the_trial_is_lost(monkeypatch, seconds, caplog):
    policy = Policy(recurrent("llama"))
    settings = GenerationConfig(max_new_tokens=6, batch_size=4)
    mixed = [PromptExample("abcdefghijk"[: 3 + i % 7], {}, i) for i in range(24)]
    expected = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3)
    clock, entries = [0.0], {"generate": 0, "continuous": 0}

    def timed(name, way):
        def run(decoding, rows, *rest):
            way(decoding, rows, *rest)
            if decoding.settings.max_new_tokens == 6:  # not the comparison
                entries[name] += len(rows)
                clock[0] += seconds[name]

        return run

    monkeypatch.setattr(decoders, "by_generate", timed("generate", by_generate))
    monkeypatch.setattr(decoders, "by_continuous_batching", timed("continuous", by_continuous_batching))
    monkeypatch.setattr(decoders.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(decoders, "TRIAL_SECONDS", 4.0)
    done = []
    with caplog.at_level("INFO", "probe"):
        found = sample_rollouts(
            policy,
            char_tokenizer(),
            mixed,
            settings,
            seed=3,
            progress=lambda n, total: done.append((n, total)),
        )
    assert_same(found, expected)
    assert done[-1] == (24, 24)
    fast = seconds["generate"] > 2
    assert found[1].continuous == entries["continuous"]
    assert entries == ({"generate": 4, "continuous": 20} if fast else {"generate": 20, "continuous": 4})
    assert f"sampling: {'continuous batching' if fast else 'generate'} (a trial drew" in caplog.text
    monkeypatch.setattr(decoders, "TRIAL_SECONDS", 1e9)  # too short for a trial
    entries.update(generate=0, continuous=0)
    assert_same(sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3), expected)
    assert entries == {"generate": 24, "continuous": 0}
    off = replace(settings, continuous_batching=False)
    assert_same(sample_rollouts(policy, char_tokenizer(), mixed, off, seed=3), expected)
