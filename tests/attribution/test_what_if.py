"""Interventions: what they do to the weights, and that the shortcut is the effect with the preconditioner held."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from probe.attribution.interventions import INTERVENTIONS, Plan, intervention, parse_intervention
from probe.attribution.objectives import Change
from probe.attribution.what_if import Shortcut, entropy_per_reward
from probe.errors.exceptions import ConfigError
from probe.estimand import SEQUENCE, TOKEN, PerEstimand
from probe.estimators.advantages import STD_EPSILON
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.estimate import Estimate
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import loss_weight_parts, token_normaliser, update_normaliser
from probe.estimators.student import student_quantile
from probe.parameters import inner_product
from probe.scoring import score_tokens
from probe.scoring.gradients import token_gradients
from tests.support.attributed import attributed, batches
from tests.support.enumerable import float64_norm, tiny_policy


def made(monkeypatch, settings=LossSettings(loss="dapo"), off_policy=False):  # noqa: B008
    """A step taken apart, and its shortcut; made once for each of these arguments."""
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
    return _made(settings, off_policy)


@cache
def _made(settings, off_policy):
    with pytest.MonkeyPatch.context() as patched:
        policy = tiny_policy(patched, layers=2)
        E, U = batches(policy, prompts=12, G=4, E=120)
        if off_policy:
            g = torch.Generator().manual_seed(4)
            noise = 0.3 * torch.randn(U.mask.shape, generator=g, dtype=torch.float64)
            U = replace(U, old_logprobs=score_tokens(policy, U).logprob + noise)
        step = attributed(policy, E, U, settings)
        classes = {"right": (U.rewards > 0.5).unsqueeze(1) & U.mask, "eos": U.mask & (U.completion_ids == 3)}
        tokens = replace(step.tokens, classes=classes)
    return step, Shortcut(step.found, tokens, step.update.loss, step.update.inputs)


def gradient_of(step, plan):
    weights = plan.weights

    def constants(i, t, l, h):
        return (weights.policy + weights.kl)[i, t].unsqueeze(0), weights.bonus[i, t].unsqueeze(0)

    return token_gradients(step.policy, step.U, constants, 1)[0][0]


EVERY = [name for name in INTERVENTIONS if name != "drop"]
EVERY += ["drop(tokens_of=right)", "drop(tokens_of=eos)", "stare(target=9)+entropy_bonus(coef=0.1)"]


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_the_shortcut_is_the_effect_with_the_preconditioner_held(monkeypatch, name, off_policy):
    """Against the gradient with the intervention's weights, taken by backward, times P; both estimands."""
    step, shortcut = made(monkeypatch, off_policy=off_policy)
    effect = shortcut.effect(parse_intervention(name))
    closed, plan = step.taker.closed, effect.plan
    gradient = gradient_of(step, plan)
    X = entropy_gradient(step.policy, step.E, step.E_scores)
    factor = plan.learning_rate_factor
    held = {
        n: factor * (closed.momentum[n] + closed.decay[n] + closed.gradient_map[n] * g)
        for n, g in gradient.items()
    }
    for of, one in ((X.sequence, effect.change.deltaH1.sequence), (X.token, effect.change.deltaH1.token)):
        assert one.value == pytest.approx(inner_product(of, held), rel=1e-9)
    difference = effect.change.deltaH1.token.value - shortcut.effect().change.deltaH1.token.value
    assert effect.difference.deltaH1.token.value == pytest.approx(difference, rel=1e-9, abs=1e-12)


def test_without_an_intervention_it_is_the_update_as_it_is(monkeypatch):
    step, shortcut = made(monkeypatch)
    effect = shortcut.effect()
    assert effect.tokens == 0
    assert effect.change.deltaH1.token.value == pytest.approx(step.found.total.deltaH1.token.value, rel=1e-12)
    assert effect.difference.deltaH1.token.value == 0.0
    assert effect.difference.deltaH1.token.se == 0.0


def test_differences_are_paired(monkeypatch):
    """On the same E and U: far better known than the changes themselves, where an intervention changes little."""
    _, shortcut = made(monkeypatch)
    effect = shortcut.effect(parse_intervention("positive_advantage(weight=0.9)"))
    unpaired = math.hypot(effect.change.deltaH1.token.se, shortcut.effect().change.deltaH1.token.se)
    assert effect.difference.deltaH1.token.se < 0.5 * unpaired


def made_change(H, R, shared, P=8):
    """A change with entropy and reward of given values and errors 1, correlated."""
    g = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(P, 3, generator=g, dtype=torch.float64))[0]
    scale = math.sqrt((P - 1) / P)
    first, second = scale * x[:, 0], scale * (shared * x[:, 0] + math.sqrt(1 - shared**2) * x[:, 1])
    token, reward = Estimate(H, first), Estimate(R, second)
    pair = PerEstimand(token, token)
    return Change(pair, pair, reward)


