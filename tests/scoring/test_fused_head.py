"""The fused head against plain log-softmax and autograd, for the output layers of many architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import probe.scoring.fused_head as fused
from probe.scoring.features import FeatureBasis
from probe.scoring.forward_mode import scores_and_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.head import OutputHead, token_log_probs, token_statistics
from probe.scoring.logit_tail import LogitTail
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from tests.support.enumerable import naive_scores, ragged_batch

V = 83
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Phi": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Olmo2": {},
    "GPTNeoX": {},
    "GptOss": {"head_dim": 8, **EXPERTS, "layer_types": ["full_attention", "full_attention"]},
    "Qwen3Moe": {"head_dim": 8, **EXPERTS},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def tiny(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model whose logits are spread, so that distributions are neither flat nor certain."""
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **ARCHITECTURES[name]})
    kind = name.removesuffix("Text") if name == "Gemma3Text" else name
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    if "num_experts" in ARCHITECTURES[name]:
        config._experts_implementation = "eager"  # grouped products have no float64
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{suffix}")(config).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0 if p.dim() > 1 and len(p) == V else 1.0)
    return model


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A vocabulary of 83 in tiles of 16, sums in pieces of 5: the last of each is a short one."""
    monkeypatch.setattr(fused, "TILE", 16)
    monkeypatch.setattr(fused, "TILE_ROWS", 7)
    monkeypatch.setattr(fused, "PIECE", 5)
    monkeypatch.setattr(fused, "BLOCK", 3)


@pytest.fixture
def batch():
    return ragged_batch(vocabulary=V)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_tangents_and_gradients_of_every_architecture(name, temperature, batch):
    model = tiny(name)
    policy = Policy(model, temperature=temperature, microbatch_size=3, head_chunk_tokens=4)
    l, h = naive_scores(policy, batch)
    scores = score_tokens(policy, batch)
    # norms are computed in float32 whatever the model's type
    torch.testing.assert_close(scores.logprob, l.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy, h.detach(), rtol=1e-5, atol=1e-5)
    assert 0.1 < float(scores.entropy[batch.mask].mean()) < 4.4
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 2, *l.shape, generator=generator, dtype=torch.float64)

    def constants(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return weights[0, :, i, t], weights[1, :, i, t]

    gradients, seen = token_gradients(policy, batch, constants, 2)
    torch.testing.assert_close(seen.entropy, scores.entropy, rtol=1e-9, atol=1e-9)
    direction = {}
    for k in range(2):
        value = (weights[0, k] * l + weights[1, k] * h).sum()
        names = list(policy.parameters)
        expected = torch.autograd.grad(
            value, [policy.parameters[n] for n in names], retain_graph=True, allow_unused=True
        )
        for n, e in zip(names, expected, strict=True):
            found = gradients[k][n]
            e = torch.zeros_like(found) if e is None else e
            torch.testing.assert_close(found, e, rtol=1e-5, atol=1e-5 * (1 + float(e.abs().max())))
            direction[n] = e
    # the tangents along a gradient add up to its square
    _, tangents = scores_and_tangents(policy, batch, direction)
    total = float((weights[0, 1] * tangents.logprob + weights[1, 1] * tangents.entropy).sum())
    assert total == pytest.approx(float(sum(d.square().sum() for d in direction.values())), rel=1e-5)


PLAIN = LogitTail(1.0, None)


def table_head(layer: nn.Module, tail: LogitTail = PLAIN) -> OutputHead:
    """A head without a model, checked as one is."""
    head = OutputHead.__new__(OutputHead)
    head.layer, head._tails, head._tail, head._promoted, head._values = layer, [tail], None, None, {}
    head.vocabulary, head.divides = 0, False
    hidden = torch.randn(1, 1, 32, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        head.check(hidden, tail(layer(hidden)))
    return head


class Packed(nn.Module):
    """A layer whose weight has no row for each token."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def linear(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, V, bias=bias, dtype=dtype)


