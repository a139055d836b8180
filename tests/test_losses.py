"""The losses' token weights equal autograd's gradient of the losses written out."""

from __future__ import annotations

import pytest
import torch

from probe.estimators.losses import LossSettings, loss_weights, token_normaliser


def batch(B=5, T=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 3, 5, 2])
    mask = torch.arange(T) < lengths.unsqueeze(1)
    l, old, ref, h = (torch.rand(B, T, generator=g, dtype=torch.float64) - 1.5 for _ in range(4))
    A = torch.randn(B, generator=g, dtype=torch.float64)
    A[2] = 0.0
    return mask, l, old, ref, h, A


def written_out(name, mask, l, old, ref, h, A, kl, ent, low, high, max_new_tokens):
    """The loss as one would write it in a trainer: loops over sequences."""
    ratio = (l - (l.detach() if old is None else old)).exp()
    A = A.unsqueeze(1)
    per_token = -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    if kl:
        per_token = per_token + kl * ((ref - l).exp() - (ref - l) - 1)
    per_token = per_token - ent * h
    rows = [per_token[i, : int(mask[i].sum())] for i in range(len(mask))]
    return {
        "grpo": lambda: torch.stack([r.mean() for r in rows]).mean(),
        "dr_grpo": lambda: torch.stack([r.sum() / max_new_tokens for r in rows]).mean(),
        "dapo": lambda: torch.cat(rows).mean(),
        "reinforce": lambda: torch.stack([r.sum() for r in rows]).mean(),
    }[name]()


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize(("kl", "ent"), [(0.0, 0.0), (0.3, 0.01)])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "reinforce"])
def test_weights_are_the_gradient_of_the_loss(name, kl, ent, with_old):
    mask, l, old, ref, h, A = batch()
    old = old if with_old else None
    l.requires_grad_(), h.requires_grad_()
    value = written_out(name, mask, l, old, ref, h, A, kl, ent, 0.2, 0.3, 11)
    of_l, of_h = torch.autograd.grad(value, [l, h], allow_unused=True)
    settings = LossSettings(
        loss=name, max_new_tokens=11, clip_low=0.2, clip_high=0.3, kl_coef=kl, entropy_coef=ent
    )
    found_l, found_h = loss_weights(
        settings, token_normaliser(name, mask, 11), A.unsqueeze(1), l.detach(), old, ref
    )
    torch.testing.assert_close(found_l, of_l, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found_h, torch.zeros_like(h) if of_h is None else of_h, rtol=1e-12, atol=1e-15)


def test_refusals():
    mask, l, *_ = batch()
    with pytest.raises(ValueError, match="expected 'grpo'"):
        token_normaliser("ppo", mask, 5)
    with pytest.raises(ValueError, match="reference log-probs"):
        loss_weights(LossSettings(kl_coef=0.1), mask.double(), torch.ones(5, 1), l)
