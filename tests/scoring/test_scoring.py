"""Scoring and gradients of other architectures, and the traps of padding and precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from probe.errors.exceptions import NumericalError, RolloutError
from probe.scoring import Policy, score_tokens, token_gradients
from probe.scoring.scores import TokenScores
from tests.support.enumerable import all_sequences, naive_scores, ragged_batch, tiny_policy

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class MultipliedThenCapped(LlamaForCausalLM):
    """A tail with both parts, as newer models have it."""

    def forward(self, *args, **kwargs):
        """The logits after scale and soft cap."""
        output = super().forward(*args, **kwargs)
        cap = self.config.final_logit_softcapping
        output.logits = cap * torch.tanh(output.logits * self.config.output_multiplier / cap)
        return output


def build(name):
    """Random models whose logits go through every kind of tail: soft-capped, multiplied, divided, none."""
    torch.manual_seed(0)
    if name == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None)
        )
    elif name == "cohere":
        model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3))
    elif name == "granite":
        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    elif name == "hyperclovax":  # multiplies by what Granite divides by
        model = HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SMALL, logits_scaling=0.25))
    elif name == "multiplied_then_capped":
        config = LlamaConfig(**SMALL)
        config.output_multiplier, config.final_logit_softcapping = 0.5, 2.0
        model = MultipliedThenCapped(config)
    elif name == "falcon_h1":
        mamba = {
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        }
        model = FalconH1ForCausalLM(
            FalconH1Config(**SMALL, **mamba, mamba_chunk_size=8, lm_head_multiplier=0.3)
        )
    elif name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=name == "llama_tied"))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    if name == "llama_lora_head":
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        )
    if name == "llama_saved_head":
        adapter = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapter)
    return model.eval()


MODELS = [
    "llama",
    "llama_tied",
    "llama_lora_head",
    "llama_saved_head",
    "gemma2",
    "cohere",
    "granite",
    "gpt2",
    "hyperclovax",
    "multiplied_then_capped",
    "falcon_h1",
]


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_full_logits_and_autograd(name):
    policy, batch = (
        Policy(build(name), temperature=0.7, microbatch_size=3, head_chunk_tokens=4),
        ragged_batch(),
    )
    scores = score_tokens(policy, batch)
    l, h = naive_scores(policy, batch)
    torch.testing.assert_close(scores.logprob.float(), l.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(scores.entropy.float(), h.detach(), rtol=0, atol=2e-5)

    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(batch.mask.shape, generator=g, dtype=torch.float64) for _ in range(2))
    (found,), _ = token_gradients(policy, batch, lambda i, t, l, h: (a[i, t][None], b[i, t][None]), 1)
    mask = batch.mask
    value = (a.float() * l)[mask].sum() + (b.float() * h)[mask].sum()
    parameters = policy.parameters
    expected = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for (key, p), e in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(found[key], torch.zeros_like(p) if e is None else e, rtol=2e-3, atol=2e-4)


def test_a_head_that_is_followed_by_something_unknown_is_refused():
    model = build("llama")
    model.register_forward_hook(lambda m, args, output: replace_logits(output))
    with pytest.raises(NumericalError, match="neither a scale nor a soft cap"):
        score_tokens(Policy(model), ragged_batch())


def replace_logits(output):
    output.logits = output.logits * 1.5
    return output


def test_bfloat16_weights_get_float32_logits():
    """Against the same bfloat16 weights in a float32 model: rounding of the layers, not of the logits."""
    model, batch = build("llama"), ragged_batch()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    exact = score_tokens(Policy(model), batch)
    rounded = score_tokens(Policy(model.bfloat16()), batch)
    assert float((exact.logprob - rounded.logprob).abs().max()) < 0.1
    hidden = torch.randn(5, 16).bfloat16()
    from probe.scoring.head import OutputHead

    logits = OutputHead(model).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.lm_head.weight.float().T)


def test_empty_responses_are_left_out_and_all_empty_is_an_error(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    with_empty = replace(batch, mask=batch.mask.clone())
    with_empty.mask[0] = False
    scores = score_tokens(policy, with_empty)
    assert float(scores.sequence_entropy[0]) == 0.0
    torch.testing.assert_close(scores.entropy[1:], score_tokens(policy, batch).entropy[1:])
    with pytest.raises(RolloutError, match="empty responses"):
        score_tokens(policy, replace(batch, mask=torch.zeros_like(batch.mask)))


def test_refusals(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    with pytest.raises(ValueError, match="at least one token"):
        score_tokens(policy, replace(batch, prompt_ids=((),) * len(batch)))
    for p in policy.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(NumericalError, match="expected trainable parameters"):
        token_gradients(policy, batch, lambda i, t, l, h: (l[None], h[None]), 1)
    next(policy.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="expected finite logits"):
        score_tokens(policy, batch)


def test_undecided_are_the_responses_with_a_token_that_was_not_certain():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    entropy = torch.tensor([[0.0, 1e-3], [0.0, 0.0], [0.0, 1e-16]], dtype=torch.float64)
    assert TokenScores(torch.zeros(3, 2), entropy, mask).undecided.tolist() == [True, False, False]