def test_entropy_per_reward_is_their_ratio_with_the_interval_of_fieller():
    """The ends are where a linear combination of the two is just compatible with 0."""
    found = entropy_per_reward(made_change(-30.0, 12.0, 0.6))
    assert found.value == pytest.approx(-2.5)
    for x in found.ci95:
        combination = made_change(-30.0, 12.0, 0.6)
        rest = combination.deltaH1.token - combination.deltaR1.scaled(x)
        t = student_quantile(min(combination.deltaH1.token.df, combination.deltaR1.df))
        assert abs(rest.value) == pytest.approx(t * rest.se, rel=1e-6)
    assert found.ci95[0] < found.value < found.ci95[1]


def test_entropy_per_reward_is_not_told_where_the_reward_hardly_changes():
    assert entropy_per_reward(made_change(-30.0, 4.9, 0.0)) is None
    assert entropy_per_reward(made_change(-30.0, 0.0, 0.0)) is None
    assert entropy_per_reward(replace(made_change(-30.0, 9.0, 0.0), deltaR1=None)) is None


@pytest.mark.parametrize("estimand", [TOKEN, SEQUENCE])
@pytest.mark.parametrize("solver", ["learning_rate", "entropy_bonus"])
def test_a_solution_meets_its_target(monkeypatch, solver, estimand):
    _, shortcut = made(monkeypatch)
    here = shortcut.effect().change.deltaH1[estimand].value
    solution = shortcut.solve(0.5 * here, estimand, solver)
    assert solution.setting is not None, solution.reason
    met = shortcut.effect(parse_intervention(solution.intervention)).change.deltaH1[estimand].value
    assert met == pytest.approx(0.5 * here, rel=1e-4)
    if solver == "learning_rate":
        assert solution.setting.value == pytest.approx(0.5)
    assert solution.setting.se > 0


def test_a_target_that_cannot_be_met_is_refused_in_words(monkeypatch):
    _, shortcut = made(monkeypatch)
    here = shortcut.effect().change.deltaH1.token.value
    solution = shortcut.solve(-here, TOKEN, "learning_rate")
    assert solution.setting is None
    assert "no learning rate above 0 changes the sign" in solution.reason
    assert solution.intervention == ""


# ---------------------------------------------------------------- interventions one by one


def plan_with(shortcut, name):
    return parse_intervention(name)(shortcut.plan, shortcut.tokens)


def ratio_to(shortcut, name):
    """What an intervention multiplies the policy-gradient weight of every token by; NaN where that is 0."""
    return plan_with(shortcut, name).weights.policy / shortcut.plan.weights.policy


def test_clip_cov_leaves_out_tokens_in_its_range(monkeypatch):
    _, shortcut = made(monkeypatch)
    C = shortcut.tokens.covariance
    low, high = (float(C[shortcut.tokens.mask].quantile(q)) for q in (0.5, 0.9))
    changed = ratio_to(shortcut, f"clip_cov(ratio=0.05, low={low}, high={high})") == 0
    count = int(0.05 * int(shortcut.tokens.mask.sum()))
    assert int(changed.sum()) == count
    assert bool(((C[changed] > low) & (C[changed] < high)).all())
    none = plan_with(shortcut, "clip_cov(low=1e9, high=2e9)")
    assert torch.equal(none.weights.policy, shortcut.plan.weights.policy)


