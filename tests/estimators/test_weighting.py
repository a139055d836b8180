"""Score weights against a naive loop, and what a baseline may depend on."""

from __future__ import annotations

import pytest
import torch

from probe.estimators.weighting import score_weights
from probe.scoring import TokenScores


def scores(B=12, T=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0] = T + 1  # one sequence alone at the last position
    mask = torch.arange(T + 1) < lengths.unsqueeze(1)
    h = torch.rand(B, T + 1, generator=g, dtype=torch.float64) * mask
    l = -torch.rand(B, T + 1, generator=g, dtype=torch.float64) * mask
    return TokenScores(l, h, mask)


def test_leave_one_out_weights_equal_a_loop():
    s = scores()
    found = score_weights(s, "causal", "loo_position")
    B, T = s.mask.shape
    for i in range(B):
        for t in range(T):
            if not s.mask[i, t]:
                assert found.entropy[i, t] == 0 == found.length[i, t]
                continue
            others = [j for j in range(B) if j != i and s.mask[j, t]]
            to_go = [float(s.entropy[j, t + 1 :].sum()) for j in others]
            steps = [float(s.mask[j, t + 1 :].sum()) for j in others]
            b, b_length = (sum(x) / len(x) if x else 0.0 for x in (to_go, steps))
            assert float(found.entropy[i, t]) == pytest.approx(
                float(s.entropy[i, t + 1 :].sum()) - b, abs=1e-12
            )
            assert float(found.length[i, t]) == pytest.approx(
                float(s.mask[i, t + 1 :].sum()) - b_length, abs=1e-12
            )


def test_matched_weights_are_the_whole_sequences():
    s = scores()
    found = score_weights(s, "matched")
    N, T = s.sequence_entropy, s.lengths
    torch.testing.assert_close(found.entropy, (N - N.mean()).unsqueeze(1) * s.mask)
    torch.testing.assert_close(found.length, (T - T.mean()).unsqueeze(1) * s.mask)


@pytest.mark.parametrize("baseline", ["loo_position", "ridge"])
def test_a_baseline_never_sees_its_own_sequences_future(baseline):
    """Changing a sequence's later tokens changes its weight by exactly the change of what is still to come."""
    s = scores()
    i, t = 3, 1
    s.mask[i, :4], s.entropy[i, :4], s.logprob[i, :4] = True, 0.5, -0.5
    before = score_weights(s, "causal", baseline).entropy[i, t]
    changed = TokenScores(s.logprob.clone(), s.entropy.clone(), s.mask)
    changed.entropy[i, t + 1 :] *= 3.0
    changed.logprob[i, t:] *= 2.0
    after = score_weights(changed, "causal", baseline).entropy[i, t]
    expected = changed.entropy[i, t + 1 :].sum() - s.entropy[i, t + 1 :].sum()
    assert float(after - before) == pytest.approx(float(expected), abs=1e-9)


def test_ridge_predicts_what_the_prefix_determines():
    """Where the entropy still to come is a linear function of the position, nothing is left over."""
    mask = torch.ones(10, 6, dtype=torch.bool)
    h = torch.full((10, 6), 0.7, dtype=torch.float64)
    found = score_weights(TokenScores(-h, h, mask), "causal", "ridge")
    assert float(found.entropy.abs().max()) < 0.02


def test_refusals():
    with pytest.raises(ValueError, match="weighting: expected"):
        score_weights(scores(), "other")
    with pytest.raises(ValueError, match="baseline: expected"):
        score_weights(scores(), "causal", "other")
