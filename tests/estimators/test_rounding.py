"""Trainings with weights and moments in 16 bits: the step they take is measured, the exact one predicted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from probe import OfflineEntropyProbe
from probe.config.checkpoint import CheckpointConfig
from probe.estimators.rounding import rounded_step
from probe.loading import load_optimizer
from probe.phases.update import optimizer_step
from probe.sweep.rescale import at_learning_rate
from tests.support.tiny_models import add_lora, load_base, save_base, save_checkpoint, take_steps, tiny_model


class Pair(nn.Module):
    """Two parameters of different sizes, with values that bfloat16 has."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("large", (40, 30)), ("small", (7,))):
            values = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(values.bfloat16().to(dtype)))


def written(tmp_path, live: nn.Module, **options: Any):
    """A few steps of `live`; returns its optimizer and the file with its state."""
    kind = options.pop("kind", torch.optim.AdamW)
    optimizer = kind(live.parameters(), **{"lr": 1e-6, "weight_decay": 0.1, "foreach": False, **options})
    take_steps(live, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return optimizer, tmp_path / "optimizer.pt"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-6},
        {"lr": 1e-3},
        {"lr": 1e-2, "amsgrad": True},
        {"kind": torch.optim.Adam, "lr": 1e-4},
        {"lr": 1e-5, "foreach": None, "fused": True},
    ],
)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_it_is_the_step_that_the_training_takes(tmp_path, options, factor):
    live = Pair()
    optimizer, file = written(tmp_path, live, **options)
    model = Pair(torch.float32)
    model.load_state_dict({name: value.float() for name, value in live.state_dict().items()})
    loaded = load_optimizer(model, file, CheckpointConfig())
    assert loaded.rounded == {"large": torch.bfloat16, "small": torch.bfloat16}
    parameters, gradient = dict(model.named_parameters()), gradients(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    taken = optimizer_step(loaded.optimizer, parameters, gradient, None, lr_factor=factor)
    step, new, clip = taken.step, taken.new_parameters, taken.clip_factor
    assert loaded.fused is options.get("fused", False)
    found, rounding = rounded_step(
        loaded.optimizer, parameters, gradient, loaded.rounded, new, clip, factor, loaded.fused
    )
    for group in optimizer.param_groups:
        group["lr"] *= factor
    for name, p in live.named_parameters():
        p.grad = gradient[name].bfloat16()
    optimizer.step()
    changed, total, squares = 0, 0, 0.0
    for name, p in live.named_parameters():
        assert torch.equal(found[name], p.detach().float())
        assert torch.equal(parameters[name], before[name])
        changed += int((p.detach().float() != before[name]).sum())
        squares += float((p.detach().float() - before[name]).square().sum())
        total += p.numel()
    assert rounding.dtype == "bfloat16"
    assert rounding.moved == changed / total
    assert rounding.norm == pytest.approx(squares**0.5, rel=1e-5)
    if options["lr"] < 1e-5:
        assert rounding.moved < 0.05 < rounding.moved_exact
    assert all(bool((step[name] != 0).any()) for name in step)


def test_parameters_in_more_digits_take_the_exact_step(tmp_path):
    live = Pair()
    live.small.data = live.small.data.float() + 1e-5
    _, file = written(tmp_path, live)
    model = Pair(torch.float32)
    model.load_state_dict({name: value.float() for name, value in live.state_dict().items()})
    loaded = load_optimizer(model, file, CheckpointConfig())
    assert loaded.rounded == {"large": torch.bfloat16}
    parameters, gradient = dict(model.named_parameters()), gradients(model)
    new = optimizer_step(loaded.optimizer, parameters, gradient, None).new_parameters
    found, _ = rounded_step(loaded.optimizer, parameters, gradient, loaded.rounded, new)
    assert torch.equal(found["small"], new["small"])
    assert not torch.equal(found["large"], new["large"])


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_rounding_is_taken_for_granted_only_where_weights_and_moments_say_so(tmp_path, moments):
    live = Pair(torch.float32)
    _, file = written(tmp_path, live)
    if moments == "bfloat16":  # of a training that keeps only its moments in few digits
        saved = torch.load(file, weights_only=True)
        for state in saved["state"].values():
            state |= {key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}
        torch.save(saved, file)
    assert load_optimizer(live, file, CheckpointConfig()).rounded == {}
    other = Pair(torch.float32)  # weights saved in 16 bits beside a float32 optimizer
    other.load_state_dict({name: value.bfloat16().float() for name, value in other.state_dict().items()})
    assert load_optimizer(other, file, CheckpointConfig()).rounded == (
        {} if moments == "float32" else {"large": torch.bfloat16, "small": torch.bfloat16}
    )


def ascii_sum(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 5) for text in completions]