def test_clip_b_masks_negative_tokens_far_below_the_mean(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens = shortcut.tokens
    S, m = tokens.discriminator, tokens.mask
    below = m & (tokens.A < 0) & (S - S[m].mean() < -1.0 * S[m].std(unbiased=False))
    assert bool(below.any())
    plan = plan_with(shortcut, "clip_b(mu=1)")
    assert torch.equal(plan.inputs.mask, m & ~below)
    # what the loss divides by shrinks, as the response mask does in the authors' code
    kept = plan.inputs.mask & (shortcut.plan.weights.policy != 0)
    factor = (plan.weights.policy / shortcut.plan.weights.policy)[kept]
    assert torch.allclose(factor, torch.full_like(factor, int(m.sum()) / int(plan.inputs.mask.sum())))


def test_clip_v_masks_at_most_a_share(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens = shortcut.tokens
    ahead = tokens.expected_discriminator - tokens.discriminator
    chosen = tokens.mask & (tokens.A < 0) & (ahead > 0.5 * ahead[tokens.mask].std(unbiased=False))
    assert int(chosen.sum()) > 2
    free = plan_with(shortcut, "clip_v(mu=0.5, most=1.0)")
    assert torch.equal(tokens.mask & ~free.inputs.mask, chosen)
    one = plan_with(shortcut, "clip_v(mu=0.5)")
    assert int((tokens.mask & ~one.inputs.mask).sum()) == 1
    worst = torch.where(chosen, ahead, -math.inf)
    assert bool((tokens.mask & ~one.inputs.mask)[worst == worst.max()].all())


def test_steer_weighs_between_its_least_weight_and_one(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens = shortcut.tokens
    found = ratio_to(shortcut, "steer")
    acting = shortcut.plan.weights.policy != 0
    p = tokens.p
    omega = (tokens.A * (1 - p) * (tokens.logprob + tokens.entropy)).abs()
    k = -math.log(0.8) / max(float(omega[tokens.mask].max()), 0.02)
    assert torch.allclose(found[acting], (-k * omega).exp()[acting], rtol=1e-6)


def test_stare_is_a_gate_and_two_weights(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens, acting = shortcut.tokens, shortcut.plan.weights.policy != 0
    assert float(tokens.entropy[tokens.mask].mean()) > 0.3
    assert bool((ratio_to(shortcut, "stare")[acting] == 1).all())
    found = ratio_to(shortcut, "stare(target=9)")
    for sign, weight in ((1, 1.1), (-1, 0.9)):
        of = tokens.mask & (tokens.A.sign() == sign)
        chosen = acting & of & ((found - weight).abs() < 1e-9)
        assert int(chosen.sum()) == math.ceil(0.1 * int(of.sum()))
        assert float(-tokens.logprob[chosen].min()) >= float(-tokens.logprob[of & ~chosen].max()) - 5


def test_masks_by_advantage_and_class(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens, acting = shortcut.tokens, shortcut.plan.weights.policy != 0
    assert torch.equal(ratio_to(shortcut, "negative_only")[acting] == 0, (tokens.A > 0)[acting])
    assert torch.equal(ratio_to(shortcut, "positive_only")[acting] == 0, (tokens.A < 0)[acting])
    positive = ratio_to(shortcut, "positive_advantage(weight=0.25)")[acting]
    assert torch.allclose(positive, (1 - 0.75 * (tokens.A > 0).double())[acting])
    dropped = ratio_to(shortcut, "drop(tokens_of=eos)")[acting] == 0
    assert torch.equal(dropped, tokens.classes["eos"][acting])
    with pytest.raises(ConfigError, match=r"expected drop\(tokens_of=...\) with one of right, eos"):
        plan_with(shortcut, "drop(tokens_of=left)")


def test_quantile_baseline_and_advantages(monkeypatch):
    step, shortcut = made(monkeypatch)
    own = step.U.group == step.U.group[0]
    rewards = step.U.rewards[own]
    found = plan_with(shortcut, "quantile_baseline(K=0.4)").inputs.advantages[own]
    expected = (rewards - rewards.quantile(0.4)) / (rewards.std() + STD_EPSILON)
    assert torch.allclose(found, expected)
    plain = plan_with(shortcut, "quantile_baseline(K=0.4, std=false)").inputs.advantages[own]
    assert torch.allclose(plain, rewards - rewards.quantile(0.4))
    centred = plan_with(shortcut, "advantage(kind=dr_grpo)").inputs.advantages[own]
    assert torch.allclose(centred, rewards - rewards.mean())
    without = Shortcut(
        shortcut.found, replace(shortcut.tokens, rewards=None), shortcut.settings, shortcut.inputs
    )
    with pytest.raises(ConfigError, match="quantile_baseline: expected rewards of U"):
        plan_with(without, "quantile_baseline")
    one = INTERVENTIONS["quantile_baseline"]
    assert "expected rewards of U" in one.lacks(without.tokens, shortcut.settings)
    assert one.lacks(shortcut.tokens, shortcut.settings) == ""


def test_those_that_act_on_ratios_only_change_nothing_on_fresh_rollouts(monkeypatch):
    for off_policy in (False, True):
        _, shortcut = made(monkeypatch, off_policy=off_policy)
        before = shortcut.plan.weights.policy
        for name in ("kl_cov", "ce_gppo", "clip_higher(high=5.0)"):
            same = torch.allclose(plan_with(shortcut, name).weights.policy, before, rtol=1e-12, atol=1e-15)
            assert same != off_policy, name


def test_kl_cov_and_ce_gppo_by_hand(monkeypatch):
    _, shortcut = made(monkeypatch, off_policy=True)
    tokens = shortcut.tokens
    each = token_normaliser("dapo", tokens.mask, 0)
    ratio = (tokens.logprob - tokens.old_logprob).exp()
    top = tokens.top(tokens.covariance, max(1, int(0.2 * int(tokens.mask.sum()))))
    expected = -each * ratio * tokens.A + each * 2.0 * (tokens.logprob - tokens.old_logprob).sign() * top
    assert torch.allclose(
        plan_with(shortcut, "kl_cov(share=0.2, coef=2)").weights.policy, expected, atol=1e-12
    )
    below, above = (ratio < 0.8) & (tokens.A < 0), (ratio > 1.2) & (tokens.A > 0)
    clipped = 0.5 * 0.8 * below.double() + 1.2 * above.double()
    found = plan_with(shortcut, "ce_gppo").weights.policy - shortcut.plan.weights.policy
    assert bool(below.any())
    assert torch.allclose(found, -each * clipped * tokens.A, atol=1e-12)


def test_entropic_pushes_the_tokens_that_are_sure(monkeypatch):
    _, shortcut = made(monkeypatch)
    tokens = replace(shortcut.tokens, logprob=torch.where(shortcut.tokens.mask, -0.01, 0.0))
    plan = parse_intervention("entropic(target=0.1, gain=0.5)")(shortcut.plan, tokens)
    alpha = min(0.5 * (float(tokens.entropy[tokens.mask].mean()) - 0.1), 1.0)
    each = token_normaliser("dapo", tokens.mask, 0)
    ratio = (tokens.logprob - tokens.old_logprob).exp()
    assert torch.allclose(plan.extra, -alpha * each * ratio * tokens.A.abs(), atol=1e-15)


def test_settings_of_the_loss(monkeypatch):
    step, shortcut = made(monkeypatch, LossSettings(loss="dapo", entropy_coef=0.1))
    assert plan_with(shortcut, "entropy_bonus(coef=0.2)").settings.entropy_coef == pytest.approx(0.3)
    assert (
        plan_with(shortcut, "learning_rate(factor=0.5)+learning_rate(factor=0.5)").learning_rate_factor
        == 0.25
    )
    top = plan_with(shortcut, "top_entropy(share=0.3)").weights
    expected = loss_weight_parts(replace(step.update.loss, top_entropy_quantile=0.3), step.update.inputs)
    assert torch.equal(top.policy, expected.policy)
    masking = replace(step.update.loss, mask_truncated_completions=True)
    cut = plan_with(shortcut, "mask_truncated").weights
    assert torch.allclose(cut.policy, loss_weight_parts(masking, step.update.inputs).policy)
    zero = step.U.advantages == 0
    masked = plan_with(shortcut, "drop_zero_advantage")
    assert not bool(masked.inputs.mask[zero].any())


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "reinforce"])
def test_leaving_responses_out_is_the_update_without_them(monkeypatch, loss):
    """Of whatever a loss divides by: against the weights of a batch that does not have them."""
    step, shortcut = made(monkeypatch, LossSettings(loss=loss, entropy_coef=0.3))
    kept = step.U.advantages != 0
    assert bool(kept.any())
    assert not bool(kept.all())
    found = plan_with(shortcut, "drop_zero_advantage").weights
    expected = loss_weight_parts(step.update.loss, step.update.inputs.rows(kept))
    assert torch.allclose(found.policy[kept], expected.policy, rtol=1e-12, atol=1e-18)
    assert torch.allclose(found.bonus[kept], expected.bonus, rtol=1e-12, atol=1e-18)
    assert not bool(found.policy[~kept].any())
    twice = plan_with(shortcut, "drop_zero_advantage+drop_zero_advantage").weights
    assert torch.allclose(twice.policy, found.policy)


def test_terms_that_were_added_are_averaged_over_the_tokens_that_are_left(monkeypatch):
    _, shortcut = made(monkeypatch, off_policy=True)
    one, other = (
        plan_with(shortcut, name).weights.policy
        for name in ("kl_cov(share=1.0)+drop_zero_advantage", "drop_zero_advantage+kl_cov(share=1.0)")
    )
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-15)


def test_a_number_of_tokens_that_was_recorded_shrinks_with_the_batch(monkeypatch):
    step, shortcut = made(monkeypatch)
    recorded = replace(shortcut.inputs, loss_tokens=2.0 * float(step.U.mask.sum()))
    own = Shortcut(shortcut.found, shortcut.tokens, shortcut.settings, recorded)
    for name in ("drop_zero_advantage", "mask_truncated", "clip_b(mu=1)"):
        with_it, without = (plan_with(one, name).weights.policy for one in (own, shortcut))
        assert torch.allclose(2 * with_it, without, rtol=1e-12, atol=1e-18), name


def test_terms_that_an_intervention_adds_are_masked_and_weighed_by_later_ones(monkeypatch):
    step, shortcut = made(monkeypatch, off_policy=True)
    tokens = shortcut.tokens
    for name in ("kl_cov(share=0.5)", "ce_gppo", "entropic(target=0.0)"):
        weights = plan_with(shortcut, f"{name}+negative_only").weights.policy
        assert not bool(weights[tokens.A > 0].any()), name
        cut = plan_with(shortcut, f"mask_truncated+{name}").weights.policy
        assert not bool(cut[step.U.truncated].any()), name
        cut = plan_with(shortcut, f"{name}+mask_truncated").weights.policy
        assert not bool(cut[step.U.truncated].any()), name


@pytest.mark.parametrize(
    "settings", [{"loss": "cispo"}, {"loss": "sapo"}, {"importance_sampling_level": "sequence"}]
)
@pytest.mark.parametrize("name", ["clip_higher", "ce_gppo", "kl_cov"])
def test_what_is_about_clipped_ratios_needs_a_loss_that_clips_them(monkeypatch, settings, name):
    _, shortcut = made(monkeypatch, LossSettings(**{"loss": "dapo", **settings}))
    with pytest.raises(ConfigError, match="expected a loss that clips the ratios of tokens"):
        plan_with(shortcut, name)


def test_what_a_loss_multiplies_tokens_by_knows_its_microbatches(monkeypatch):
    step, _ = made(monkeypatch, LossSettings(loss="bnpo", per_device_train_batch_size=5))
    weights, inputs = step.weights.policy, step.update.inputs
    normaliser = update_normaliser(step.update.loss, inputs)
    assert torch.allclose(weights, -normaliser * inputs.advantages.unsqueeze(1), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_kov", "expected one of .* found 'clip_kov'; did you mean clip_cov"),
        ("clip_cov(rate=1)", r"expected options of clip_cov \(ratio=0.0002.* found 'rate=1'"),
        ("clip_cov(ratio=much)", r"expected a float for clip_cov\(ratio=...\), found 'much'"),
        ("clip_cov(ratio=1e999)", r"expected a float for clip_cov\(ratio=...\)"),
        ("clip_cov(seed=0.5)", r"expected a int for clip_cov\(seed=...\)"),
        ("mask_truncated(x=1)", r"expected options of mask_truncated \(none\)"),
        ("clip_cov()()", "expected options of clip_cov"),
        ("clip_cov(", "expected name or name"),
        ("", "expected name or name"),
        ("clip_cov+", "expected name or name"),
        ("__import__('os')", "expected one of"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_intervention(text)


def test_what_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="expected names such as clip_cov"):
        parse_intervention({"clip_cov": 1})


@pytest.mark.parametrize(
    "text",
    ["steer(w_min=0.0)", "stare(share=-0.5)", "kl_cov(share=2)", "clip_cov(ratio=-1)", "clip_v(most=-1)",
     "top_entropy(share=0.0)", "quantile_baseline(K=2)", "advantage(kind=x)",
     "clip_higher(high=0.0)", "learning_rate(factor=-1)"],
)  # fmt: skip
def test_options_out_of_range_are_refused(monkeypatch, text):
    _, shortcut = made(monkeypatch)
    with pytest.raises(ConfigError, match=r"whatif.interventions: expected"):
        plan_with(shortcut, text)
    with pytest.raises(ConfigError, match=r"whatif.interventions: expected"):
        parse_intervention(text).check()


def test_a_new_intervention_is_a_function_with_a_decorator():
    @intervention("made_up", "here")
    def made_up(plan, tokens, *, by: float = 2.0):
        """It does something."""
        return plan.times(torch.full(tokens.mask.shape, by))

    try:
        assert parse_intervention("made_up(by=3)").steps[0][1] == {"by": 3.0}
        with pytest.raises(ValueError, match="expected a new name"):
            intervention("made_up", "here")(made_up)
        with pytest.raises(ValueError, match="expected a docstring"):
            intervention("silent", "here")(lambda plan, tokens: plan)

        def without(plan, tokens, *, by):
            """It has no default."""

        with pytest.raises(ValueError, match="expected a default for every option"):
            intervention("no_default", "here")(without)
    finally:
        del INTERVENTIONS["made_up"]


def test_a_plan_is_the_loss_as_it_is(monkeypatch):
    step, _ = made(monkeypatch)
    plan = Plan.of(step.update.loss, step.update.inputs)
    assert torch.equal(plan.weights.policy, step.weights.policy)
