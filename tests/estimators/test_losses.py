"""The losses' token weights equal the gradient of the losses written out one response at a time."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from trl import GRPOConfig

from probe.config.losses import LOSS_OPTIONS, WINDOW_MEANS, Loss
from probe.estimators.loss_settings import LossSettings
from probe.estimators.loss_terms import needs_scores
from probe.estimators.losses import LossInputs, loss_weights, policy_loss, token_normaliser

LOSSES = get_args(Loss)
LIMIT = 11


def batch(B=5, T=7, seed=0):
    """Ragged responses, ratios on both sides of every clip range, an advantage of 0; rubbish outside the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([7, 1, 3, 5, 2]).unsqueeze(1)
    l, old, ref, h = (torch.rand(B, T, generator=g, dtype=torch.float64) - 1.5 for _ in range(4))
    A = torch.randn(B, generator=g, dtype=torch.float64)
    A[2] = 0.0
    for x in (l, old, ref, h):
        x[~mask] = math.nan
    return mask, l, old, ref, h.abs(), A


def written_out(s: LossSettings, mask, l, old, ref, h, A, cut, sampling, tokens=None, parts=1):
    """The loss with loops over responses and tokens; `tokens` in all of the update, of which this is one of `parts`."""
    if s.per_device_train_batch_size is not None:
        size, one = s.per_device_train_batch_size, replace(s, per_device_train_batch_size=None)
        rows = [slice(i, i + size) for i in range(0, len(mask), size)]
        left_out = [s.mask_truncated_completions and bool(c) for c in cut]
        tokens = sum(0 if out else int(m.sum()) for m, out in zip(mask, left_out, strict=True))
        split = [
            [None if x is None else x[r] for x in (mask, l, old, ref, h, A, cut, sampling)] for r in rows
        ]
        return sum(written_out(one, *part, tokens, len(rows)) for part in split)
    B, limit = len(mask), s.max_new_tokens
    kept = [
        [] if s.mask_truncated_completions and cut[i] else list(range(int(mask[i].sum()))) for i in range(B)
    ]
    entropies = torch.tensor([h[i, t].item() for i in range(B) for t in kept[i]], dtype=torch.float64)
    threshold = (
        torch.quantile(entropies, 1 - s.top_entropy_quantile) if s.top_entropy_quantile < 1 else -math.inf
    )
    terms = [[] for _ in range(B)]
    acting = []
    for i in range(B):
        n, a = len(kept[i]), A[i]
        before = [l[i, t].detach() if old is None else old[i, t] for t in kept[i]]
        logs = [l[i, t] - before[t] for t in kept[i]]
        ahead = [0.0 if sampling is None else float(before[t] - sampling[i, t]) for t in kept[i]]
        ahead = [0.0 if math.isnan(x) or not s.vllm_importance_sampling_correction else x for x in ahead]
        level, _, how = s.vllm_importance_sampling_mode.partition("_")
        low = (
            -math.inf if s.vllm_importance_sampling_clip_min is None else s.vllm_importance_sampling_clip_min
        )
        high = (
            math.inf if s.vllm_importance_sampling_clip_max is None else s.vllm_importance_sampling_clip_max
        )
        corrections = [math.exp(sum(ahead) if level == "sequence" else x) for x in ahead]
        if how == "truncate":
            corrections = [min(max(x, low), high) for x in corrections]
        else:
            corrections = [x if low <= x <= high else 0.0 for x in corrections]
        if sampling is None or not s.vllm_importance_sampling_correction:
            corrections = [1.0] * n
        sampled = before if sampling is None else sampling[i]
        drift = [float(sampled[t]) - l[i, t].item() for t in kept[i]]
        drift = sum(0.0 if math.isnan(x) else x for x in drift) / max(n, 1)
        dropped = s.off_policy_mask_threshold is not None and a < 0 and drift > s.off_policy_mask_threshold
        for t in kept[i]:
            r = (sum(logs) / n if s.importance_sampling_level == "sequence" else logs[t]).exp()
            if s.loss == "cispo":
                term = -min(r.item(), s.clip_high) * a * l[i, t]
            elif s.loss == "sapo":
                T = s.sapo_temperature_pos if a > 0 else s.sapo_temperature_neg
                term = -4 / T / (1 + (-T * (r - 1)).exp()) * a
            elif s.loss == "vespo":
                whole = sum(logs).item()
                of = corrections[:1] if level == "sequence" else corrections
                whole += sum(max(math.log(x), math.log(1e-8)) if x else math.log(1e-8) for x in of)
                w = math.exp(max(whole, math.log(1e-8)))
                k, lam = (
                    (s.vespo_k_pos, s.vespo_lambda_pos) if a >= 0 else (s.vespo_k_neg, s.vespo_lambda_neg)
                )
                term = -math.exp(lam) * w**k * math.exp(-lam * w) * a * l[i, t]
            else:
                upper = r if s.delta is None else torch.minimum(r, torch.tensor(s.delta, dtype=r.dtype))
                clipped = torch.minimum(r, torch.tensor(1 + s.clip_high, dtype=r.dtype))
                clipped = torch.maximum(clipped, torch.tensor(1 - s.clip_low, dtype=r.dtype))
                term = -torch.minimum(upper * a, clipped * a)
            if s.loss != "vespo":
                term = corrections[t] * term
            if dropped:
                term = 0.0 * term
            if h[i, t] >= threshold:
                acting.append(h[i, t])
            else:
                term = 0.0 * term
            if s.kl_coef:
                d = ref[i, t] - l[i, t]
                term = term + s.kl_coef * (d.exp() - d - 1) * (r if s.use_bias_correction_kl else 1.0)
            terms[i].append(term)
    sums = [sum(x) for x in terms]
    lengths = [max(len(x), 1) for x in terms]
    if s.loss in ("grpo", "sapo"):
        loss = sum(x / n for x, n in zip(sums, lengths, strict=True)) / B
    elif s.loss == "dr_grpo":
        loss = sum(sums) / (B * limit)
    elif s.loss in ("reinforce", "luspo"):
        loss = sum(sums) / B
    elif s.loss == "bnpo" or tokens is None:
        loss = sum(sums) / max(sum(len(x) for x in terms), 1)
    else:
        loss = sum(sums) * parts / tokens
    return (loss - s.entropy_coef * sum(acting) / max(len(acting), 1)) / parts


