"""The drop-in probe in Lightning's Trainer: training must not notice it, and it must report."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from probe.callbacks.training_lightning import EntropyProbeCallback
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError
from probe.estimators.loss_settings import LossSettings
from probe.live import Alarm, HostUpdate
from probe.live.lines import probe_line
from probe.live.names import full_name, monitored
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import numbers
from tests.support.terminal import Terminal, logger_of_nobody
from tests.support.tiny_models import VOCABULARY, add_lora, tiny_model
from tests.support.trainings import bits, break_probe, in_two_processes, set_streams, streams

pytestmark = [
    # Lightning 2.6 about torch 2.13, and about data loaders and loggers of a size that is right for tests
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the logging interval:UserWarning"),
]

PROMPTS = [f"q{i}:" for i in range(6)]
PROBE: dict[str, Any] = {"prompts": PROMPTS, "every": 1, "B_E": 6, "max_new_tokens": 6}
STEPS = 10
Muon = getattr(torch.optim, "Muon", torch.optim.SGD)  # since torch 2.9


# ---------------------------------------------------------------- trainings


class LanguageModel(LightningModule):
    """Automatic optimisation: the loss and its gradient are worked out in a closure, inside of `optimizer.step`."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = tiny_model(attention_dropout=0.1) if model is None else model
        self.tokenizer = char_tokenizer()
        self.losses: list[float] = []
        self.seen: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.note(batch, loss)
        return loss

    def note(self, batch: torch.Tensor, loss: torch.Tensor) -> None:
        self.losses.append(float(loss.detach()))
        self.seen.append(batch.flatten().tolist())
        self.log("loss", loss.detach())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 4) / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ActorCritic(LanguageModel):
    """Manual optimisation: REINFORCE on responses that are sampled in the step, with a critic of its own optimizer."""

    def __init__(self) -> None:
        super().__init__(add_lora(tiny_model()))
        self.reference = tiny_model(seed=5).requires_grad_(False)
        self.critic = nn.Linear(1, 1)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        actor, critic = self.optimizers()
        with torch.no_grad():
            texts = self.model.generate(
                input_ids=batch[:, :4],
                attention_mask=torch.ones_like(batch[:, :4]),
                max_new_tokens=5,
                do_sample=True,
            )
            self.reference(input_ids=texts)
        reward = (texts == 1).float().sum(1) + texts[:, 4:].float().mean(1) / VOCABULARY
        value = self.critic(torch.ones(1, 1))
        critic.zero_grad()
        self.manual_backward((value - reward).square().mean())
        critic.step()
        self.toggle_optimizer(actor)
        logits = self.model(input_ids=texts).logits[:, 3:-1]
        taken = torch.log_softmax(logits.float(), -1).gather(2, texts[:, 4:, None]).squeeze(2)
        self.latest = texts, (reward - value.detach()).squeeze(0)
        loss = -((reward - value.detach()).squeeze(0) * taken.sum(1)).mean()
        actor.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(actor, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        actor.step()
        self.untoggle_optimizer(actor)
        self.note(texts, loss)
        return loss

    def configure_optimizers(self) -> Any:
        mine = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(mine, lr=1e-3), torch.optim.SGD(self.critic.parameters(), lr=1e-2)


class Telling(ActorCritic):
    """Tells the probe which batch its updates are made from."""

    def entropy_probe_update(self, policy: Any) -> HostUpdate:
        texts, advantages = self.latest
        rows = texts.tolist()
        batch = RolloutBatch(
            prompts=("",) * len(rows),
            completions=("",) * len(rows),
            prompt_ids=tuple(tuple(row[:4]) for row in rows),
            completion_ids=texts[:, 4:],
            mask=torch.ones_like(texts[:, 4:], dtype=torch.bool),
            truncated=torch.ones(len(rows), dtype=torch.bool),
            group=torch.arange(len(rows)),
            advantages=advantages.double(),
        )
        return HostUpdate(batch, LossSettings(loss="reinforce"))


class TwoOptimizers(LanguageModel):
    """Manual optimisation with the policy's matrices in one optimizer and the rest in another."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        optimizers = self.optimizers()
        loss = self.model(input_ids=batch, labels=batch).loss
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.note(batch, loss)
        return loss

    def configure_optimizers(self) -> Any:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        return Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)


class StreamWatcher(Callback):
    """Notes the random streams where each step begins."""

    def __init__(self) -> None:
        self.streams: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.streams.append(hash(streams()))


def loader(rows: int = 64) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(torch.randint(4, VOCABULARY, (rows, 10), generator=generator), 2, shuffle=True)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": STEPS,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def hooks(trainer: Trainer) -> int:
    """How many hooks there are on the optimizers."""
    kept = [(o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in trainer.optimizers]
    return sum(len(before) + len(after) for before, after in kept)


def train(
    folder: Path, module: LanguageModel, probe: dict[str, Any] | None, *more: Callback, **options: Any
) -> tuple[dict[str, Any], Any, Trainer]:
    """The final state of a training with or without the probe, the probe's callback, and the trainer."""
    callback = None if probe is None else EntropyProbeCallback(**{**PROBE, **probe})
    watcher = StreamWatcher()
    trainer = make_trainer(folder, *([] if callback is None else [callback]), watcher, *more, **options)
    set_streams()
    trainer.fit(module, loader())
    state = {
        "parameters": bits(dict(module.named_parameters())),
        "buffers": bits(dict(module.named_buffers())),
        "gradients": {name: bits(p.grad) for name, p in module.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in module.named_parameters()},
        "optimizers": [bits(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [repr(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "losses": module.losses,
        "batches": module.seen,
        "flags": {name: submodule.training for name, submodule in module.named_modules()},
        "streams": streams(),
        "streams at each step": watcher.streams,
        "steps": trainer.global_step,
    }
    return state, callback, trainer


# ---------------------------------------------------------------- neutrality


@pytest.mark.parametrize(
    ("kind", "options", "updates"),
    [
        (LanguageModel, {}, STEPS),
        (LanguageModel, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, STEPS // 2),
        (LanguageModel, {"precision": "bf16-mixed"}, STEPS),
        (ActorCritic, {}, STEPS),
        (ActorCritic, {"precision": "bf16-mixed"}, STEPS),
        (TwoOptimizers, {}, STEPS),
    ],
    ids=[
        "automatic",
        "accumulated",
        "bf16-mixed",
        "actor-critic",
        "actor-critic-bf16-mixed",
        "two-optimizers",
    ],
)
def test_training_is_bitwise_as_without_the_probe(tmp_path, kind, options, updates):
    found = []
    for probe in (None, {"policy": "model"} if kind is ActorCritic else {}):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the critic
            module = kind()
        passes: list[tuple[bool, bool, torch.dtype]] = []
        module.model.get_output_embeddings().register_forward_hook(
            lambda layer, inputs, output, to=passes: to.append(
                (layer.training, torch.is_autocast_enabled("cpu"), output.dtype)
            )
        )
        state, callback, trainer = train(tmp_path, module, probe, **options)
        mixed = options.get("precision") == "bf16-mixed"
        assert {(on, dtype) for flag, on, dtype in passes if flag} == {
            (mixed, torch.bfloat16 if mixed else torch.float32)
        }
        # the probe's own passes are without autocast, also where `step` is called inside of it
        assert {(on, dtype) for flag, on, dtype in passes if not flag} == (
            set() if probe is None else {(False, torch.float32)}
        )
        found.append((state, callback, trainer))
    (plain, _, _), (probed, callback, trainer) = found
    for name in plain:
        assert plain[name] == probed[name], name
    history = callback.watch.history
    assert [entry["step"] for entry in history] == list(range(1, updates + 1))
    warm = history[1:] if trainer.lr_scheduler_configs else history  # the first learning rate is 0 there
    assert all(entry["step_norm"] > 0 and entry["deltaH_true_tok"] != 0 for entry in warm)
    assert len(warm) == len(history) or history[0]["step_norm"] == 0.0
    policys = trainer.optimizers[: 2 if kind is TwoOptimizers else 1]
    assert list(callback.watch.optimizers) == policys
    assert callback.watch.error is None
    assert not callback.watch.active
    assert hooks(trainer) == 0


def test_a_probe_that_fails_leaves_training_bitwise_as_it_was(tmp_path, monkeypatch, caplog):
    plain, _, _ = train(tmp_path, LanguageModel(), None)
    break_probe(monkeypatch, at=2)
    with caplog.at_level(logging.WARNING, logger="probe.live"):
        probed, callback, trainer = train(tmp_path, LanguageModel(), {})
    for name in plain:
        assert plain[name] == probed[name], name
    assert str(callback.watch.error) == "a broken probe"
    assert [entry["step"] for entry in callback.watch.history] == [1]
    assert "switched off at step 2, training goes on: RuntimeError: a broken probe" in caplog.text
    assert hooks(trainer) == 0


# ---------------------------------------------------------------- console


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_probes_lines_stand_above_the_trainers_bar(tmp_path, monkeypatch, kind, columns):
    logger_of_nobody(monkeypatch)
    with Terminal(columns) as terminal:
        terminal.take_over(monkeypatch)
        _, callback, _ = train(
            tmp_path, LanguageModel(), {"every": 2}, kind(), enable_progress_bar=True, limit_train_batches=6
        )
    lines = terminal.lines
    bars = [line for line in lines if "Epoch 0" in line]
    assert len(bars) == 1
    assert bars[0].startswith("Epoch 0")
    assert "6/6" in bars[0]
    text = " ".join(" ".join(line for line in lines if line not in bars).split())
    assert [entry["step"] for entry in callback.watch.history] == [1, 3, 5]
    for entry in callback.watch.history:
        assert f"entropy probe: {probe_line(entry)}" in text
    assert "entropy probe: summary: 3 of 6 steps probed" in text
    assert all("entropy probe" not in line or line.startswith("entropy probe") for line in lines)


# ---------------------------------------------------------------- results


def test_results_reach_every_logger(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    caplog.set_level(logging.INFO, "probe.live")
    for probe in (None, {"every": 2}):
        folder = tmp_path / ("plain" if probe is None else "probed")
        csv, board = CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")
        _, callback, _ = train(
            folder,
            LanguageModel(),
            probe,
            logger=[csv, board],
            accumulate_grad_batches=2,
            limit_train_batches=12,
        )
        rows.append(pd.read_csv(Path(csv.log_dir) / "metrics.csv"))
    plain, probed = rows
    history = callback.watch.history
    assert [entry["step"] for entry in history] == [1, 3, 5]
    assert caplog.text.count("3 of 6 steps probed") == 1
    # the training's own rows are as without the probe
    own = probed[probed["loss"].notna()][list(plain.columns)].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, plain, check_dtype=False)  # epochs beside gaps are no integers
    # Lightning counts the steps that were taken before: the update 3 is logged at 2, as the loss of its batch is
    mine = probed[probed["entropy_probe/H_orig_tok"].notna()]
    assert mine["step"].tolist() == [0, 2, 4]
    for name in ("H_orig_tok", "deltaH1_tok", "deltaH_true_tok", "step_norm", "learning_rate"):
        assert mine[full_name(name)].tolist() == pytest.approx([e[name] for e in history], rel=1e-12)
    (events,) = Path(board.log_dir).glob("events.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    points = [(e.step, e.value) for e in reader.Scalars("entropy_probe/deltaH_true_tok")]
    assert points == [
        (entry["step"] - 1, pytest.approx(entry["deltaH_true_tok"], rel=1e-6)) for entry in history
    ]
    assert "loss" in reader.Tags()["scalars"]
    (chart,) = reader.Tensors("custom_scalars__config__")
    assert b"entropy_probe/H_orig_tok" in chart.tensor_proto.string_val[0]
    assert b"train/entropy_probe" not in chart.tensor_proto.string_val[0]


def test_a_resumed_training_goes_on_with_curves_and_forecast(tmp_path):
    """Epochs of 4 steps; the run that is interrupted after the first must go on as if it had not been."""
    probe = {"control_variates": False}  # what these learned is not in the checkpoint
    options = {"limit_train_batches": 4}
    whole = EntropyProbeCallback(**{**PROBE, **probe})
    make_trainer(tmp_path, whole, max_epochs=2, **options).fit(LanguageModel(tiny_model()), ordered())
    first = EntropyProbeCallback(**{**PROBE, **probe})
    trainer = make_trainer(tmp_path, first, max_epochs=1, **options)
    trainer.fit(LanguageModel(tiny_model()), ordered())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    second = EntropyProbeCallback(**{**PROBE, **probe})
    make_trainer(tmp_path, second, max_epochs=2, **options).fit(
        LanguageModel(tiny_model()), ordered(), ckpt_path=tmp_path / "last.ckpt"
    )
    times = ("seconds", "cost_share")
    found, expected = (
        [{k: v for k, v in entry.items() if k not in times} for entry in callback.watch.history]
        for callback in (second, whole)
    )
    assert [entry["step"] for entry in found] == list(range(1, 9))
    assert [repr(entry) for entry in found] == [repr(entry) for entry in expected]
    assert math.isfinite(found[-1]["entropy_rate"])


def test_a_training_that_was_begun_without_the_probe_goes_on_counting(tmp_path):
    options = {"limit_train_batches": 2}
    trainer = make_trainer(tmp_path, max_epochs=1, **options)
    trainer.fit(LanguageModel(tiny_model()), ordered())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = EntropyProbeCallback(**PROBE)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, **options)
    trainer.fit(LanguageModel(tiny_model()), ordered(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 4
    assert [entry["step"] for entry in callback.watch.history] == [3, 4]


def test_the_tokens_of_a_batch_that_the_module_tells(tmp_path):
    module = Telling()
    for part in module.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    callback = EntropyProbeCallback(PROMPTS, every=1, B_E=8, max_new_tokens=5, attribution=True, strict=True)
    make_trainer(tmp_path, callback, max_steps=6).fit(module, loader())
    history = callback.watch.history
    assert history
    assert not [entry["attribution_reason"] for entry in history if "attribution_reason" in entry]
    assert all(0 < entry["attribution_scale"] <= 1.01 for entry in history)
    assert any("deltaH1_positive_tok" in entry for entry in history)
    callback = EntropyProbeCallback(PROMPTS, every=1, B_E=8, max_new_tokens=5, attribution=True)
    with pytest.raises(ConfigError, match=r"attribution: expected a method `entropy_probe_update\(policy\)`"):
        make_trainer(tmp_path, callback, max_steps=1).fit(ActorCritic(), loader())


def test_an_alarm_stops_training(tmp_path):
    state, callback, trainer = train(
        tmp_path, LanguageModel(), {"collapse_entropy": 100.0, "on_alarm": "stop"}
    )
    assert trainer.should_stop
    # the first step of the warm-up was none: three readings after four steps
    assert state["steps"] == callback.watch.last["step"] == 4
    assert callback.watch.last["alarms"] == [callback.watch.last["step"]]


def test_an_alarm_is_passed_on(tmp_path):
    alarms: list[Alarm] = []

    def lower(alarm: Alarm) -> None:
        alarms.append(alarm)
        alarm.scale_learning_rate(0.1)

    module = LanguageModel()
    _, callback, trainer = train(tmp_path, module, {"collapse_entropy": 100.0, "on_alarm": lower})
    (alarm,) = alarms
    assert isinstance(alarm, Alarm)
    assert alarm.step == 4
    assert alarm.model is module.model
    assert list(alarm.optimizers) == trainer.optimizers
    assert trainer.global_step == STEPS
    # the scheduler works every rate out anew
    rates = [entry["learning_rate"] for entry in callback.watch.history]
    assert rates == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3] + [1e-4] * (STEPS - 4))


def test_strict_raises_and_leaves_no_hooks(tmp_path, monkeypatch):
    break_probe(monkeypatch, at=2)
    module, callback = LanguageModel(), EntropyProbeCallback(**PROBE, strict=True)
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(RuntimeError, match="a broken probe"):
        trainer.fit(module, loader())
    assert [entry["step"] for entry in callback.watch.history] == [1]
    assert hooks(trainer) == 0


class BrokenLogger(CSVLogger):
    """Cannot write from the second entry of the probe on; the training's own it can."""

    calls = 0

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("entropy_probe/") for name in metrics):
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("strict", [False, True])
def test_a_logger_that_fails_is_left_alone(tmp_path, caplog, strict):
    broken, sound = BrokenLogger(tmp_path, "broken"), CSVLogger(tmp_path, "sound")
    module, callback = LanguageModel(), EntropyProbeCallback(**PROBE, strict=strict)
    trainer = make_trainer(tmp_path, callback, logger=[broken, sound])
    if strict:
        with pytest.raises(OSError, match="No space left"):
            trainer.fit(module, loader())
        return
    trainer.fit(module, loader())
    assert len(callback.watch.history) > 2
    assert broken.calls == 2
    rows = pd.read_csv(Path(sound.log_dir) / "metrics.csv")
    assert rows["entropy_probe/H_orig_tok"].notna().sum() == len(callback.watch.history)
    assert caplog.text.count("BrokenLogger failed and gets nothing from the probe any more") == 1


def test_an_exception_in_training_leaves_no_hooks(tmp_path):
    class Broken(LanguageModel):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("the training's own")
            return super().training_step(batch, index)

    callback = EntropyProbeCallback(**PROBE)
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(RuntimeError, match="the training's own"):
        trainer.fit(Broken(), loader())
    assert [entry["step"] for entry in callback.watch.history] == [1, 2]
    assert hooks(trainer) == 0


# ---------------------------------------------------------------- two processes


def calm_down(alarm: Alarm) -> None:
    alarm.scale_learning_rate(0.1)


def ddp(folder: Path, probe: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    state, callback, trainer = train(folder, LanguageModel(), probe, devices=2, strategy="ddp")
    assert trainer.world_size == 2
    history = None if callback is None else callback.watch.history
    return state, history, trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.slow
def test_an_alarm_of_the_first_process_holds_for_both(tmp_path):
    plain = in_two_processes(ddp, tmp_path, None)
    probed = in_two_processes(ddp, tmp_path, {})
    for rank in range(2):
        for name in plain[rank][0]:
            assert plain[rank][0][name] == probed[rank][0][name], (rank, name)
    assert plain[0][0]["batches"] != plain[1][0]["batches"]
    assert [len(found[1]) for found in probed] == [STEPS, STEPS]
    assert bits(numbers(probed[0][1])) == bits(numbers(probed[1][1]))
    stopped = in_two_processes(ddp, tmp_path, {"collapse_entropy": 100.0, "on_alarm": "stop"})
    assert [found[0]["steps"] for found in stopped] == [4, 4]
    calmed = in_two_processes(ddp, tmp_path, {"collapse_entropy": 100.0, "on_alarm": calm_down})
    assert [found[0]["steps"] for found in calmed] == [STEPS, STEPS]
    assert [found[2] for found in calmed] == pytest.approx([1e-4, 1e-4])
    for name in ("parameters", "optimizers"):
        assert calmed[0][0][name] == calmed[1][0][name]
    assert calmed[0][0]["parameters"] != plain[0][0]["parameters"]


def stopped_early(folder: Path, probe: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """A training that EarlyStopping ends, of one process or of two."""
    stop = EarlyStopping("entropy_probe/H_orig_tok", mode="min", stopping_threshold=100.0)
    options = {"max_epochs": 5, "limit_train_batches": 3, **probe}
    _, callback, trainer = train(folder, LanguageModel(), {"every": 2}, stop, **options)
    kept = {
        name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("entropy_probe/")
    }
    assert kept == pytest.approx(monitored(callback.watch.last), rel=1e-6)
    return trainer.global_step, kept


def test_early_stopping_can_monitor_the_entropy(tmp_path):
    steps, kept = stopped_early(tmp_path, {})
    assert steps == 3
    assert {"entropy_probe/H_orig_tok", "entropy_probe/deltaH1_tok", "entropy_probe/deltaH_true_tok"} <= set(
        kept
    )
    assert "entropy_probe/collapse_chance" not in kept  # that takes three probes


def test_checkpoints_can_be_chosen_by_the_entropy(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="entropy_probe/H_orig_tok", mode="max", every_n_train_steps=1)
    _, callback, _ = train(tmp_path, LanguageModel(), {"every": 4}, best, enable_checkpointing=True)
    levels = [entry["H_orig_tok"] for entry in callback.watch.history]  # kept between probes
    assert float(best.best_model_score) == pytest.approx(max(levels), rel=1e-6)


@pytest.mark.slow
def test_both_processes_have_what_early_stopping_monitors(tmp_path):
    first, second = in_two_processes(stopped_early, tmp_path, {"devices": 2, "strategy": "ddp"})
    assert first == second
    assert first[0] == 3


class Sharded(LanguageModel):
    """Each process holds a part of every weight."""

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def sharded(folder: Path, probe: dict[str, Any] | None) -> tuple[Any, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    state, callback, _ = train(folder, Sharded(), probe, devices=2, strategy=strategy)
    return state, None if callback is None else callback.watch.history


@pytest.mark.slow
def test_a_training_whose_processes_hold_parts_of_the_weights_is_as_without_the_probe(tmp_path):
    plain = in_two_processes(sharded, tmp_path, None)
    probed = in_two_processes(sharded, tmp_path, {"strict": True})
    for rank in range(2):
        for name in plain[rank][0]:
            assert plain[rank][0][name] == probed[rank][0][name], (rank, name)
    assert plain[0][0]["parameters"] != plain[1][0]["parameters"]
    assert [len(found[1]) for found in probed] == [STEPS, STEPS]
    assert bits(numbers(probed[0][1])) == bits(numbers(probed[1][1]))
    last = probed[0][1][-1]
    assert last["deltaH_true"] == pytest.approx(last["deltaH1"], rel=0.1) != 0


# ---------------------------------------------------------------- finding the policy


class Holder(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy


def test_the_policy_can_be_named_with_dots(tmp_path):
    module = LanguageModel()
    module.other = tiny_model(seed=4)  # a second trainable model
    module.inner = Holder(module.model)
    with pytest.raises(
        ConfigError, match=r"one trainable transformers model, found model, other; name its attribute"
    ):
        train(tmp_path, module, {}, limit_train_batches=1)
    _, callback, _ = train(tmp_path, module, {"policy": "inner.policy"}, limit_train_batches=1)
    assert callback.watch.model is module.model
    with pytest.raises(
        ConfigError, match=r"policy: expected an attribute of LanguageModel, found no 'inner.polisy'"
    ):
        train(tmp_path, module, {"policy": "inner.polisy"}, limit_train_batches=1)


def test_a_frozen_reference_is_not_the_policy(tmp_path):
    with torch.random.fork_rng():
        module = ActorCritic()
    _, callback, trainer = train(tmp_path, module, {}, limit_train_batches=1)
    assert callback.watch.model is module.model
    assert list(callback.watch.optimizers) == trainer.optimizers[:1]


def test_there_must_be_a_policy(tmp_path):
    class NoModel(LanguageModel):
        def __init__(self) -> None:
            super().__init__(nn.Linear(1, 1))

    with pytest.raises(ConfigError, match=r"policy: expected NoModel to hold one trainable .* found none"):
        train(tmp_path, NoModel(), {})


def test_there_must_be_a_tokenizer(tmp_path):
    module = LanguageModel()
    del module.tokenizer
    with pytest.raises(ConfigError, match="tokenizer: expected a transformers tokenizer, found NoneType"):
        train(tmp_path, module, {})
    _, callback, _ = train(tmp_path, module, {"tokenizer": char_tokenizer()}, limit_train_batches=1)
    assert len(callback.watch.history) == 1


def test_sharded_training_is_refused(tmp_path):
    class FSDPStrategy:
        pass

    class Fake:
        strategy = FSDPStrategy()

    with pytest.raises(ConfigError, match="FSDP2 by ModelParallelStrategy, found FSDPStrategy"):
        EntropyProbeCallback(**PROBE).on_train_start(Fake(), LanguageModel())  # type: ignore[arg-type]


def test_settings_are_checked_at_once():
    with pytest.raises(ConfigError, match="did you mean every"):
        EntropyProbeCallback(PROMPTS, evry=2)
    with pytest.raises(ConfigError, match="B_E: expected an integer of at least 2"):
        EntropyProbeCallback(PROMPTS, B_E=1)


def test_the_reaction_to_an_alarm_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="on_alarm: expected a function, 'stop' or None, found 'halt'"):
        train(tmp_path, LanguageModel(), {"on_alarm": "halt"})


# ---------------------------------------------------------------- command line


class CommandLineModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        return loader()


CONFIG = """
trainer:
  logger: false
  accelerator: cpu
  devices: 1
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_steps: 3
  callbacks:
  - class_path: probe.callbacks.training_lightning.EntropyProbeCallback
    init_args:
      prompts: ["ab", "cd"]
      on_alarm: stop
      every: 2
      B_E: 4
      max_new_tokens: 6
      temperature: 0.9
      stop_strings: ["xy"]
      derivative: finite_difference
      collapse_entropy: null
"""


@pytest.mark.filterwarnings(
    "ignore"
)  # as for users: raised, jsonargparse's warnings would change what it does
def test_lightning_cli_takes_the_settings(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py"])  # pytest's arguments are none of its business
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what 4.53 renames

    monkeypatch.chdir(tmp_path)  # where it writes config.yaml

    def parsed(name: str) -> LightningCLI:
        arguments = ["--config", name]
        return LightningCLI(CommandLineModel, run=False, args=arguments, seed_everything_default=False)

    Path("given.yaml").write_text(CONFIG, encoding="utf-8")
    cli = parsed("given.yaml")
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, EntropyProbeCallback)]
    cli.trainer.fit(cli.model)
    settings = callback.watch.settings
    assert (settings.every, settings.B_E, settings.max_new_tokens, settings.temperature) == (2, 4, 6, 0.9)
    assert settings.stop_strings == ("xy",)
    assert (settings.derivative, settings.collapse_entropy, settings.budget) == (
        "finite_difference",
        None,
        0.05,
    )
    assert [entry["step"] for entry in callback.watch.history] == [1, 3]
    # what LightningCLI writes next to the results can be read again
    again = parsed("config.yaml")
    (other,) = [c for c in again.trainer.callbacks if isinstance(c, EntropyProbeCallback)]
    assert vars(other)["_settings"] == vars(callback)["_settings"]
    assert vars(other)["_on_alarm"] == "stop"


@pytest.mark.parametrize(("line", "message"), [("every: often", "every"), ("evry: 2", "evry")])
def test_lightning_cli_refuses_wrong_settings(tmp_path, monkeypatch, capsys, line, message):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("every: 2", line), encoding="utf-8")
    with pytest.raises(SystemExit):
        LightningCLI(CommandLineModel, run=False, args=["--config", str(path)], seed_everything_default=False)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- helpers


def ordered() -> DataLoader:
    """The same four batches in every epoch."""
    return DataLoader(loader().dataset, 2, shuffle=False)
