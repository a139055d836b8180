"""Sampling draws from exactly the policy that is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig as HfGenerationConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from probe.config.batches import GenerationConfig
from probe.data.batch import PromptExample
from probe.errors.exceptions import DataError, NumericalError, RolloutError
from probe.rollouts.inverse_cdf import uniforms
from probe.rollouts.sampling import check_sampling, sample_rollouts
from probe.scoring import Policy, score_tokens
from tests.support.enumerable import CAP, EOS, all_sequences, exact_entropies, tiny_policy
from tests.support.helpers import char_tokenizer


class TokenizerStub:
    """Maps any text to the enumerable policy's one prompt."""

    eos_token_id = EOS
    pad_token_id = EOS

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0, 1] if text == "short" else [0] * len(text)}

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(str(i) for i in ids if i != EOS) for ids in rows]


def prompts(count, text="short"):
    return [PromptExample(text=text, row={}, index=i) for i in range(count)]


def draw(policy, count, seed=0, **settings):
    settings = {"max_new_tokens": CAP, "temperature": policy.temperature, "batch_size": 500, **settings}
    return sample_rollouts(policy, TokenizerStub(), prompts(count), GenerationConfig(**settings), seed)


def assert_drawn_from(policy, sampled):
    """Chi-square of samples against the exact probability of every sequence; EOS and cap included."""
    batch, n = all_sequences(), len(sampled)
    expected = exact_entropies(policy, batch)[2].detach()
    index = {
        tuple(ids[m].tolist()): i
        for i, (ids, m) in enumerate(zip(batch.completion_ids, batch.mask, strict=True))
    }
    found = torch.zeros(len(batch), dtype=torch.float64)
    for i in range(n):
        key = tuple(sampled.completion_ids[i][sampled.mask[i]].tolist())
        found[index[key]] += 1
        assert bool(sampled.truncated[i]) == (key[-1] != EOS)
    common = expected * n >= 5
    groups = [
        (found[common], expected[common] * n),
        (found[~common].sum()[None], expected[~common].sum()[None] * n),
    ]
    chi2 = float(sum(((f - e) ** 2 / e).sum() for f, e in groups))
    dof = int(common.sum())
    assert chi2 < dof + 4 * (2 * dof) ** 0.5


def test_frequencies_are_the_policys_probabilities(monkeypatch):
    policy = tiny_policy(monkeypatch)
    assert_drawn_from(policy, draw(policy, 4000)[0])


def test_sampling_sees_what_scoring_sees(monkeypatch):
    policy = tiny_policy(monkeypatch)
    batch, seen = draw(policy, 50)
    scores = score_tokens(policy, batch)
    torch.testing.assert_close(
        seen.logprob, scores.logprob, rtol=0, atol=1e-6
    )  # generate hands logits on in float32
    torch.testing.assert_close(
        seen.entropy, scores.entropy, rtol=0, atol=1e-6
    )  # generate hands logits on in float32


def test_batches_do_not_depend_on_their_split(monkeypatch):
    policy = tiny_policy(monkeypatch)
    whole, _ = draw(policy, 40)
    split, _ = draw(policy, 40, batch_size=7)
    prefix, _ = draw(policy, 10)
    assert torch.equal(whole.completion_ids, split.completion_ids)
    assert torch.equal(whole.mask, split.mask)
    assert torch.equal(whole.mask[:10, : prefix.mask.shape[1]], prefix.mask)
    other, _ = draw(policy, 40, seed=1)
    assert whole.mask.shape != other.mask.shape or not torch.equal(whole.completion_ids, other.completion_ids)


def test_prompts_of_mixed_length_do_not_change_each_other(monkeypatch):
    policy = tiny_policy(monkeypatch)
    settings = GenerationConfig(max_new_tokens=CAP, temperature=policy.temperature)
    mixed = [PromptExample("0" * n, {}, n) for n in (1, 5, 3)]
    together, seen = sample_rollouts(policy, TokenizerStub(), mixed, settings, seed=4)
    scores = score_tokens(policy, together)
    torch.testing.assert_close(
        seen.logprob, scores.logprob, rtol=0, atol=1e-6
    )  # generate hands logits on in float32
    assert [len(ids) for ids in together.prompt_ids] == [1, 5, 3]


