"""The drop-in probe in a loop of Lightning Fabric's, in one process and in two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn

import probe
from probe.live import Alarm
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import numbers
from tests.support.tiny_models import VOCABULARY, add_lora, tiny_model
from tests.support.trainings import bits, in_two_processes, set_streams, streams

pytestmark = [
    # Lightning 2.6 about torch 2.13
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
]

PROMPTS = [f"q{i}:" for i in range(6)]
PROBE: dict[str, Any] = {"every": 1, "B_E": 6, "max_new_tokens": 6}
STEPS = 6


def batches(rank: int = 0, steps: int = STEPS) -> list[torch.Tensor]:
    """Random tokens, others on every rank."""
    generator = torch.Generator().manual_seed(5 + rank)
    return [torch.randint(4, VOCABULARY, (2, 10), generator=generator) for _ in range(steps)]


def train(
    fabric: Fabric, settings: Mapping[str, Any] | None, policy: nn.Module | None = None, steps: int = STEPS
) -> tuple[dict[str, Any], Any, Any]:
    """A Fabric loop as its documentation has it: what must be the same with and without the probe, and the watch."""
    policy = add_lora(tiny_model()) if policy is None else policy
    passes: list[tuple[bool, bool, torch.dtype]] = []
    policy.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, output: passes.append(
            (layer.training, torch.is_autocast_enabled("cpu"), output.dtype)
        )
    )
    plain = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    model, optimizer = fabric.setup(policy, plain)
    model.train()
    watch = None
    if settings is not None:
        watch = probe.watch(model, optimizer, PROMPTS, char_tokenizer(), **{**PROBE, **settings})
    set_streams(3 + fabric.global_rank)
    losses, at_each_step = [], []
    for batch in batches(fabric.global_rank, steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
        at_each_step.append(hash(streams()))
        if watch is not None and watch.should_stop:
            break
    state = {
        "parameters": bits(dict(policy.named_parameters())),
        "buffers": bits(dict(policy.named_buffers())),
        "gradients": {name: bits(p.grad) for name, p in policy.named_parameters()},
        "optimizer": bits(plain.state_dict()),
        "flags": {name: module.training for name, module in model.named_modules()},
        "losses": losses,
        "streams": streams(),
        "streams at each step": at_each_step,
    }
    return state, watch, (policy, plain, passes)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_bitwise_as_without_the_probe(precision):
    found = []
    for settings in (None, {}):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        state, watch, (policy, optimizer, passes) = train(fabric, settings)
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        assert {(on, kind) for flag, on, kind in passes if flag} == {(precision == "bf16-mixed", dtype)}
        assert {on for flag, on, _ in passes if not flag} == (set() if settings is None else {False})
        found.append((state, watch, policy, optimizer))
    (plain, _, _, _), (probed, watch, policy, optimizer) = found
    for name in plain:
        assert plain[name] == probed[name], name
    assert watch.model is policy  # not Fabric's wrapper, whose forward has autocast in it
    assert watch.optimizers == [optimizer]
    assert [entry["step"] for entry in watch.history] == list(range(1, STEPS + 1))
    assert all(entry["step_norm"] > 0 for entry in watch.history)
    assert all(("noise_floor_tok" in entry) == (precision == "bf16-true") for entry in watch.history)
    assert watch.error is None


def test_numbers_go_to_fabrics_loggers(tmp_path):
    logger = CSVLogger(tmp_path, "csv")
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger])
    with_names: list[tuple[set[str], int]] = []

    def log(metrics: Mapping[str, float], step: int) -> None:
        with_names.append((set(metrics), step))
        fabric.log_dict(metrics, step)

    _, watch, _ = train(fabric, {"every": 2, "log": log})
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    column, steps = header.index("entropy_probe/H_orig_tok"), header.index("step")
    rows = [line.split(",") for line in lines[1:]]
    assert [int(row[steps]) for row in rows] == [step for _, step in with_names] == [1, 3, 5]
    assert [float(row[column]) for row in rows] == [entry["H_orig_tok"] for entry in watch.history]
    groups = ("", "_curves", "_details", "_ground_truth", "_prediction")
    prefixes = tuple(f"entropy_probe{group}/" for group in groups)
    assert all(name.startswith(prefixes) for names, _ in with_names for name in names)


def test_log_dict_itself_is_a_log(tmp_path):
    logger = CSVLogger(tmp_path, "csv")
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger])
    train(fabric, {"every": 3, "log": fabric.log_dict})
    logger.save()
    assert len((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()) == 3


def test_a_module_set_up_without_its_optimizer():
    fabric = Fabric(accelerator="cpu", devices=1)
    policy = tiny_model()
    model = fabric.setup_module(policy)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1e-2))
    with probe.watch(model, optimizer, PROMPTS, char_tokenizer(), **PROBE) as watch:
        batch = batches()[0]
        fabric.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
    assert watch.model is policy
    assert watch.last["step"] == 1


@pytest.mark.parametrize("kind", ["lambda", "one cycle", "sequential", "cosine"])
def test_a_scaled_learning_rate_stays_scaled(kind):
    """Rates from an alarm on are those of the schedule times the factor."""
    from torch.optim import lr_scheduler

    def rates(factor: float) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = {
            "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9, cycle_momentum=False),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 9),
            "sequential": lambda: lr_scheduler.SequentialLR(
                optimizer,
                [lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
                [5],
            ),
        }[kind]()
        found = []
        for step in range(8):
            optimizer.step()
            if step == 3:
                nothing: Any = None
                alarm = Alarm(4, "", nothing, {}, nothing, [optimizer], lambda: None)
                alarm.scale_learning_rate(factor, scheduler)
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    plain, scaled = rates(1.0), rates(0.1)
    assert scaled[:3] == plain[:3]
    assert scaled[3:] == pytest.approx([0.1 * rate for rate in plain[3:]], rel=1e-6)


# ---------------------------------------------------------------- two processes


def fabric_ddp(folder: Path, settings: Mapping[str, Any] | None) -> tuple[Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    state, watch, (_, optimizer, _) = train(fabric, settings)
    assert isinstance(optimizer, torch.optim.AdamW)
    history = None if watch is None else watch.history
    return state, history


def test_two_processes_probe_together(tmp_path):
    plain = in_two_processes(fabric_ddp, tmp_path, None)
    probed = in_two_processes(fabric_ddp, tmp_path, {})
    for rank in range(2):
        for name in plain[rank][0]:
            assert plain[rank][0][name] == probed[rank][0][name], (rank, name)
    assert plain[0][0]["losses"] != plain[1][0]["losses"]  # the ranks see other batches
    assert plain[0][0]["parameters"] == plain[1][0]["parameters"]  # and average their gradients
    assert [entry["step"] for entry in probed[0][1]] == list(range(1, STEPS + 1))
    assert bits(numbers(probed[1][1])) == bits(numbers(probed[0][1]))
