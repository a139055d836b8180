"""Attention a block of queries at a time: the numbers of the model's own attention, without its memory."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probe.scoring import attention
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.forward_mode import forward_tangents, scores_and_tangents, second_order_tangents
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from tests.support.enumerable import as_batch
from tests.support.exact import random_step
from tests.support.helpers import said

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
CAUSAL = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Olmo2": {},
    "Phi3": {},
    "Granite": {},
    "Cohere": {},
}
SLIDING = {
    "Mistral": {"sliding_window": 7},
    "Starcoder2": {"sliding_window": 7},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5, **WINDOWS},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWS},
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **WINDOWS,
    },
}
ARCHITECTURES = {**CAUSAL, **SLIDING}
ONLY_EAGER = {"Gemma2", "GptOss"}
"""Transformers' sdpa attention has neither soft-capped scores nor sinks."""


def model_of(name, implementation, dtype=torch.float64, **options):
    """A tiny model with random weights of a size that makes attention and distributions uneven."""
    kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**SHAPE, **ARCHITECTURES.get(name, {}), **options})
        config._attn_implementation = implementation
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
        for p in model.parameters():
            p.data += 0.15 * torch.randn_like(p)
    assert model.config._attn_implementation == implementation
    return model


def responses(lengths=(37, 30, 21, 5)):
    """Responses of these lengths, with one prompt of another length among their prompts: padding of every kind."""
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(4, 24, (n,), generator=generator).tolist()) for n in lengths]
    batch = as_batch(rows)
    return replace(batch, prompt_ids=((0, 1), (0, 1, 5, 9, 2), *batch.prompt_ids[2:]))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that cut the short sequences of the tests: of 6 queries and 2 of the 4 sequences with some 40 keys."""
    monkeypatch.setattr(attention, "WHOLE", 6)
    monkeypatch.setattr(attention, "MOST_ROWS", 6)
    monkeypatch.setattr(attention, "CELLS", 2000)


@contextmanager
def uncut(monkeypatch):
    """A context without blocks: the kernels that forward mode had before there were any."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "WHOLE", 10**9)
        yield


def everything(policy, batch, step):
    """Scores, first and second derivatives, of the tokens that there are."""
    scores, tangents = scores_and_tangents(policy, batch, step)
    first, second = second_order_tangents(policy, batch, step)
    with forward_mode_kernels(policy.model):
        alone = score_tokens(policy, batch)
    found = [scores, tangents, first, second, alone]
    return [x[batch.mask] for one in found for x in (one.logprob, one.entropy)]


def counted(monkeypatch):
    """A list that grows by one for each block."""
    blocks, own = [], attention._block
    monkeypatch.setattr(attention, "_block", lambda *args: (blocks.append(args[1:3]), own(*args))[1])
    return blocks


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - ONLY_EAGER))
def test_blocks_of_queries_give_the_numbers_of_the_math_kernel(monkeypatch, small_blocks, name):
    """In float64: each query's softmax is over the same keys, so that nothing but the order of sums can differ."""
    policy, batch = Policy(model_of(name, "sdpa"), microbatch_size=4), responses()
    step = random_step(policy, 1e-2)
    with uncut(monkeypatch):
        expected = everything(policy, batch, step)
    blocks = counted(monkeypatch)
    found = everything(policy, batch, step)
    assert (6, 12) in blocks
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(n, i) for n in sorted(ARCHITECTURES) for i in ("sdpa", "eager") if i == "eager" or n not in ONLY_EAGER],
)
def test_blocks_of_queries_give_the_numbers_of_eager_attention(
    monkeypatch, small_blocks, name, implementation
):
    """Windows, sinks, capped scores and shared heads included: they are the model's own. Up to float32's rounding."""
    batch = responses()
    reference = Policy(model_of(name, "eager", torch.float32), microbatch_size=4)
    step = random_step(reference, 1e-2)
    with uncut(monkeypatch):
        expected = everything(reference, batch, step)
    blocks = counted(monkeypatch)
    policy = Policy(model_of(name, implementation, torch.float32), microbatch_size=4)
    found = everything(policy, batch, step)
    assert (6, 12) in blocks
    for one, other in zip(found, expected, strict=True):
        # some thousand roundings of 2^-24 in each number, and cancellation in the second derivatives
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def test_the_tangents_are_those_of_difference_quotients(small_blocks):
    """Independent of any forward-mode rule; the error of the quotient is of order eps^2."""
    policy, batch = Policy(model_of("Mistral", "sdpa"), microbatch_size=4), responses()
    step = random_step(policy, 1e-2)
    found = forward_tangents(policy, batch, step)
    with forward_mode_kernels(policy.model):
        sides = [score_tokens(policy.moved(step, eps), batch) for eps in (1e-3, -1e-3)]
    quotient = (sides[0].entropy - sides[1].entropy) / 2e-3
    assert float(found.entropy.abs().max()) > 1e-4
    # the norms of the library round to float32, also in a float64 model
    torch.testing.assert_close(found.entropy, quotient, rtol=0, atol=2e-2 * float(quotient.abs().max()))