OPTIONS = {
    "plain": {},
    "kl and entropy": {"kl_coef": 0.3, "entropy_coef": 0.01},
    "kl uncorrected": {"kl_coef": 0.3, "use_bias_correction_kl": False},
    "sequence ratios": {"importance_sampling_level": "sequence", "kl_coef": 0.3},
    "two-sided": {"delta": 1.4},
    "cut-off left out": {"mask_truncated_completions": True, "entropy_coef": 0.2},
    "sampler, responses left out": {"vllm_importance_sampling_clip_max": 1.2, "kl_coef": 0.1},
    "sampler, responses clamped": {
        "vllm_importance_sampling_mode": "sequence_truncate",
        "vllm_importance_sampling_clip_min": 0.8,
        "vllm_importance_sampling_clip_max": 1.2,
    },
    "sampler, tokens left out": {
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_min": 0.9,
    },
    "sampler, tokens clamped": {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": None,
    },
    "sampler, not corrected": {
        "vllm_importance_sampling_correction": False,
        "off_policy_mask_threshold": 0.0,
    },
    "off-policy responses left out": {"off_policy_mask_threshold": 0.05, "kl_coef": 0.1},
    "microbatches": {"per_device_train_batch_size": 2, "entropy_coef": 0.2, "top_entropy_quantile": 0.6},
    "microbatches, cut-off left out": {
        "per_device_train_batch_size": 2,
        "mask_truncated_completions": True,
        "entropy_coef": 0.2,
    },
    "high entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.2, "kl_coef": 0.1},
}