def test_the_models_own_generation_settings_do_not_enter(monkeypatch):
    policy = tiny_policy(monkeypatch)
    plain, _ = draw(policy, 30)
    base = policy.model.get_base_model()
    own = HfGenerationConfig(
        top_k=1, repetition_penalty=5.0, do_sample=True, temperature=0.1, eos_token_id=EOS
    )
    monkeypatch.setattr(base, "generation_config", own)
    with_own, _ = draw(policy, 30)
    assert torch.equal(plain.completion_ids, with_own.completion_ids)
    assert base.generation_config is own
    with monkeypatch.context() as m:
        m.setattr(policy.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            draw(policy, 2)
    assert base.generation_config is own


def test_global_random_state_is_neither_read_nor_advanced(monkeypatch):
    policy = tiny_policy(monkeypatch)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, _ = draw(policy, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b, _ = draw(policy, 10)
    assert torch.equal(a.completion_ids, b.completion_ids)


def test_truncated_support_marks_the_batch(monkeypatch):
    policy = tiny_policy(monkeypatch)
    batch, _ = draw(policy, 50, top_k=1, allow_truncated_support=True)
    assert batch.bias_flags == ("truncated_support",)
    assert len({tuple(ids[m].tolist()) for ids, m in zip(batch.completion_ids, batch.mask, strict=True)}) == 1


def test_a_stop_string_ends_a_response_and_is_part_of_it(monkeypatch):
    """On a model that writes characters: the token that completes the string is the last one."""
    model, tokenizer = char_model(), char_tokenizer()
    policy = Policy(model)
    prompts = [PromptExample("a1", {}, 0)] * 200
    settings = GenerationConfig(max_new_tokens=12, stop_strings=["2", "zz"])
    batch, _ = sample_rollouts(policy, tokenizer, prompts, settings, seed=1)
    plain, _ = sample_rollouts(policy, tokenizer, prompts, GenerationConfig(max_new_tokens=12), seed=1)
    stopped = 0
    for text, whole, cut, length in zip(
        batch.completions, plain.completions, batch.truncated, batch.lengths, strict=True
    ):
        if "2" in whole:
            stopped += 1
            assert text == whole[: whole.index("2") + 1]
            assert int(length) == len(text)  # no padding after the stop
            assert not bool(cut)
        else:
            assert "2" not in text
    assert stopped > 20
    spanning = GenerationConfig(max_new_tokens=12, stop_strings=["12"])  # the prompt's 1 and the response's 2
    batch, _ = sample_rollouts(policy, tokenizer, prompts, spanning, seed=1)
    assert any(text.startswith("2") and len(text) > 1 for text in batch.completions)


def char_model():
    """A random model over the characters of `char_tokenizer`, most likely to write 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        config = Qwen2Config(vocab_size=100, num_hidden_layers=1, eos_token_id=1, pad_token_id=0, **sizes)
        model = Qwen2ForCausalLM(config).eval()
    token = char_tokenizer()("2")["input_ids"][0]
    bias = torch.zeros(100)
    bias[token] = 1.5
    bias[:4] = -5.0  # special tokens have texts of their own
    model.lm_head = torch.nn.Linear(16, 100)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    model.lm_head.bias.data = bias
    return model


def test_a_generation_config_on_the_peft_model_does_not_enter_either(monkeypatch):
    policy = tiny_policy(monkeypatch)
    plain, _ = draw(policy, 30)
    own = HfGenerationConfig(repetition_penalty=5.0, eos_token_id=EOS)
    policy.model.generation_config = own
    with_own, _ = draw(policy, 30)
    assert torch.equal(plain.completion_ids, with_own.completion_ids)
    assert policy.model.generation_config is own


def test_refusals(monkeypatch):
    policy = tiny_policy(monkeypatch)
    with pytest.raises(ValueError, match="one temperature"):
        draw(policy, 2, temperature=1.3)
    with pytest.raises(DataError, match="at least one prompt"):
        draw(policy, 0)
    settings = GenerationConfig(max_new_tokens=CAP, temperature=policy.temperature)
    with pytest.raises(DataError, match="at least one token"):
        sample_rollouts(policy, TokenizerStub(), prompts(1, ""), settings, 0)
    with pytest.raises(RolloutError, match=r"expected at most 30 .*32 positions.*2 tokens.*found 31"):
        draw(policy, 2, max_new_tokens=31)
    no_eos = TokenizerStub()
    no_eos.eos_token_id = None
    monkeypatch.setattr(policy.model.get_base_model(), "generation_config", HfGenerationConfig())
    with pytest.raises(RolloutError, match="EOS"):
        sample_rollouts(policy, no_eos, prompts(1), settings, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_weight_is_looked_at(monkeypatch, value):
    """Whatever a kernel makes of it: fused attention returns finite numbers for NaN queries on some processors."""
    policy = tiny_policy(monkeypatch)
    for name, p in policy.model.named_parameters():
        kept = p.detach().clone()
        p.data.view(-1)[-1] = value
        with pytest.raises(NumericalError, match=rf"found NaN or infinity in {name} \(1 entries\)"):
            draw(policy, 2)
        p.data.copy_(kept)
    draw(policy, 2)


def test_logits_that_overflow_are_refused(monkeypatch):
    policy = tiny_policy(monkeypatch)
    for p in policy.model.get_output_embeddings().parameters():
        p.data.mul_(1e308)
    with pytest.raises(RolloutError, match="finite logits"):
        draw(policy, 2)


def recurrent(name):
    """Small random models whose layers carry a state from token to token."""
    size = {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    if name == "recurrent_gemma":
        config = RecurrentGemmaConfig(
            **size, bos_token_id=2, intermediate_size=32, num_attention_heads=2, lru_width=16
        )
        model = RecurrentGemmaForCausalLM(config)
    elif name == "mamba":
        model = MambaForCausalLM(MambaConfig(**size, bos_token_id=2, state_size=4))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                **size,
                bos_token_id=2,
                intermediate_size=32,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        )
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("name", ["recurrent_gemma", "mamba", "llama"])
def test_prompts_of_several_lengths(name):
    """Padding must not reach a state: what sampling saw is what scoring sees, alone and in a batch."""
    policy = Policy(recurrent(name), microbatch_size=4)
    settings = GenerationConfig(max_new_tokens=5)
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["abcde", "bcdefghijk", "lmnop", "opqrstu"])]
    batch, seen = sample_rollouts(policy, char_tokenizer(), mixed, settings, seed=3)
    scores = score_tokens(policy, batch)
    check_sampling(policy, seen, scores)
    one_by_one = replace(settings, batch_size=1)
    alone, _ = sample_rollouts(policy, char_tokenizer(), mixed, one_by_one, seed=3)
    torch.testing.assert_close(score_tokens(policy, alone).entropy[:, 0], scores.entropy[:, 0])


def test_only_models_that_padding_reaches_sample_each_length_by_itself(monkeypatch):
    mixed = [PromptExample(text, {}, i) for i, text in enumerate(["abcde", "bcdefgh", "eabcd", "fghijkl"])]
    rows = {}
    for name in ("recurrent_gemma", "llama"):
        policy = Policy(recurrent(name))
        sample_rollouts(policy, char_tokenizer(), mixed, GenerationConfig(max_new_tokens=2), seed=0)
        own, rows[name] = policy.model.generate, []

        def generate(input_ids, own=own, seen=rows[name], **settings):
            seen.append(len(input_ids))
            return own(input_ids=input_ids, **settings)

        monkeypatch.setattr(policy.model, "generate", generate)
        sample_rollouts(policy, char_tokenizer(), mixed, GenerationConfig(max_new_tokens=2), seed=0)
    assert rows == {"recurrent_gemma": [2, 2], "llama": [4]}


def test_uniform_streams_are_independent_of_their_neighbours():
    rows = uniforms(0, range(2000), 2)
    assert torch.equal(rows[5], uniforms(0, [5], 2)[0])
    assert abs(float(torch.corrcoef(torch.stack([rows[:-1, 0], rows[1:, 0]]))[0, 1])) < 0.1
    assert float(rows.mean()) == pytest.approx(0.5, abs=0.02)
