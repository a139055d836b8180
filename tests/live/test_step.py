"""One probed step against exact numbers: a float64 policy whose whole sample space is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2

import probe.live.source
import probe.live.step
import probe.phases.passes as passes_module
from probe.data.batch import PromptExample, RolloutBatch
from probe.errors.exceptions import NumericalError, RolloutError
from probe.estimand import SEQUENCE, TOKEN
from probe.live import WatchSettings
from probe.live.source import SampledSource
from probe.live.step import UpdateProbe
from probe.rollouts.sampling import SampledTokens
from probe.scoring import Policy
from tests.support import tiny_models
from tests.support.enumerable import CAP, EOS, float64_norm, naive_scores, tiny_model
from tests.support.exact import (
    enumerate_prompts,
    exact,
    exact_derivatives,
    plain_scores,
    take_scores,
    take_tangents,
)
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import add_lora

PROMPTS = {"a": (0, 1), "b": (2, 0)}
TEMPERATURE = 0.8
BOTH = ("", "_tok")


class Tokenizer:
    """Two prompts, four tokens."""

    eos_token_id = pad_token_id = EOS

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(PROMPTS[text])}

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return [str(row) for row in rows]


def make(monkeypatch: pytest.MonkeyPatch, seed: int = 0, **settings: Any) -> SimpleNamespace:
    """A probe, an AdamW that has taken two steps, and everything enumerated."""
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
    model = tiny_model(seed)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    defaults = {
        "B_E": 48,
        "max_new_tokens": CAP,
        "temperature": TEMPERATURE,
        "microbatch_size": 256,
        "generation_batch_size": 256,
        "control_variates": False,
        "shares": False,
    }
    own = WatchSettings(**{**defaults, **settings})
    prompts = [PromptExample(text, {}, k) for k, text in enumerate(PROMPTS)]
    probe_ = UpdateProbe(model, parameters, SampledSource(Tokenizer(), prompts, own), own)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.02, betas=(0.8, 0.99), weight_decay=2.0)
    made = SimpleNamespace(
        model=model, parameters=parameters, probe=probe_, optimizer=optimizer, seed=seed,
        policy=Policy(model, temperature=TEMPERATURE), all=enumerate_prompts(list(PROMPTS.values())),
    )  # fmt: skip
    for k in range(2):
        step(made, k)
    return made


def step(made: SimpleNamespace, k: int = 2) -> None:
    g = torch.Generator().manual_seed(100 * made.seed + k)
    for p in made.parameters.values():
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
    made.optimizer.step()


def values_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters.items()}


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(values[n])


def moved_by(made: SimpleNamespace, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach() - old[n] for n, p in made.parameters.items()}


def exact_change(made: SimpleNamespace, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Exact `H` before, change and slope along the step, each `[seq, tok]`."""
    direction, new = moved_by(made, old), values_of(made.parameters)
    put(made.parameters, old)
    slope, _ = exact_derivatives(made.policy, made.all, direction)
    put(made.parameters, new)
    with torch.no_grad():
        before, after = exact(made.policy, made.all, old)[0], exact(made.policy, made.all, new)[0]
    return before, after - before, slope


# ---------------------------------------------------------------- in distribution


def tabulate(monkeypatch: pytest.MonkeyPatch, made: SimpleNamespace) -> None:
    """Draw E from the table of all responses, and look scores and derivatives up in tables made once.

    The sampler and the passes have tests of their own; a repetition of what the probe makes of them is then cheap.
    """
    everything = made.all
    with torch.no_grad():
        probability = exact(made.policy, everything)[1]
        l, h = plain_scores(made.policy, everything)
    tangents_of, score = passes_module.scores_and_tangents, probe.live.step.score_tokens
    table: dict[Any, Any] = {}

    def looked_up(key: Any, make_: Any) -> Any:
        if key not in table:
            table[key] = make_()
        return table[key]

    def draw(policy: Policy, tokenizer: Any, chosen: Any, generation: Any, seed: int) -> Any:
        prompts = torch.tensor([example.index for example in chosen])
        inside = torch.where(everything.group == prompts.unsqueeze(1), probability, 0.0)
        rows = torch.multinomial(inside, 1, generator=torch.Generator().manual_seed(seed)).flatten()
        numbers = tuple({"number": int(r)} for r in rows)
        E = replace(everything.subset(rows), group=torch.arange(len(rows)), rows=numbers)
        return E, SampledTokens(l[rows], h[rows])

    def rows_of(E: RolloutBatch) -> Tensor:
        return torch.tensor([row["number"] for row in E.rows])

    def forward_mode(
        policy: Policy,
        E: RolloutBatch,
        direction: Mapping[str, Tensor],
        basis: Any = None,
        progress: Any = None,
    ) -> Any:
        key = (id(basis), *(float(x.sum()) for x in direction.values()))
        scores, tangents = looked_up(key, lambda: tangents_of(policy, everything, direction, basis))
        return take_scores(scores, rows_of(E)), take_tangents(tangents, rows_of(E))

    def rescore(policy: Policy, E: RolloutBatch) -> Any:
        assert policy.values is None  # at the new parameters
        return take_scores(looked_up("new", lambda: score(policy, everything)), rows_of(E))

    monkeypatch.setattr(probe.live.source, "sample_rollouts", draw)
    monkeypatch.setattr(passes_module, "scores_and_tangents", forward_mode)
    monkeypatch.setattr(probe.live.step, "score_tokens", rescore)