@pytest.mark.parametrize("with_sampler", [False, True])
@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_the_gradient_of_the_loss(name, options, with_old, with_sampler):
    mask, l, old, ref, h, A = batch()
    sampling = None
    if with_sampler:
        sampling = l - 0.3 * torch.randn(l.shape, generator=torch.Generator().manual_seed(1)).double()
        sampling[0, 3] = math.nan
    old, cut = old if with_old else None, torch.tensor([False, True, False, True, False])
    settings = LossSettings(loss=name, max_new_tokens=LIMIT, clip_low=0.2, clip_high=0.3, **options)
    l.requires_grad_(), h.requires_grad_()
    value = written_out(settings, mask, l, old, ref, h, A, cut, sampling)
    of_l, of_h = torch.autograd.grad(value, [l, h], allow_unused=True)
    of_h = torch.zeros_like(h) if of_h is None else of_h
    inputs = LossInputs(mask, A, l.detach(), h.detach(), cut, old, ref, sampling)
    found = loss_weights(settings, inputs)
    for weights, expected in zip(found, (of_l, of_h), strict=True):
        torch.testing.assert_close(weights, torch.where(mask, expected, 0.0), rtol=1e-12, atol=1e-15)
    loss = policy_loss(settings, inputs)
    torch.testing.assert_close(loss, value.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_that_need_no_scores_are_those_at_any_scores(name):
    mask, l, old, _, h, A = batch()
    settings = LossSettings(loss=name, entropy_coef=0.1)
    on_policy = SimpleNamespace(old_logprobs=None, sampling_logprobs=None)
    assert not needs_scores(settings, on_policy)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    for found, expected in zip(
        loss_weights(settings, LossInputs(mask, A, zeros, zeros)),
        loss_weights(settings, LossInputs(mask, A, l, h)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert needs_scores(settings, SimpleNamespace(old_logprobs=old, sampling_logprobs=None))
    assert needs_scores(settings, SimpleNamespace(old_logprobs=None, sampling_logprobs=old))
    assert needs_scores(LossSettings(kl_coef=0.1), on_policy)
    assert needs_scores(LossSettings(top_entropy_quantile=0.5), on_policy)


def test_on_policy_kl_weight_is_that_of_the_divergence():
    """`E[grad l (l - l_ref)]` is the gradient of `KL(pi || pi_ref)`; without the ratio it is another one's."""
    mask, l, _, ref, h, A = batch()
    weights = {
        corrected: loss_weights(
            LossSettings("reinforce", kl_coef=1.0, use_bias_correction_kl=corrected),
            LossInputs(mask, 0 * A, l, h, ref_logprob=ref),
        )[0]
        for corrected in (True, False)
    }
    torch.testing.assert_close(weights[True][mask], (l - ref)[mask] / len(mask))
    torch.testing.assert_close(weights[False][mask], (1 - (ref - l).exp())[mask] / len(mask))


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_are_cut_in_the_order_that_is_given(name):
    mask, l, _, _, h, A = batch()
    settings = LossSettings(loss=name, entropy_coef=0.1, per_device_train_batch_size=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = loss_weights(settings, LossInputs(mask, A, l, h, order=order))
    expected = loss_weights(settings, LossInputs(mask[order], A[order], l[order], h[order]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[order], other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_recorded_number_of_tokens_takes_the_place_of_the_updates_own(name):
    mask, l, _, _, h, A = batch()
    settings, inputs = LossSettings(loss=name, entropy_coef=0.1), LossInputs(mask, A, l, h)
    tokens = float(mask.sum())
    own, of_h = loss_weights(settings, inputs)
    found, same = loss_weights(settings, replace(inputs, loss_tokens=2 * tokens))
    factor = 0.5 if name in WINDOW_MEANS else 1.0
    torch.testing.assert_close(found, factor * own)
    torch.testing.assert_close(same, of_h)


def test_options_have_trls_names_and_defaults():
    theirs = {f.name: f.default for f in fields(GRPOConfig)}
    own = {f.name: f.default for f in fields(LossSettings)}
    same = [name for name in LOSS_OPTIONS if name != "per_device_train_batch_size"]  # whose None is all of U
    assert {name: own[name] for name in same} == {name: theirs[name] for name in same}
    assert (own["loss"], own["clip_low"], own["kl_coef"]) == (
        theirs["loss_type"],
        theirs["epsilon"],
        theirs["beta"],
    )


def test_refusals():
    mask, l, _, _, h, A = batch()
    inputs = LossInputs(mask, A, l, h)
    with pytest.raises(ValueError, match="expected one of grpo"):
        token_normaliser("ppo", mask, 5)
    with pytest.raises(ValueError, match="reference log-probs"):
        loss_weights(LossSettings(kl_coef=0.1), inputs)
    with pytest.raises(ValueError, match="which responses were truncated"):
        loss_weights(LossSettings(mask_truncated_completions=True), inputs)
    with pytest.raises(ValueError, match="expected token or sequence"):
        loss_weights(LossSettings(importance_sampling_level="word"), inputs)
    with pytest.raises(ValueError, match="expected one of token_truncate"):
        loss_weights(
            LossSettings(vllm_importance_sampling_mode="tokens"), replace(inputs, sampling_logprob=l)
        )