def probed(tmp_path, checkpoint, monkeypatch, **rework):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} figs", "answer": str(i)} for i in range(24)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = OfflineEntropyProbe(
        {
            "checkpoint": {"checkpoint_path": str(checkpoint)},
            "batch_config": {
                "dataset_name": "p.jsonl",
                "split": "train",
                "reward": "tests.estimators.test_rounding:ascii_sum",
                "B_E": 16,
                "B_U": 4,
                "G": 4,
            },
            "generation": {"max_new_tokens": 6},
            "memory_config": {"microbatch_size": 8},
            "probe_rework": rework,
            "detailed_logging": {"enabled": False},
            "trainer": {"accelerator": "cpu", "logger": False},
        }
    )
    return probe.run_mixed_probe(), probe


def bf16_checkpoint(folder, lr: float):
    live = tiny_model().bfloat16()
    optimizer = torch.optim.AdamW(live.parameters(), lr=lr, foreach=False)
    take_steps(live, optimizer)
    return save_checkpoint(folder, live, optimizer), live, optimizer


@pytest.mark.parametrize("lr", [1e-6, 1e-3])
@pytest.mark.parametrize("mode", ["auto", "finite_difference"])
def test_the_report_says_both(tmp_path, monkeypatch, lr, mode):
    path, live, optimizer = bf16_checkpoint(tmp_path / "c", lr)
    results, probe = probed(tmp_path, path, monkeypatch, derivative_mode=mode)
    update = probe.runner.state.update
    for name, p in live.named_parameters():
        p.grad = update.gradient[name].bfloat16() * update.clip_factor
    optimizer.step()
    for name, p in live.named_parameters():
        assert torch.equal(update.new_parameters[name], p.detach().float())
    found = results["diagnostics"]
    assert "rounded_step" in found["bias_flags"]
    assert found["rounded_to"] == "bfloat16"
    assert found["rounded_moved"] < found["rounded_moved_exact"]
    assert results["deltaH1"] != 0
    assert results["deltaH_true"] is not None
    assert "residual" not in results
    assert any("rounded away" in reason and "bfloat16" in reason for reason in results["verdict_reasons"])
    assert results["verdict"] != "trustworthy"
    assert any("rounds most of a small step away" in note for note in probe._module.optimizer.notes)


def test_no_word_of_rounding_where_there_is_none(tmp_path, monkeypatch):
    live = tiny_model()
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-4)
    take_steps(live, optimizer)
    results, probe = probed(tmp_path, save_checkpoint(tmp_path / "c", live, optimizer), monkeypatch)
    assert "rounded_step" not in results["diagnostics"]["bias_flags"]
    assert "rounded_to" not in results["diagnostics"]
    assert probe.runner.state.update.rounding is None


def test_an_adapter_in_16_bits(tmp_path, monkeypatch):
    live = add_lora(load_base(save_base(tmp_path / "base"))).bfloat16()
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-5)
    take_steps(live, optimizer)
    results, probe = probed(tmp_path, save_checkpoint(tmp_path / "c", live, optimizer), monkeypatch)
    assert "rounded_step" in results["diagnostics"]["bias_flags"]
    assert set(probe._module.optimizer.rounded) == set(probe.runner.state.update.step)


def test_another_learning_rate_is_rounded_anew(tmp_path, monkeypatch):
    path, _, _ = bf16_checkpoint(tmp_path / "c", 1e-6)
    _, probe = probed(tmp_path, path, monkeypatch)
    small = probe.runner.state.update
    large = at_learning_rate(probe._module, probe.runner.state, 1e-2).update
    assert large.rounding.moved > 0.5 > small.rounding.moved
    for value in large.new_parameters.values():
        assert torch.equal(value, value.bfloat16().float())
