"""One update through the phases of a run and through the drop-in probe, on the same E: every number is the same."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import pytest
import torch

import probe.live.step
from probe.config.parsing import parse_config
from probe.live.outcome import Before
from probe.live.settings import WatchSettings
from probe.live.source import SampledSource
from probe.live.step import UpdateProbe
from probe.module import EntropyProbe
from probe.phases.fit_memory import FitMemory
from probe.phases.state import ProbeState
from probe.results.build import build_result
from probe.rollouts.draw import stream_seed
from probe.runner import TrainerSection
from probe.snapshot import copied, evaluation_mode
from tests.support.tiny_models import lora_checkpoint, save_base

LENGTH = 8
OF_A_RUN = {"B_U", "G", "batch_statistics", "checkpoint_path", "settings", "training_step"}
"""What only a run has: its update batch, and where it comes from."""
OF_ITS_PASSES = {
    "zero_advantage_groups",
    "gradient_norm",
    "clip_factor",
    "step_norm",
    "derivative_check_error",
    "threads",
    "processes",
    "continuous_batching",
    "tokens_per_microbatch",
}
OF_ITS_PASSES |= {"sampling_scoring_gap", "on_policy_z"}
"""Its diagnostics of the update batch and of sampling."""
OF_A_TRAINING = {"avg_generation_length", "step_norm", "shares_error"}
OF_A_TRAINING |= {
    name
    for part in ("momentum", "decay", "gradient")
    for suffix in ("", "_tok")
    for quantity in (f"deltaH1_{part}{suffix}", f"{part}_share{suffix}")
    for name in (quantity, f"{quantity}_se", f"{quantity}_ci95", f"{quantity}_df")
}
"""What only a training has: parts of its step."""


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward with some spread."""
    return [float(sum(c.isdigit() for c in text)) + 0.01 * len(text) for text in completions]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return lora_checkpoint(folder / "step_60", save_base(folder / "tiny"))[0]


def loaded(checkpoint: Any, tmp_path: Any, **rework: Any) -> EntropyProbe:
    """The policy in float64, so that the two differ by nothing but the order of sums."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} apples", "answer": ""}) + "\n" for i in range(40)))
    config = parse_config(
        {
            "checkpoint": {"checkpoint_path": str(checkpoint), "dtype": "float64"},
            "batch_config": {
                "dataset_name": str(prompts),
                "split": "train",
                "reward": "tests.live.test_both_ways:digits",
                **{"B_E": 24, "B_U": 4, "G": 4},
            },
            "generation": {"max_new_tokens": LENGTH, "temperature": 0.8},
            "memory_config": {"microbatch_size": 8},
            "probe_rework": {"update_spread": False, "curvature": "off", **rework},
            "importance": {"noise_floor": True},
        },
        TrainerSection,
    )
    module = EntropyProbe(config.probe, 3, config.given)
    module.load(torch.device("cpu"))
    return module


def by_a_run(module: EntropyProbe) -> tuple[ProbeState, dict[str, Any]]:
    """The phases in their order."""
    state = ProbeState(sample=module.sample())
    state.keep(module.entropy_gradient(state.drawn))
    state.keep(module.update(state.drawn))
    assert state.derivative is not None
    assert state.update is not None
    state.keep(module.prediction(state.drawn, state.derivative, state.update))
    state.keep(module.ground_truth(state.drawn, state.update, state.predicted))
    return state, dict(build_result(state, module.provenance, {}, datetime.now()).values)


def by_a_training(module: EntropyProbe, state: ProbeState, **settings: Any) -> dict[str, Any]:
    """The same E before the same step, which the optimizer really takes."""
    own = WatchSettings(
        max_new_tokens=LENGTH,
        temperature=0.8,
        microbatch_size=8,
        noise_floor="on",
        **settings,
    )
    source = SampledSource(module.tokenizer, module.prompts[0], own)
    watched = UpdateProbe(module.policy.model, module.policy.parameters, source, own)
    sample, update = state.drawn, state.update
    assert update is not None
    assert sample.E_seen is not None
    if sample.controls.memory is not None:
        watched.memory = FitMemory(sample.controls.memory.basis, "live")
    if watched.settings.derivative == "finite_difference":
        watched.rehearse()
    before = Before(7, sample.E, sample.E_seen, copied(watched.parameters), seconds=0.0)
    optimizer = module.loaded_optimizer.optimizer
    for name, p in module.policy.parameters.items():
        p.grad = update.gradient[name] * update.clip_factor
    optimizer.step()
    for name, p in module.policy.parameters.items():
        assert torch.equal(p, update.new_parameters[name])
    return watched.after(before, [optimizer]).values


def numbers(tree: Any, path: str = "") -> dict[str, float]:
    """Every number of a result by its path."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in numbers(value, f"{path}/{key}").items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in numbers(value, f"{path}/{i}").items()}
    if isinstance(tree, (int, float)) and not isinstance(tree, bool):
        return {path: float(tree)}
    return {}


@pytest.mark.parametrize("controls", ["off", "on"])
@pytest.mark.parametrize("mode", ["jvp", "finite_difference"])
def test_the_same_step_both_ways(checkpoint, tmp_path, monkeypatch, mode, controls):
    monkeypatch.setattr(probe.live.step, "stream_seed", lambda *_: stream_seed(3, "sham step"))
    monkeypatch.setattr(
        probe.live.step, "too_few_prompts", lambda *_, **__: ""
    )  # as a run does that insists on them
    module = loaded(checkpoint, tmp_path, derivative_mode=mode, control_variates=controls)
    with evaluation_mode(module):
        state, run = by_a_run(module)
        training = by_a_training(
            module, state, derivative=mode, control_variates=controls == "on", shares=True
        )
    assert (run["diagnostics"]["control_variates"], training["diagnostics"]["control_variates"]) == (
        ("on: fitted on other prompts", "on: fitted on other prompts and 0 earlier probes")
        if controls == "on"
        else ("off: probe_rework.control_variates", "off: control_variates")
    )
    own = {
        path: value
        for path, value in numbers(run).items()
        if path.split("/")[1] not in {"timing", "throughput", *OF_A_RUN}
        and path.removeprefix("/diagnostics/") not in OF_ITS_PASSES
    }
    others = {
        path: value
        for path, value in numbers(training).items()
        if path.split("/")[1] not in {"timing", *OF_A_TRAINING}
    }
    assert own.keys() == others.keys()
    assert len(own) > 80
    for key, value in own.items():
        assert others[key] == pytest.approx(value, rel=1e-7, abs=1e-13), key
    assert training["step_norm"] == pytest.approx(run["diagnostics"]["step_norm"], rel=1e-12)
    assert math.isfinite(training["deltaH1_momentum"])