@pytest.mark.parametrize(
    ("layer", "divides"),
    [(linear(False), True), (linear(True), True), (Packed(torch.randn(V, 32).double()), False)],
)
@pytest.mark.parametrize("tail", [LogitTail(1.0, None), LogitTail(2.5, None), LogitTail(0.5, 1.5)])
def test_exact_in_float64_with_tangents_features_and_tails(layer, divides, tail):
    generator = torch.Generator().manual_seed(0)
    hidden, along = (torch.randn(20, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (20,), generator=generator)
    basis = FeatureBasis(torch.randn(V, 3, generator=generator), torch.randn(32, 2, generator=generator))
    head = table_head(layer, tail)
    assert head.divides == divides

    def table(s: Tensor) -> tuple[Tensor, ...]:
        weight = layer.weight.detach() + s * turn
        states = hidden + s * along
        y = states @ (weight.T if divides else weight)
        if getattr(layer, "bias", None) is not None:
            y = y + layer.bias.detach()
        logp = token_log_probs(tail(y), 0.8)
        return (*token_statistics(logp, labels), basis.of(logp, states)[0])

    zero = torch.zeros((), dtype=torch.float64)
    values, tangents = torch.func.jvp(table, (zero,), (torch.ones_like(zero),))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        head._values = {"weight": dual(layer.weight.detach(), turn)}
        found = fused.token_values(head, dual(hidden, along), labels, 0.8, 6, basis)
        unpacked = [torch.autograd.forward_ad.unpack_dual(x) for x in found[:3]]
        for x, value, tangent in zip(unpacked, values, tangents, strict=True):
            torch.testing.assert_close(x.primal, value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(x.tangent, tangent, rtol=1e-11, atol=1e-11)
    head._values, head._promoted = {}, None
    with torch.no_grad():
        plain = fused.token_values(head, hidden, labels, 0.8, 6)
    for x, value in zip(plain, values, strict=False):
        torch.testing.assert_close(x, value, rtol=1e-12, atol=1e-12)
    a, b = (torch.randn(2, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    own = list(layer.parameters())
    gradients = fused.head_gradients(head, hidden, labels, 0.8, lambda l, h: (a, b), own)
    leaf = hidden.clone().requires_grad_()
    l, h = token_statistics(token_log_probs(tail(layer(leaf)), 0.8), labels)
    for k in range(2):
        expected = torch.autograd.grad((a[k] * l + b[k] * h).sum(), [leaf, *own], retain_graph=True)
        for x, y in zip(gradients[k], expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
def test_float32_keeps_entropies_and_log_probs_to_a_millionth(sharpness, monkeypatch):
    """Flat, ordinary and certain distributions over a vocabulary of several tiles."""
    monkeypatch.setattr(fused, "TILE", 1024)
    monkeypatch.setattr(fused, "PIECE", 512)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(32, 5000, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5000, 32, generator=generator) / 32**0.5)
    hidden = sharpness * torch.randn(64, 32, generator=generator)
    labels = (hidden @ layer.weight.T).softmax(-1).multinomial(1, generator=generator).squeeze(1)
    head = table_head(layer)
    with torch.no_grad():
        l, h = fused.token_values(head, hidden, labels, 1.0, 64)
        exact = token_log_probs(hidden.double() @ layer.weight.double().T, 1.0)
    expected_l, expected_h = token_statistics(exact, labels)
    size = float(
        (hidden @ layer.weight.T).detach().abs().max()
    )  # a product is known to so many units of its largest entry
    assert float((h - expected_h).abs().max()) < 1e-6 * max(1.0, size / 10)
    assert float((l - expected_l).abs().max()) < 1e-6 * max(1.0, size / 5)
    zeros = torch.zeros(1, 64, dtype=torch.float64)
    ((gradient,),) = fused.head_gradients(head, hidden, labels, 1.0, lambda l, h: (zeros, zeros + 1.0))
    leaf = hidden.double().requires_grad_()
    _, entropy = token_statistics(token_log_probs(leaf @ layer.weight.double().T, 1.0), labels)
    (reference,) = torch.autograd.grad(entropy.sum(), leaf)
    assert float((gradient - reference).norm() / reference.norm()) < 1e-5


def test_a_16_bit_head_is_computed_in_float32():
    layer = linear(True, torch.bfloat16)
    head = table_head(layer)
    assert head.divides
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(20)
    with torch.no_grad():
        l, h = fused.token_values(head, hidden, labels, 1.0, 6)
    exact = token_log_probs(hidden.double() @ layer.weight.double().T + layer.bias.double(), 1.0).detach()
    for found, expected in zip((l, h), token_statistics(exact, labels), strict=True):
        assert float((found - expected).abs().max()) < 1e-6


def test_an_adapter_on_the_head_is_divided_and_gets_its_gradient(batch):
    model = (
        get_peft_model(
            tiny("Qwen2"), LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        )
        .double()
        .eval()
    )
    policy = Policy(model, microbatch_size=3)
    head = OutputHead(model)
    for inputs in policy.microbatches(batch):
        policy.hidden_states(head, inputs)
    assert head.divides
    gradients, _ = token_gradients(
        policy, batch, lambda i, t, l, h: (torch.ones(1, len(l)), torch.ones(1, len(l))), 1
    )
    l, h = naive_scores(policy, batch)
    names = list(policy.parameters)
    assert any("lm_head" in n for n in names)
    expected = torch.autograd.grad((l + h).sum(), [policy.parameters[n] for n in names])
    for n, e in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[0][n], e, rtol=1e-5, atol=1e-5)
    _, tangents = scores_and_tangents(policy, batch, dict(zip(names, expected, strict=True)))
    total = float((tangents.logprob + tangents.entropy).sum())
    assert total == pytest.approx(float(sum(e.square().sum() for e in expected)), rel=1e-5)