def test_a_prefix_of_keys_is_seen_by_every_query(monkeypatch, small_blocks):
    model = get_peft_model(
        model_of("Llama", "sdpa", torch.float32),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ).eval()
    policy, batch = Policy(model, microbatch_size=4), responses()
    step = random_step(policy, 1e-1)
    with uncut(monkeypatch):
        expected = scores_and_tangents(policy, batch, step)
    blocks = counted(monkeypatch)
    found = scores_and_tangents(policy, batch, step)
    assert blocks
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.entropy, other.entropy, rtol=0, atol=1e-5 * float(other.entropy.abs().max())
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [20, 26])
def test_a_call_without_mask_is_that_of_the_model(small_blocks, causal, keys):
    """Some models make no mask where the order of the tokens says everything."""
    layer = model_of("Llama", "sdpa").model.layers[0].self_attn
    pick = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, h, n, 8, generator=pick).double() for h, n in ((4, 20), (2, keys), (2, keys))
    )
    for options in ({"is_causal": causal}, {} if causal else {"is_causal": False}):
        with sdpa_kernel(SDPBackend.MATH):
            expected = transformers.AttentionInterface()["sdpa"](layer, query, key, value, None, **options)[0]
            found = attention._attention("sdpa", layer, query, key, value, None, **options)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation gives."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                # what is expanded takes no memory
                self.found = max(self.found, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss"])
def test_nothing_grows_with_the_square_of_the_length(monkeypatch, name):
    """Neither scores nor masks: no tensor has as many numbers as there are pairs of tokens."""
    monkeypatch.setattr(attention, "CELLS", 2**14)
    L = 700
    model = model_of(name, "eager" if name in ONLY_EAGER else "sdpa", torch.float32)
    policy, batch = Policy(model, microbatch_size=2, head_chunk_tokens=32), responses((L, L - 99))
    step = random_step(policy, 1e-3)
    with _Largest() as blocks:
        scores_and_tangents(policy, batch, step)
    with uncut(monkeypatch), _Largest() as whole:
        scores_and_tangents(policy, batch, step)
    assert whole.found >= 2 * 4 * L * L
    assert blocks.found < L * L / 2


def test_the_choice_depends_on_the_length_alone(monkeypatch):
    """One token more, one prompt of 2 tokens and the last token that is no input: blocks or none, whoever asks."""
    blocks = counted(monkeypatch)
    policy = Policy(model_of("Llama", "sdpa", torch.float32), microbatch_size=1)
    step = random_step(policy, 1e-2)
    for length, cut in ((attention.WHOLE - 1, False), (attention.WHOLE, True)):
        batch = as_batch([(4, 5) * (length // 2) + (6,) * (length % 2)])
        for use in (lambda batch: forward_tangents(policy, batch, step), lambda batch: scored(policy, batch)):
            blocks.clear()
            use(batch)
            assert bool(blocks) == cut


def scored(policy, batch):
    """Scores with the kernels that forward mode has."""
    with forward_mode_kernels(policy.model):
        return score_tokens(policy, batch)


@pytest.mark.parametrize("name", ["GPTJ", "Falcon"])
def test_a_model_with_attention_of_its_own_is_right_and_said(monkeypatch, small_blocks, caplog, name):
    """Its code adds what it likes to the mask, which is then there as a whole."""
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"alibi": True} if name == "Falcon" else {"rotary_dim": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    policy, batch = Policy(model, microbatch_size=4), responses()
    step = random_step(policy, 1e-2)
    with uncut(monkeypatch):
        expected = scores_and_tangents(policy, batch, step)
    attention._say_whole.cache_clear()
    with caplog.at_level(logging.INFO, logger="probe"):
        found = scores_and_tangents(policy, batch, step)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.entropy, other.entropy, rtol=0, atol=1e-6)
    assert "length^2" in said(caplog)


def test_a_call_that_cannot_be_cut_is_made_at_once_and_said(small_blocks, caplog):
    attention._say_whole.cache_clear()
    layer = model_of("Llama", "eager").model.layers[0].self_attn
    pick = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 20, 8, generator=pick).double() for h in (4, 2, 2))
    mask = torch.zeros(1, 1, 20, 20).double()
    for options in ({"output_attentions": True}, {"position_bias": torch.zeros(1)}, {"indexer": object()}):
        with caplog.at_level(logging.INFO, logger="probe"):
            weights = attention._attention("eager", layer, query, key, value, mask, scaling=0.5, **options)[1]
        assert weights.shape == (1, 4, 20, 20)
        assert next(iter(options)).replace("output_attentions", "weights") in said(caplog)


def test_the_table_of_functions_keeps_those_that_it_has():
    """A name of our own beside them, under which nobody else looks."""
    table = transformers.AttentionInterface()
    assert attention.ByQueries("sdpa") == "sdpa"
    assert table["sdpa"] is not table[attention.ByQueries("sdpa")]
    assert table["sdpa"].__module__.startswith("transformers")
    assert "eager" not in table


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_has_its_own_attention_again(error):
    model = model_of("Mistral", "sdpa")
    held = [(m, dict(vars(m))) for m in model.modules()]
    own = dict(vars(model.config))
    try:
        with forward_mode_kernels(model):
            inside = model.model.layers[0].self_attn.config._attn_implementation
            assert isinstance(inside, attention.ByQueries)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert dict(vars(model.config)) == own
    assert type(model.config._attn_implementation) is str
    assert all(vars(m)[key] is value for m, before in held for key, value in before.items())