CONFIGURATIONS = {
    "as drawn": ({"B_E": 100}, 120, ("H_orig", "deltaH1", "deltaH_true")),
    "control variates and shares": (
        {"B_E": 64, "control_variates": True, "shares": True},
        100,
        ("H_orig", "deltaH1", "deltaH_true", "deltaH1_momentum", "deltaH1_decay", "deltaH1_gradient"),
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_z_scores_against_the_exact_numbers(monkeypatch, name):
    """The same step probed with many E's: errors are as large as they are said to be, and have no bias."""
    settings, n, keys = CONFIGURATIONS[name]
    made = make(monkeypatch, **settings)
    old, state = values_of(made.parameters), made.optimizer.state_dict()
    state = {k: {m: v.clone() for m, v in s.items()} for k, s in state["state"].items()}
    step(made)
    new = values_of(made.parameters)
    H, change, slope = exact_change(made, old)
    truth = {"H_orig": H, "deltaH1": slope, "deltaH_true": change}
    if settings.get("shares"):
        for part, direction in reference_parts(made, old, state).items():
            put(made.parameters, old)
            truth[f"deltaH1_{part}"] = exact_derivatives(made.policy, made.all, direction)[0]
    put(made.parameters, old)
    tabulate(monkeypatch, made)
    z: dict[str, list[float]] = {key + suffix: [] for key in keys for suffix in BOTH}
    for k in range(n):
        put(made.parameters, old)
        before = made.probe.before(k + 1)
        put(made.parameters, new)
        found = made.probe.after(before, [made.optimizer]).values
        for key in keys:
            for which, suffix in enumerate(BOTH):
                error = found[key + suffix] - float(truth[key][which])
                z[key + suffix].append(error / found[f"{key}{suffix}_se"])
        t = float(stats.t.ppf(0.975, found["deltaH1_df"]))
        half = found["deltaH1_ci95"][1] - found["deltaH1"]
        assert half == pytest.approx(t * found["deltaH1_se"], rel=2e-3)
    for key, scores in z.items():
        found = torch.tensor(scores)
        assert abs(float(found.mean())) < 3 / math.sqrt(n), (key, float(found.mean()))
        assert 0.85 < float(found.std()) < 1.15, (key, float(found.std()))
        assert 0.9 <= float((found.abs() < 1.96).double().mean()) <= 0.98, key
    if name != "as drawn":  # later probes learn from earlier ones
        assert len(made.probe.memory.batches) == 64


def reference_parts(
    made: SimpleNamespace, old: Mapping[str, Tensor], state: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Parts of the AdamW step from the moments before it; formulas of theory.md, section 4."""
    lr, (b1, b2), decay, eps = 0.02, (0.8, 0.99), 2.0, 1e-8
    parts: dict[str, dict[str, Tensor]] = {"momentum": {}, "decay": {}, "gradient": {}}
    for k, (n, p) in enumerate(made.parameters.items()):
        m, v, g = state[k]["exp_avg"], state[k]["exp_avg_sq"], p.grad
        P = -lr / (1 - b1**3) / (((b2 * v + (1 - b2) * g**2) / (1 - b2**3)).sqrt() + eps)
        parts["momentum"][n], parts["gradient"][n] = P * b1 * m, P * (1 - b1) * g
        parts["decay"][n] = -lr * decay * old[n]
    return parts


# ---------------------------------------------------------------- on the same E, exactly


def naive(made: SimpleNamespace, E: RolloutBatch, direction: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """`(l, h, dl, dh)` at the present parameters, by backward through backward."""
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    values = {n: p.detach() + s * direction[n] for n, p in made.parameters.items()}
    l, h = plain_scores(made.policy, E, values)
    found = []
    for x in (l, h):
        u = torch.zeros_like(x, requires_grad=True)
        (slope,) = torch.autograd.grad((u * x).sum(), s, create_graph=True)
        found.append(torch.autograd.grad(slope, u, retain_graph=True)[0])
    return l.detach(), h.detach(), *found


def loops(E: RolloutBatch, h: Tensor, dl: Tensor, dh: Tensor) -> dict[str, tuple[float, float]]:
    """DeltaH1 with causal weights and leave-one-out baselines, and with matched ones; written as sums over tokens."""
    B = len(E)
    lengths = E.mask.sum(1).tolist()
    N = [float(h[i].sum()) for i in range(B)]
    mean_N, mean_T = sum(N) / B, sum(lengths) / B
    pathwise = float(dh.sum()) / B
    causal = [0.0, 0.0]
    matched = [0.0, 0.0]
    ones = E.mask.double()
    for i in range(B):
        for t in range(lengths[i]):
            others = [j for j in range(B) if j != i and lengths[j] > t]
            for which, x in enumerate((h, ones)):
                baseline = sum(float(x[j, t + 1 :].sum()) for j in others) / max(len(others), 1)
                causal[which] += float(dl[i, t]) * (float(x[i, t + 1 :].sum()) - baseline) / B
            matched[0] += float(dl[i, t]) * (N[i] - mean_N) / B
            matched[1] += float(dl[i, t]) * (lengths[i] - mean_T) / B
    out = {}
    for name, (score, length) in (("causal", causal), ("matched", matched)):
        out[name] = (pathwise + score, (pathwise + score - mean_N / mean_T * length) / mean_T)
    return out


def reweighted(E: RolloutBatch, ratio: Tensor, h: Tensor, per_decision: bool) -> tuple[float, float]:
    """`(H_seq, H_tok)` of the new policy, sequence by sequence."""
    T = E.mask.shape[1]
    N = L = 0.0
    if not per_decision:
        w = ratio.sum(1).exp()
        N, L = float((w * h.sum(1)).sum() / w.sum()), float((w * E.mask.sum(1)).sum() / w.sum())
        return N, N / L
    for t in range(T):
        rho = ratio[:, :t].sum(1).exp()
        N += float((rho * h[:, t]).sum() / rho.sum())
        L += float((rho * E.mask[:, t]).sum() / rho.sum())
    return N, N / L


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_are_those_of_independent_loops_over_the_same_responses(monkeypatch, seed):
    made = make(monkeypatch, seed, B_E=12)
    old = values_of(made.parameters)
    before = made.probe.before(5)
    step(made)
    outcome = made.probe.after(before, [made.optimizer])
    found, E, direction = outcome.values, before.E, moved_by(made, old)
    l_new, h_new = (x.detach() for x in plain_scores(made.policy, E))
    put(made.parameters, old)
    l, h, dl, dh = naive(made, E, direction)
    expected = loops(E, h, dl, dh)
    H = float(h.sum() / len(E)), float(h.sum() / E.mask.sum())
    per_decision = reweighted(E, l_new - l, h_new, True)
    snis = reweighted(E, l_new - l, h_new, False)
    for which, estimand in enumerate((SEQUENCE, TOKEN)):
        suffix = estimand.suffix
        assert found[f"H_orig{suffix}"] == pytest.approx(H[which], rel=1e-12)
        assert found[f"deltaH1{suffix}"] == pytest.approx(expected["causal"][which], rel=1e-9)
        assert found[f"deltaH_true{suffix}"] == pytest.approx(per_decision[which] - H[which], rel=1e-9)
        residual = expected["matched"][which] - (snis[which] - H[which])
        assert found[f"residual{suffix}"] == pytest.approx(residual, rel=1e-8, abs=1e-13)
        assert outcome.deltaH1[estimand].value == found[f"deltaH1{suffix}"]
        assert outcome.deltaH_true[estimand].value == found[f"deltaH_true{suffix}"]
        assert outcome.H[estimand].se == found[f"H_orig{suffix}_se"]
    assert found["learning_rate"] == 0.02
    assert found["B_E"] == 12
    assert found["avg_generation_length"] == float(E.lengths.double().mean())
    length = math.sqrt(sum(float(x.square().sum()) for x in direction.values()))
    assert found["step_norm"] == pytest.approx(length, rel=1e-12)
    assert torch.equal(outcome.H.sequence.influence, (h.sum(1) - h.sum(1).mean()) / 12) or torch.allclose(
        outcome.H.sequence.influence, (h.sum(1) - h.sum(1).mean()) / 12, atol=1e-12
    )
    assert set(found["timing"]) == {"sample", "derivative", "rescoring"}


def test_the_residual_on_the_same_responses_vanishes_like_the_square_of_the_step(monkeypatch):
    """The derivative of snis at 0 is the matched prediction exactly: no sampling error is left in the difference."""
    made = make(monkeypatch, B_E=16)
    old = values_of(made.parameters)
    step(made)
    direction = moved_by(made, old)
    residuals, slopes = [], []
    for size in (1e-1, 1e-2, 1e-3):
        put(made.parameters, old)
        before = made.probe.before(1)
        put(made.parameters, {n: old[n] + size * direction[n] for n in old})
        found = made.probe.after(before, [made.optimizer]).values
        residuals.append([found[f"residual{s}"] / size**2 for s in BOTH])
        slopes.append([found[f"deltaH1{s}"] / size for s in BOTH])
    for which in range(2):
        a, b, c = (r[which] for r in residuals)
        assert abs(c) > 1e-6
        assert b == pytest.approx(c, rel=0.1)
        assert a == pytest.approx(c, rel=0.6)
        assert slopes[0][which] == pytest.approx(slopes[2][which], rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"control_variates": True, "B_E": 64}])
def test_differences_of_forwards_give_the_numbers_of_forward_mode(monkeypatch, options):
    results = {}
    for mode in ("jvp", "finite_difference"):
        made = make(monkeypatch, derivative=mode, shares=True, **options)
        made.probe.rehearse()
        assert made.probe.way.mode == mode
        for number in range(1, 3):  # the second one has control variates, where they are on
            before = made.probe.before(number)
            step(made, 1 + number)
            results[mode] = made.probe.after(before, [made.optimizer]).values
    jvp, differences = results["jvp"], results["finite_difference"]
    names = [
        f"{key}{s}"
        for key in ("deltaH1", "deltaH1_momentum", "deltaH1_gradient", "deltaH1_decay")
        for s in BOTH
    ]
    for name in names:
        size = max(abs(jvp[name]), jvp[f"{name}_se"])
        assert differences[name] == pytest.approx(jvp[name], abs=1e-2 * size), name
        assert differences[f"{name}_se"] == pytest.approx(jvp[f"{name}_se"], rel=2e-2), name
    for suffix in BOTH:
        # the ground truth takes no derivative, but for the control variates
        rel = 1e-2 if options else 1e-9
        assert differences[f"deltaH_true{suffix}"] == pytest.approx(jvp[f"deltaH_true{suffix}"], rel=rel)
    if options:
        assert "causal+cv" not in jvp["verdict"]
        assert made.probe.memory is not None


# ---------------------------------------------------------------- parts


def test_parts_are_directional_derivatives_and_add_up(monkeypatch):
    made = make(monkeypatch, B_E=12, shares=True)
    old = values_of(made.parameters)
    state = {k: {m: v.clone() for m, v in s.items()} for k, s in made.optimizer.state_dict()["state"].items()}
    before = made.probe.before(3)
    step(made)
    found = made.probe.after(before, [made.optimizer]).values
    parts = reference_parts(made, old, state)
    put(made.parameters, old)
    for name, direction in parts.items():
        _, h, dl, dh = naive(made, before.E, direction)
        expected = loops(before.E, h, dl, dh)["causal"]
        for which, suffix in enumerate(BOTH):
            assert found[f"deltaH1_{name}{suffix}"] == pytest.approx(expected[which], rel=1e-7, abs=1e-12), (
                name
            )
    for suffix in BOTH:
        total = sum(found[f"deltaH1_{name}{suffix}"] for name in parts)
        assert total == pytest.approx(found[f"deltaH1{suffix}"], rel=1e-12)
        low, high = found[f"deltaH1{suffix}_ci95"]
        for name in parts:
            share = found[f"{name}_share{suffix}"]
            if low <= 0 <= high:
                assert share is None
            else:
                assert share == found[f"deltaH1_{name}{suffix}"] / found[f"deltaH1{suffix}"]
    assert found["shares_error"] < 1e-12


def test_shares_are_told_only_where_the_total_is_told_from_0(monkeypatch):
    made = make(monkeypatch, B_E=64, shares=True)
    resolved = []
    for number in range(1, 9):
        before = made.probe.before(number)
        step(made, 1 + number)
        found = made.probe.after(before, [made.optimizer]).values
        low, high = found["deltaH1_tok_ci95"]
        resolved.append(low > 0 or high < 0)
        assert (found["momentum_share_tok"] is not None) == resolved[-1]
    assert any(resolved)


def test_no_parts_says_why(monkeypatch):
    made = make(monkeypatch, B_E=4, shares=True)
    made.optimizer = torch.optim.RMSprop(list(made.parameters.values()), lr=1e-3)
    before = made.probe.before(1)
    step(made)
    found = made.probe.after(before, [made.optimizer]).values
    assert found["shares_reason"] == "RMSprop is not linear in the gradient"
    assert not [key for key in found if "momentum" in key]

    before = made.probe.before(2)
    step(made)
    found = made.probe.after(before, [made.optimizer], late=True).values
    assert found["shares_reason"] == "the step was known to be over only when the next one began"


# ---------------------------------------------------------------- control variates, noise floor, steps of 0


def test_control_variates_keep_the_mean(monkeypatch):
    """The same E's with and without them: paired, so that a few are enough."""
    found: dict[bool, list[dict[str, Any]]] = {}
    for on in (False, True):
        made = make(monkeypatch, B_E=64, control_variates=on)
        found[on] = []
        for number in range(1, 9):
            before = made.probe.before(number)
            step(made, 1 + number)
            found[on].append(made.probe.after(before, [made.optimizer]).values)
    without, with_ = found[False], found[True]
    assert with_[0]["deltaH1"] == without[0]["deltaH1"]  # the first one has nothing to learn from
    for key in ("deltaH1_tok", "deltaH1", "deltaH_true_tok"):
        pairs = list(zip(with_[2:], without[2:], strict=True))
        assert any(a[key] != b[key] for a, b in pairs)
        apart = [(a[key] - b[key]) / b[f"{key}_se"] for a, b in pairs]
        assert max(map(abs, apart)) < 3
        assert abs(sum(apart)) / math.sqrt(len(apart)) < 2


def test_a_small_sample_uses_no_control_variates(monkeypatch):
    values = []
    for on in (False, True):
        made = make(monkeypatch, B_E=8, control_variates=on)
        for number in (1, 2):
            before = made.probe.before(number)
            step(made, 1 + number)
            found = made.probe.after(before, [made.optimizer]).values
        values.append((found["deltaH1"], found["deltaH_true"]))
    assert values[0] == values[1]


def test_a_step_of_0(monkeypatch):
    made = make(monkeypatch, B_E=4)
    made.optimizer.param_groups[0]["lr"] = 0.0
    before = made.probe.before(1)
    step(made)
    outcome = made.probe.after(before, [made.optimizer])
    assert not outcome.moved
    assert outcome.values["verdict"] == "unresolved"
    assert outcome.values["verdict_reasons"] == [
        "The optimizer's step was exactly 0 (learning rate 0, or gradients of 0)."
    ]
    assert outcome.deltaH_true.token.value == outcome.deltaH_true.token.se == 0.0
    assert outcome.values["deltaH1_tok"] == outcome.values["step_norm"] == 0.0
    assert outcome.values["H_orig_tok"] > 0


def test_a_step_that_is_not_finite(monkeypatch):
    made = make(monkeypatch, B_E=4)
    before = made.probe.before(1)
    step(made)
    name = next(iter(made.parameters))
    with torch.no_grad():
        made.parameters[name].view(-1)[0] = math.nan
    with pytest.raises(NumericalError, match=f"found NaN or infinity in that of {name}"):
        made.probe.after(before, [made.optimizer])


def test_the_noise_floor_is_measured_when_asked_for(monkeypatch):
    made = make(monkeypatch, B_E=8, noise_floor="on")
    before = made.probe.before(1)
    step(made)
    found = made.probe.after(before, [made.optimizer]).values
    assert 0 <= found["diagnostics"]["noise_floor_tok"] < 1e-4
    assert "noise_floor" in found["timing"]


def test_no_response_tokens(monkeypatch):
    made = make(monkeypatch, B_E=4)
    own = probe.live.source.sample_rollouts

    def empty(*args: Any, **kw: Any) -> Any:
        E, seen = own(*args, **kw)
        E.mask.zero_()
        return E, seen

    monkeypatch.setattr(probe.live.source, "sample_rollouts", empty)
    with pytest.raises(RolloutError, match="at least one response token, found 4 empty responses"):
        made.probe.before(1)


def test_every_step_has_a_sample_of_its_own_that_the_seed_decides(monkeypatch):
    made, again = make(monkeypatch, B_E=32), make(monkeypatch, B_E=32)
    other = make(monkeypatch, B_E=32, seed=1)
    one, two = made.probe.before(1).E, made.probe.before(2).E
    assert torch.equal(one.completion_ids, again.probe.before(1).E.completion_ids)
    assert one.prompts != two.prompts
    assert (
        one.prompts != other.probe.before(1).E.prompts
        or one.completions != other.probe.before(1).E.completions
    )
    # prompts are drawn with replacement, each for itself
    assert set(one.prompts) == {"a", "b"}
    assert one.group.tolist() == list(range(32))


# ---------------------------------------------------------------- stopped gradients


def by_differences(probe_, before, new, c=1e-3):
    """The derivative of the entropy per response, as SNIS weights it, along a step: float64 forwards only."""
    model = copy.deepcopy(probe_.model).double().eval()
    named = dict(model.named_parameters())
    old = {n: v.double() for n, v in before.old.items()}

    def scores(values):
        put({n: named[n] for n in old}, values)
        with torch.no_grad():
            l, h = naive_scores(Policy(model, temperature=probe_.settings.temperature), before.E)
        return l.double().sum(1), h.double().sum(1)

    l0, _ = scores(old)

    def entropy_at(eps):
        l, h = scores({n: old[n] + eps * (new[n].double() - old[n]) for n in old})
        return float((torch.softmax(l - l0, 0) * h).sum())

    return (entropy_at(c) - entropy_at(-c)) / (2 * c)


@pytest.mark.parametrize("wanted", ["auto", "jvp", "finite_difference"])
def test_a_norm_that_is_taken_as_constant(monkeypatch, wanted, caplog):
    """DoRA's: backward and forward mode agree, and neither is the derivative of what the policy computes."""
    model = add_lora(tiny_models.tiny_model(hidden=16, layers=2), lora_dropout=0.0, use_dora=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2)
    settings = WatchSettings(B_E=32, max_new_tokens=6, derivative=wanted, control_variates=False)
    prompts = [PromptExample(f"{k} apples", {}, k) for k in range(4)]
    probe_ = UpdateProbe(model, parameters, SampledSource(char_tokenizer(), prompts, settings), settings)
    model.eval()
    probe_.rehearse()
    assert probe_.way.mode == ("finite_difference" if wanted == "finite_difference" else "jvp")
    ratios = []
    for number in (1, 2):
        before = probe_.before(number)
        ids = torch.randint(4, 100, (6, 12), generator=torch.Generator().manual_seed(number))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values = probe_.after(before, [optimizer]).values
        found = next(
            row["value"]
            for row in values["estimates"]
            if (row["quantity"], row["estimator"], row["estimand"]) == ("deltaH1", "matched", "sequence")
        )
        ratios.append(found / by_differences(probe_, before, values_of(parameters)))
    if wanted == "jvp":
        assert values["diagnostics"]["step_difference"] > 0.05
        assert values["verdict"] == "invalid"
        assert any("takes a part of what it computes as a constant" in r for r in values["verdict_reasons"])
        assert any("set derivative: finite_difference" in r for r in values["verdict_reasons"])
        return
    assert probe_.way.mode == "finite_difference"
    assert ratios == pytest.approx([1.0, 1.0], rel=0.02)
    if wanted == "auto":
        assert "DoRA" in probe_.way.reason
        said = caplog.text
        assert said.count("deltaH1 by finite_difference from here on") == 1
