"""What the phases take from fewer passes is what all of them would give."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import probe.phases.entropy_gradient as phase
from probe.config.parsing import parse_config
from probe.estimand import ESTIMANDS, PerEstimand
from probe.estimators.noise_floor import FEWEST_RESPONSES, rescored_noise_floor
from probe.estimators.prediction import change_along
from probe.module import EntropyProbe
from probe.phases.entropy_gradient import spread_responses
from probe.phases.passes import StepOnBatch, along_step, tangents_of
from probe.phases.prediction import predict
from probe.runner import TrainerSection
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.score import score_tokens
from probe.snapshot import evaluation_mode
from tests.support.tiny_models import lora_checkpoint, save_base


def lengths(completions: list[str], **_: Any) -> list[float]:
    """A reward with some spread."""
    return [0.01 * len(text) + float(text.count("1")) for text in completions]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    return lora_checkpoint(folder / "step_60", save_base(folder / "tiny"))[0]


@pytest.fixture
def loaded(checkpoint, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} apples", "answer": ""}) + "\n" for i in range(90)))

    def load(dtype: str = "float64", log: str | None = None, E: int = 48, **rework: Any) -> EntropyProbe:
        config = parse_config(
            {
                "checkpoint": {"checkpoint_path": str(checkpoint), "dtype": dtype},
                "batch_config": {
                    "dataset_name": str(prompts),
                    "split": "train",
                    "reward": "tests.phases.test_passes:lengths",
                    "disjoint": False,
                    **{"B_E": E, "B_U": 4, "G": 4},
                },
                "generation": {"max_new_tokens": 8},
                "memory_config": {"microbatch_size": 16},
                "probe_rework": rework,
                "detailed_logging": {"enabled": log is not None, "level": log or "standard"},
            },
            TrainerSection,
        )
        module = EntropyProbe(config.probe, 3, config.given)
        module.load(torch.device("cpu"))
        return module

    return load


@pytest.fixture
def a_part(monkeypatch):
    """X from two responses per prompt of U, so that a small E has more than that."""
    monkeypatch.setattr(phase, "SPREAD_RESPONSES", 2)
    monkeypatch.setattr(phase, "LEAST_SPREAD_RESPONSES", 8)


@pytest.mark.parametrize("mode", ["auto", "finite_difference"])
def test_the_spread_over_updates_takes_x_from_a_part_of_the_batch(loaded, a_part, mode):
    module = loaded(derivative_mode=mode)
    with evaluation_mode(module):
        sample = module.sample()
        derivative, update = module.entropy_gradient(sample), module.update(sample)
        found = module.prediction(sample, derivative, update)
        whole = phase.entropy_gradient(module.policy, sample, module.config.probe_rework, whole=True)
    assert derivative.rows is not None
    assert derivative.X.responses == len(derivative.rows) == 8
    assert derivative.X.pathwise is None
    assert whole.rows is None
    assert whole.X.responses == 48
    # of the same responses backward and derivatives per token are one number
    # norms in float32; what a difference at scale 1 may be off by; the token estimand is a difference of larger terms
    limit = 1e-5 if mode == "auto" else 3e-3
    assert found.prediction.agreement < limit
    assert found.prediction.sd_U is not None
    part = predict(found.passes.rows(derivative.rows), sample.E.group[derivative.rows], update.learning_rate)
    for one, other in zip(change_along(derivative.X, update.step), part.deltaH1, strict=True):
        assert one == pytest.approx(other, rel=10 * limit)
    # deltaH1 itself is that of all responses
    everywhere = predict(found.passes, sample.E.group, update.learning_rate)
    assert list(found.prediction.estimates["causal"].map(lambda e: e.value)) == pytest.approx(
        list(everywhere.deltaH1)
    )
    for one, other in zip(change_along(whole.X, update.step), everywhere.deltaH1, strict=True):
        assert one == pytest.approx(other, rel=limit)


def test_a_log_of_every_sequence_and_backward_take_x_from_all_of_it(loaded, a_part):
    for settings in ({"log": "detailed"}, {"derivative_mode": "reverse"}):
        module = loaded(**settings)
        with evaluation_mode(module):
            assert module.entropy_gradient(module.sample()).rows is None


def test_no_x_where_nothing_needs_it(loaded):
    module = loaded(update_spread=False)
    with evaluation_mode(module):
        assert module.entropy_gradient(module.sample()).X is None


def test_differences_as_configured_go_on_without_x_where_backward_cannot_be_used(loaded, monkeypatch, caplog):
    module = loaded(derivative_mode="finite_difference")

    def refuse(*_: Any) -> None:
        raise RuntimeError("this kernel has no backward")

    monkeypatch.setattr(phase, "own_gradient", refuse)
    with evaluation_mode(module):
        found = module.entropy_gradient(module.sample())
    assert found.way.mode == "finite_difference"
    assert found.X is None
    assert "this kernel has no backward" in caplog.text


def test_the_part_takes_whole_prompts_at_random(loaded):
    module = loaded(E=90)
    with evaluation_mode(module):
        E = module.sample().E
    E = replace(E, group=torch.arange(90) // 3)
    rows = spread_responses(E, 2)
    assert rows is not None
    assert 32 <= len(rows) <= 34
    assert torch.equal(E.group[rows].unique().repeat_interleave(3), E.group[rows])
    assert rows.tolist() != list(range(len(rows)))
    assert torch.equal(rows, spread_responses(E, 2))
    assert spread_responses(E, 20) is None


def test_differences_along_another_direction_are_the_derivatives(loaded):
    """As long as those along the step are; and forward mode where these are not known to be."""
    module = loaded()
    with evaluation_mode(module):
        sample = module.sample()
        update, policy = module.update(sample), module.policy
        scores = score_tokens(policy, sample.E)
        way = module.entropy_gradient(sample).way
        passes = along_step(StepOnBatch(policy, sample.E, update.step, scores), way)
        generator = torch.Generator().manual_seed(0)
        direction = {
            n: 300.0 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in policy.parameters.items()
        }
        exact = forward_tangents(policy, sample.U, direction).vector()
        move = float(torch.cat([x.flatten() for x in update.step.values()]).norm())
        assert passes.difference_scale is not None
        by_differences = tangents_of(policy, sample.U, direction, passes, move).vector()
        unknown = replace(passes, check=None)
        assert unknown.difference_scale is None
        by_forward_mode = tangents_of(policy, sample.U, direction, unknown, move).vector()
    assert torch.equal(by_forward_mode, exact)
    assert 0 < float((by_differences - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 10.0**k) for k in range(-4, 1)] + [("float64", 1e-3)]
)
@pytest.mark.parametrize("microbatch", [1, 8])
def test_one_side_is_taken_where_it_holds_and_nowhere_else(loaded, dtype, size, microbatch):
    """From steps that bend to steps that rounding swallows: what is taken is right to 5 % or so."""
    module = loaded(dtype=dtype)
    with evaluation_mode(module):
        sample = module.sample()
        policy = replace(module.policy, microbatch_size=microbatch)
        generator = torch.Generator().manual_seed(0)
        step, direction = (
            {n: torch.randn(p.shape, generator=generator) for n, p in policy.parameters.items()}
            for _ in range(2)
        )
        length = float(torch.cat([x.flatten() for x in step.values()]).norm())
        step = {n: size / length * x for n, x in step.items()}
        scores, here = score_tokens(policy, sample.E), score_tokens(policy, sample.U)
        way = module.entropy_gradient(sample).way
        passes = along_step(StepOnBatch(policy, sample.E, step, scores), way)
        exact = forward_tangents(policy, sample.U, direction).vector()
        taken = []

        def progress(what):
            taken.append(what)
            return lambda done, total: None

        found = tangents_of(policy, sample.U, direction, passes, size, progress, here=here).vector()
    assert float((found - exact).norm() / exact.norm()) < 0.1
    if dtype == "float64":  # a short move, and nothing is rounded that counts
        assert taken == ["score U along X"]


def test_the_second_order_by_differences_is_the_nested_one(loaded):
    found = {}
    for curvature in ("auto", "jvp"):
        module = loaded(curvature=curvature, update_spread=False)
        with evaluation_mode(module):
            sample = module.sample()
            found[curvature] = module.prediction(
                sample, module.entropy_gradient(sample), module.update(sample)
            )
    auto, nested = (found[name].prediction for name in ("auto", "jvp"))
    assert (auto.curvature_mode, nested.curvature_mode) == ("finite_difference", "jvp")
    assert found["auto"].passes.new is not None  # the ground truth's own scores
    for estimand in ESTIMANDS:
        one, other = auto.deltaH2[estimand], nested.deltaH2[estimand]
        assert one.value == pytest.approx(other.value, rel=0.02, abs=0.02 * other.se)
        assert one.se == pytest.approx(other.se, rel=0.02)


def test_a_noise_floor_stops_where_it_is_fine_enough_and_bounds_that_of_all(loaded):
    module = loaded(dtype="float32", E=200)
    with evaluation_mode(module):
        sample = module.sample()
        step, policy = module.update(sample).step, module.policy
        floors = {
            enough: rescored_noise_floor(
                policy, sample.E, sample.E_scores, step, 5, PerEstimand(enough, enough)
            )
            for enough in (1.0, 0.0)
        }
    part, whole = floors[1.0], floors[0.0]
    assert part.responses == FEWEST_RESPONSES
    assert whole.responses == 200
    for estimand in ESTIMANDS:
        assert 0 < whole.size[estimand] < 1e-4
        assert part.size[estimand] >= 0.5 * whole.size[estimand]
