"""The drop-in probe in transformers' Trainer and TRL's GRPOTrainer: training must not notice it, and it must report."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from probe.callbacks.training_transformers import EntropyProbeTrainerCallback
from probe.errors.exceptions import ConfigError
from probe.live import Alarm
from probe.live.hosts.transformers import default_prompts
from probe.live.lines import probe_line
from probe.live.names import MAIN, full_name
from probe.loading import quiet_libraries
from probe.shards import fully_sharded
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import numbers
from tests.support.terminal import Terminal, logger_of_nobody
from tests.support.tiny_models import VOCABULARY, add_lora, tiny_model
from tests.support.trackers import WandbRun, library, media_of
from tests.support.trainings import bits, break_probe, in_two_processes, set_streams, streams

with quiet_libraries():
    trl = pytest.importorskip("trl")
    from trl import GRPOConfig, GRPOTrainer

pytestmark = [
    # transformers 5.23 renames gradient checkpointing, and TRL 1.16 still uses the old names
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    # CPU only: nothing to pin
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

PROBE: dict[str, Any] = {"every": 1, "B_E": 6, "microbatch_size": 8}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")
PROMPTS = [f"q{i}:" for i in range(12)]


# ---------------------------------------------------------------- trainings


class Observer(TrainerCallback):
    """Notes what a training looks like to its other callbacks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forwards: list[Any] = []
        self.should_log: list[bool] = []
        self.streams: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.forwards.append(vars(self.model).get("forward"))
        self.streams.append(hash(streams()))

    def on_step_end(self, args, state, control, **kwargs):
        self.should_log.append(control.should_log)


def own_logs(trainer: Trainer) -> list[str]:
    """The trainer's own log entries, without times and without those of the probe."""
    entries = [
        entry
        for entry in trainer.state.log_history
        if not any(name.startswith("entropy_probe") for name in entry)
    ]
    return [repr({k: v for k, v in entry.items() if k not in TIMES}) for entry in entries]


def probe_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "entropy_probe/H_orig_tok" in entry]


def final_state(trainer: Trainer, observer: Observer) -> dict[str, Any]:
    """Everything that must be bitwise the same with and without the probe."""
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    return {
        "parameters": bits(dict(model.named_parameters())),
        "buffers": bits(dict(model.named_buffers())),
        "gradients": {name: bits(p.grad) for name, p in model.named_parameters()},
        "optimizer": bits(optimizer.state_dict()),
        "scheduler": bits(trainer.lr_scheduler.state_dict()),
        "logs": own_logs(trainer),
        "steps": trainer.state.global_step,
        "flags": {name: module.training for name, module in model.named_modules()},
        "streams": streams(),
        "streams at each step": observer.streams,
        "should_log": observer.should_log,
    }


def train(trainer: Trainer, probe: dict[str, Any] | None, **options: Any) -> tuple[dict[str, Any], Any]:
    """The final state of a training with or without the probe, and the probe's callback."""
    callback = None
    if probe is not None:
        callback = EntropyProbeTrainerCallback(trainer, **{**PROBE, **probe})
        trainer.add_callback(callback)
    observer = Observer(trainer.model)  # behind the probe
    trainer.add_callback(observer)
    set_streams()
    trainer.train(**options)
    return final_state(trainer, observer), callback


class Reward:
    """Rewards short completions, and remembers what it was asked for."""

    __name__ = "brevity"

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.seen += zip(map(repr, prompts), map(repr, completions), map(list, completion_ids), strict=True)
        return [float(len(ids) % 5) for ids in completion_ids]


def grpo(
    folder: Path, *, rows: Any = None, chat: bool = False, evaluation: Any = None, **options: Any
) -> Any:
    """A GRPO training of a LoRA policy with dropout."""
    settings: dict[str, Any] = {
        "max_steps": 10,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "beta": 0.04,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    reward = Reward()
    data = rows if rows is not None else [{"prompt": prompt} for prompt in PROMPTS]
    with quiet_libraries():
        trainer = GRPOTrainer(
            model=add_lora(tiny_model()),
            args=GRPOConfig(output_dir=str(folder), **{**settings, **options}),
            reward_funcs=[reward],
            train_dataset=Dataset.from_list(data) if isinstance(data, list) else data,
            eval_dataset=evaluation,
            processing_class=char_tokenizer(chat_template=chat),
        )
    return trainer, reward


def language_model(folder: Path, *, model: Any = None, tokenizer: Any = "own", **options: Any) -> Trainer:
    """A plain transformers training on random tokens."""
    settings: dict[str, Any] = {
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(4, VOCABULARY, (12,), generator=generator).tolist() for _ in range(16)]
    with quiet_libraries():
        return Trainer(
            model=tiny_model() if model is None else model,
            args=TrainingArguments(output_dir=str(folder), **{**settings, **options}),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            processing_class=char_tokenizer() if tokenizer == "own" else tokenizer,
        )


LM_PROBE = {"prompts": PROMPTS[:4], "max_new_tokens": 6}


def collapsed(**more: Any) -> dict[str, Any]:
    """Settings with which the third probe raises an alarm: the threshold is above any entropy."""
    return {**LM_PROBE, "collapse_entropy": 100.0, **more}


# ---------------------------------------------------------------- neutrality


def test_grpo_is_bitwise_as_without_the_probe(tmp_path):
    options = {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
    }
    found = []
    for probe in (None, {}):
        trainer, reward = grpo(tmp_path, **options)
        state, callback = train(trainer, probe)
        found.append(({**state, "completions": reward.seen}, callback, trainer))
    (plain, _, _), (probed, callback, trainer) = found
    assert set(plain) == set(probed)
    for name in plain:
        assert plain[name] == probed[name], name
    assert len(plain["logs"]) == 4  # after steps 3, 6 and 9, and at the end
    assert all(name in plain["logs"][0] for name in ("loss", "reward", "entropy", "grad_norm", "kl"))
    assert plain["should_log"] == [False, False, True] * 3 + [False]
    assert plain["completions"]
    # the comparison means something only if the probe was at work on every step, and the steps did something
    history = callback.watch.history
    assert [entry["step"] for entry in history] == list(range(1, 11))
    assert all(entry["step_norm"] > 0 and entry["deltaH_true_tok"] != 0 for entry in history[:-1])
    assert [entry["step"] for entry in probe_logs(trainer)] == list(range(1, 11))
    assert callback.watch.error is None
    assert not callback.watch.active


@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 2}, {"loss_type": "grpo"}]
)
def test_the_tokens_of_its_own_batch_are_told_apart(tmp_path, options):
    """Bitwise as without the probe; positive and negative tokens add up to the gradient's part."""
    found = []
    for probe in (None, {"attribution": True, "strict": True, "B_E": 16, "control_variates": False}):
        trainer, _ = grpo(tmp_path, max_grad_norm=0.1, max_steps=6, beta=0.0, **options)
        no_dropout(trainer.model)
        state, callback = train(trainer, probe)
        found.append((state, callback, trainer))
    (plain, _, _), (probed, callback, trainer) = found
    for name in plain:
        assert plain[name] == probed[name], name
    taken = [entry for entry in callback.watch.history if "attribution_reason" not in entry]
    assert len(taken) == 6, [entry.get("attribution_reason") for entry in callback.watch.history]
    acting = [entry for entry in taken if entry.get("attribution_scale") is not None]
    assert len(acting) >= 2
    for entry in acting:
        norms = [
            log["grad_norm"]
            for log in trainer.state.log_history
            if log.get("step") == entry["step"] and "grad_norm" in log
        ]
        assert 0 < entry["attribution_scale"] <= 1.01
        for norm in norms:
            assert entry["attribution_scale"] == pytest.approx(min(1.0, 0.1 / norm), rel=1e-2)
        both = entry["deltaH1_positive_tok"] + entry.get("deltaH1_negative_tok", 0.0)
        # X of the same E by backward, without control variates
        size = abs(entry["deltaH1_positive_tok"]) + abs(entry.get("deltaH1_negative_tok", 0.0))
        assert both == pytest.approx(entry["deltaH1_gradient_tok"], abs=0.02 * size)
    logged = [log for log in probe_logs(trainer) if "entropy_probe_details/deltaH1_positive_tok" in log]
    assert len(logged) >= len(acting)


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("lora", [True, False])
def test_mixed_precision_is_bitwise_as_without_the_probe(tmp_path, lora):
    options: dict[str, Any] = {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "max_steps": 10,
        "logging_steps": 3,
    }
    found = []
    for probe in (None, LM_PROBE):
        passes: list[tuple[bool, bool, torch.dtype]] = []
        model = add_lora(tiny_model()) if lora else tiny_model(attention_dropout=0.1)
        head = model.get_output_embeddings()
        head.register_forward_hook(
            lambda module, inputs, output, to=passes: to.append(
                (module.training, torch.is_autocast_enabled("cpu"), output.dtype)
            )
        )
        trainer = language_model(tmp_path, model=model, **options)
        state, callback = train(trainer, probe)
        observer = trainer.callback_handler.callbacks[-1]
        # accelerate's wrapper is on the model in every training step, the same one
        assert isinstance(observer, Observer)
        assert observer.forwards[0] is not None
        assert all(forward is observer.forwards[0] for forward in observer.forwards)
        assert hasattr(model, "_original_forward")
        training = {(autocast, dtype) for flag, autocast, dtype in passes if flag}
        evaluation = {(autocast, dtype) for flag, autocast, dtype in passes if not flag}
        assert training == {(True, torch.bfloat16)}
        assert evaluation == (set() if probe is None else {(False, torch.float32)})
        found.append((state, callback))
    (plain, _), (probed, callback) = found
    for name in plain:
        assert plain[name] == probed[name], name
    history = callback.watch.history
    assert [entry["step"] for entry in history] == list(range(1, 11))
    # the first step of a warm-up has the learning rate 0
    assert history[0]["learning_rate"] == history[0]["step_norm"] == history[0]["deltaH1_tok"] == 0.0
    assert history[0]["verdict"] == "unresolved"
    assert all(entry["step_norm"] > 0 for entry in history[1:-1])
    assert all(entry["deltaH1_decay_tok"] != 0 for entry in history[1:-1])
    assert {entry["every"] for entry in history} == {1}


@pytest.mark.parametrize(
    ("optim", "rate"),
    [("adamw_torch", 1e-4), ("adamw_8bit", 1e-4), ("lion_8bit", 1e-4), ("lion_32bit", 1e-4), ("sgd", 1e-2)],
)
def test_optimizers_are_bitwise_as_without_the_probe(tmp_path, optim, rate):
    found = []
    for probe in (None, LM_PROBE):
        # 64 x 128 weights are above the size from which bitsandbytes keeps 8-bit states
        trainer = language_model(
            tmp_path, model=tiny_model(hidden=64, layers=1), optim=optim, max_steps=4, learning_rate=rate
        )
        state, callback = train(trainer, probe)
        found.append((state, callback, trainer.optimizer.optimizer))
    (plain, _, optimizer), (probed, callback, _) = found
    if optim.endswith("8bit"):
        kept = {x.dtype for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)}
        assert torch.uint8 in kept
    for name in plain:
        assert plain[name] == probed[name], name
    history = callback.watch.history
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert all(entry["step_norm"] > 0 for entry in history)
    assert all(("deltaH1_momentum_tok" in entry) == (not optim.startswith("lion")) for entry in history)


def test_a_probe_that_fails_leaves_training_bitwise_as_it_was(tmp_path, monkeypatch, caplog):
    plain, _ = train(language_model(tmp_path), None)
    break_probe(monkeypatch, at=2)
    trainer = language_model(tmp_path)
    with caplog.at_level(logging.WARNING, logger="probe.live"):
        probed, callback = train(trainer, LM_PROBE)
    for name in plain:
        assert plain[name] == probed[name], name
    assert str(callback.watch.error) == "a broken probe"
    assert [entry["step"] for entry in callback.watch.history] == [1]
    assert "switched off at step 2, training goes on: RuntimeError: a broken probe" in caplog.text
    assert hooks(trainer) == 0


# ---------------------------------------------------------------- results


def test_results_reach_the_log_and_tensorboard(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level(logging.INFO, "probe.live")
    trainer, _ = grpo(tmp_path, max_steps=5, logging_steps=2, report_to="tensorboard", disable_tqdm=False)
    _, callback = train(trainer, {"every": 2})
    history, logged = callback.watch.history, probe_logs(trainer)
    assert [entry["step"] for entry in history] == [1, 3, 5]
    assert [entry["step"] for entry in logged] == [1, 3, 5]
    assert caplog.text.count("3 of 5 steps probed") == 1
    for entry, log in zip(history, logged, strict=True):
        for name in ("H_orig_tok", "deltaH1_tok", "deltaH_true_tok", "deltaH1", "residual_tok", "step_norm"):
            assert log[full_name(name)] == entry[name]
    (events,) = tmp_path.glob("runs/*/events.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if "entropy_probe" in tag]
    # a group of its own, and on the first page the main numbers alone
    assert {tag for tag in tags if tag.startswith("entropy_probe/")} <= {
        f"entropy_probe/{name}" for name in MAIN
    }
    groups = ("", "_curves", "_details", "_ground_truth", "_prediction")
    prefixes = tuple(f"entropy_probe{group}/" for group in groups)
    assert all(tag.startswith(prefixes) for tag in tags)
    for name in ("H_orig_tok", "deltaH_true_tok"):
        points = [(e.step, e.value) for e in reader.Scalars(f"entropy_probe/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history]
    assert [e.step for e in reader.Scalars("train/reward")] == [2, 4, 5]
    layout = reader.summary_metadata["custom_scalars__config__"]
    assert layout.plugin_data.plugin_name == "custom_scalars"
    (chart,) = reader.Tensors("custom_scalars__config__")
    text = chart.tensor_proto.string_val[0]
    assert b"entropy_probe/H_orig_tok" in text
    assert b"entropy_probe/steps_to_collapse" in text
    assert b"train/" not in text
    # pictures and words at the end, before the trainer closes its writer
    (last,) = reader.Images("entropy_probe/1_entropy")
    assert last.step == 5
    (summary,) = reader.Tensors("entropy_probe/summary/text_summary")
    assert b"3 of 5 steps probed" in summary.tensor_proto.string_val[0]
    assert "entropy_probe/verdict/text_summary" in reader.Tags()["tensors"]


def printed(trainer: Trainer, monkeypatch: Any, columns: int = 80) -> tuple[list[str], Any]:
    """What a training with the probe at every second step leaves on a terminal, and the probe's callback."""
    logger_of_nobody(monkeypatch)
    with Terminal(columns) as terminal:
        terminal.take_over(monkeypatch)
        _, callback = train(trainer, {"every": 2})
    return terminal.lines, callback


@pytest.mark.parametrize("bar", ["printer", "tqdm", "rich"])
def test_the_console_has_one_line_and_the_reporters_the_numbers(tmp_path, monkeypatch, bar):
    seen: list[set[str]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    class OwnPrinter(PrinterCallback):
        """Derived from one that prints, with a way of its own: it is asked as ever."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    trainer, _ = grpo(tmp_path, max_steps=5, logging_steps=2, disable_tqdm=bar == "printer")
    if bar == "rich":
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(trl.RichProgressCallback())
    trainer.add_callback(Reporter())
    trainer.add_callback(OwnPrinter())
    kept = list(trainer.callback_handler.callbacks)
    lines, callback = printed(trainer, monkeypatch)
    assert trainer.callback_handler.callbacks[: len(kept)] == kept
    together = " ".join(" ".join(lines).split())
    for entry in callback.watch.history:
        assert f"entropy probe: {probe_line(entry)}" in together
    assert "entropy_probe" not in "".join(lines)  # of whose names the numbers consist
    assert "deltaH1_gradient_tok" not in "".join(lines)
    if bar != "rich":
        assert sum(line.startswith("{'loss': ") for line in lines) == 2  # the trainer's own logs, as ever
    else:
        assert any("Training" in line for line in lines)
    assert all("entropy probe" not in line or line.startswith("entropy probe") for line in lines)
    bars = [line for line in lines if line.startswith("100%|")]
    assert len(bars) == (bar == "tqdm")
    logged = [names for names in seen if "entropy_probe/H_orig_tok" in names]
    assert len(logged) == 2 * len(callback.watch.history) == 6
    assert [entry["step"] for entry in probe_logs(trainer)] == [1, 3, 5]


class WandbLike(TrainerCallback):
    """As transformers' WandbCallback and TrackioCallback report."""

    def __init__(self) -> None:
        self.run = WandbRun()
        self._wandb = library("wandb", "Image", run=self.run)
        self._initialized = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        named = {f"train/{name}": value for name, value in logs.items()}
        self._wandb.log({**named, "train/global_step": state.global_step})


def test_weights_and_biases_get_the_probes_own_names_and_pictures(tmp_path):
    trainer = language_model(tmp_path, max_steps=5)
    like = WandbLike()
    trainer.add_callback(like)
    _, callback = train(trainer, LM_PROBE | {"every": 2})
    logged = [data for data, _ in like.run.logged]
    assert not any(name.startswith("train/entropy_probe") for data in logged for name in data)
    levels = [
        (data["train/global_step"], data["entropy_probe/H_orig_tok"])
        for data in logged
        if "entropy_probe/H_orig_tok" in data
    ]
    assert levels == [(entry["step"], entry["H_orig_tok"]) for entry in callback.watch.history]
    assert len(media_of(like.run.logged)["entropy_probe/1_entropy"]) == 1  # at the end
    assert like.run.summary["entropy_probe/verdict"] == callback.watch.last["verdict"]
    assert [data for data in logged if "train/loss" in data]  # the trainer's own come as ever
    assert len(probe_logs(trainer)) == 3
    assert like in trainer.callback_handler.callbacks


def test_the_trainers_own_sampling_and_data_are_the_defaults(tmp_path, caplog):
    evaluation = Dataset.from_list([{"prompt": f"e{i}"} for i in range(3)])
    with caplog.at_level(logging.WARNING, logger="probe.live"):
        for own, options in (
            ({}, {}),
            ({"temperature": 0.5, "max_new_tokens": 3}, {"top_p": 0.9, "top_k": 7}),
        ):
            trainer, _ = grpo(
                tmp_path,
                evaluation=evaluation,
                temperature=0.7,
                max_steps=1,
                max_completion_length=5,
                **options,
            )
            _, callback = train(trainer, own)
            settings = callback.watch.settings
            assert settings.temperature == own.get("temperature", 0.7)
            assert settings.max_new_tokens == own.get("max_new_tokens", 5)
            assert callback.watch.last["avg_generation_length"] <= settings.max_new_tokens
            assert [p.text for p in callback.watch._probe.source.prompts] == ["e0", "e1", "e2"]
            if not options:
                assert "samples with" not in caplog.text
    assert (
        "the trainer samples with top_p 0.9, top_k 7; the entropies here are those of the whole"
        in caplog.text
    )


def test_chat_prompts_go_through_the_chat_template(tmp_path):
    rows = [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"u{i}"}],
            "answer": str(i),
        }
        for i in range(4)
    ]
    trainer, reward = grpo(tmp_path, rows=rows, chat=True, max_steps=1)
    _, callback = train(trainer, {})
    assert [p.text for p in callback.watch._probe.source.prompts] == [
        f"[system]s\n[user]u{i}\n[assistant]" for i in range(4)
    ]
    assert "'role': 'user'" in reward.seen[0][0]
    assert callback.watch.last["step"] == 1


def test_chat_template_options_are_the_trainers(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "u"}]}] * 4
    trainer, _ = grpo(tmp_path, rows=rows, chat=True, max_steps=1, chat_template_kwargs={"thinking": False})
    template = trainer.processing_class.chat_template
    trainer.processing_class.chat_template = template + "{% if thinking is false %}!{% endif %}"
    _, callback = train(trainer, {})
    assert {p.text for p in callback.watch._probe.source.prompts} == {"[user]u\n[assistant]!"}
    assert "apply_chat_template" not in vars(trainer.processing_class)


def test_a_resumed_training_goes_on_counting(tmp_path):
    train(language_model(tmp_path, max_steps=4, save_strategy="steps", save_steps=4), LM_PROBE | {"every": 3})
    checkpoint = str(tmp_path / "checkpoint-4")
    found = []
    for probe in (None, LM_PROBE | {"every": 2}):
        state, callback = train(
            language_model(tmp_path, max_steps=8), probe, resume_from_checkpoint=checkpoint
        )
        found.append((state, callback))
    (plain, _), (probed, callback) = found
    for name in plain:
        assert plain[name] == probed[name], name
    history = callback.watch.history
    assert [entry["step"] for entry in history] == [1, 4, 5, 7]  # the curves go on from the logged ones
    assert history[3]["cumulative_H_tok"] == pytest.approx(
        history[3]["H_orig_tok"] - history[0]["H_orig_tok"]
    )
    assert history[3]["collapse_entropy"] == history[0]["collapse_entropy"]
    logged = probe_logs(callback.trainer)
    assert [entry["step"] for entry in logged] == [1, 4, 5, 7]  # those of the checkpoint, and the new ones


def test_an_alarm_stops_training(tmp_path):
    trainer = language_model(tmp_path)
    _, callback = train(trainer, collapsed(on_alarm="stop"))
    assert trainer.state.global_step == 3
    assert callback.watch.last["alarms"] == [callback.watch.last["step"]]
    assert len(probe_logs(trainer)) == 3
    assert own_logs(trainer)[2].startswith("{'loss'")  # the third step's own log came all the same


class Falling(TrainerCallback):
    """Logs an entropy after every step, as TRL does; it falls to nothing from step 9 on."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        level = 3.0 * (1 + 0.01 * (state.global_step % 2)) * 0.3 ** max(state.global_step - 9, 0)
        Trainer.log(self.trainer, {"entropy": level})


def test_an_alarm_from_a_logged_entropy_is_logged_under_its_own_step(tmp_path):
    alarms: list[Alarm] = []
    trainer = language_model(tmp_path, max_steps=14, logging_steps=1)
    trainer.add_callback(Falling(trainer))
    _, callback = train(trainer, LM_PROBE | {"every": 4, "on_alarm": alarms.append})
    (alarm,) = alarms
    assert 9 < alarm.step < 13  # between two probes
    logged = [entry for entry in trainer.state.log_history if entry.get("entropy_probe/collapse_alarm")]
    assert [(entry["step"], entry["entropy_probe/collapse_alarm"]) for entry in logged] == [(alarm.step, 1.0)]
    assert [entry["step"] for entry in probe_logs(trainer)] == [1, 5, 9, 13]
    assert callback.watch.history[2]["alarms"] == [alarm.step]


def test_an_alarm_is_passed_on(tmp_path):
    alarms: list[Alarm] = []

    def lower(alarm: Alarm) -> None:
        alarms.append(alarm)
        alarm.scale_learning_rate(0.1)

    trainer = language_model(tmp_path, lr_scheduler_type="constant", max_steps=5)
    _, callback = train(trainer, collapsed(on_alarm=lower))
    (alarm,) = alarms
    assert isinstance(alarm, Alarm)
    assert alarm.step == 3
    assert alarm.model is trainer.model
    assert list(alarm.optimizers) == [trainer.optimizer.optimizer]
    assert trainer.state.global_step == 5
    rates = [entry["learning_rate"] for entry in callback.watch.history]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 2)


def test_errors_of_the_alarms_function_are_the_users(tmp_path):
    def broken(alarm: Alarm) -> None:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        train(language_model(tmp_path), collapsed(on_alarm=broken))


def test_strict_raises(tmp_path, monkeypatch):
    break_probe(monkeypatch, at=2)
    trainer = language_model(tmp_path)
    with pytest.raises(RuntimeError, match="a broken probe"):
        train(trainer, LM_PROBE | {"strict": True})
    assert hooks(trainer) == 0


def test_training_again_after_an_exception_watches_once(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer, interrupt = language_model(tmp_path, max_steps=3), Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, LM_PROBE)
    trainer.remove_callback(interrupt)
    (callback,) = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, EntropyProbeTrainerCallback)
    ]
    trainer.train()
    assert [entry["step"] for entry in callback.watch.history] == [1, 2, 3]
    assert [entry["step"] for entry in probe_logs(trainer)] == [1, 2, 3]
    assert hooks(trainer) == 0


# ---------------------------------------------------------------- two processes


def calm_down(alarm: Alarm) -> None:
    alarm.scale_learning_rate(0.1)


def ddp(folder: Path, probe: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # what accelerate knows of the process that was forked
    GradientState._reset_state()
    trainer = language_model(folder, lr_scheduler_type="constant", ddp_backend="gloo")
    assert trainer.accelerator.num_processes == 2
    state, callback = train(trainer, probe)
    history = None if callback is None else callback.watch.history
    return state, history, [group["lr"] for group in trainer.optimizer.param_groups]


@pytest.mark.slow
def test_an_alarm_of_the_first_process_holds_for_both(tmp_path):
    plain = in_two_processes(ddp, tmp_path, None)
    probed = in_two_processes(ddp, tmp_path, LM_PROBE)
    for rank in range(2):
        for name in plain[rank][0]:
            assert plain[rank][0][name] == probed[rank][0][name], (rank, name)
    assert [len(found[1]) for found in probed] == [6, 6]
    assert bits(numbers(probed[0][1])) == bits(numbers(probed[1][1]))
    stopped = in_two_processes(ddp, tmp_path, collapsed(on_alarm="stop"))
    assert [found[0]["steps"] for found in stopped] == [3, 3]
    calmed = in_two_processes(ddp, tmp_path, collapsed(on_alarm=calm_down))
    assert [found[0]["steps"] for found in calmed] == [6, 6]
    assert [rate for found in calmed for rate in found[2]] == pytest.approx([1e-4] * 2 * len(calmed[0][2]))
    for name in ("parameters", "optimizer", "scheduler"):
        assert calmed[0][0][name] == calmed[1][0][name]
    assert calmed[0][0]["parameters"] != plain[0][0]["parameters"]


def fsdp(folder: Path, kind: str, probe: dict[str, Any] | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A training by `fsdp_version: 2`, which accelerate has for devices other than CPUs: it takes these for such."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    made = PartialState.__init__

    def as_if_on_devices(self: Any, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_devices  # type: ignore[method-assign]
    common = {"ddp_backend": "gloo", "max_steps": 4, **options}
    trainer = language_model(folder, **common) if kind == "lm" else grpo(folder, **common)[0]
    state, callback = train(trainer, probe)
    assert len(fully_sharded(trainer.model)) > 3
    return state, None if callback is None else callback.watch.history


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what accelerate and TRL say of FSDP2
@pytest.mark.parametrize(("kind", "options"), [("lm", {}), ("lm", {"bf16": True}), ("grpo", {})])
def test_a_training_whose_processes_hold_parts_of_the_weights_is_as_without_the_probe(
    tmp_path, kind, options
):
    plain = in_two_processes(fsdp, tmp_path, kind, None, options, seconds=120.0)
    asked = {**(LM_PROBE if kind == "lm" else {}), "strict": True}
    probed = in_two_processes(fsdp, tmp_path, kind, asked, options, seconds=120.0)
    for rank in range(2):
        for name in plain[rank][0]:
            assert plain[rank][0][name] == probed[rank][0][name], (rank, name)
    assert plain[0][0]["parameters"] != plain[1][0]["parameters"]
    assert [len(found[1]) for found in probed] == [4, 4]
    assert bits(numbers(probed[0][1])) == bits(numbers(probed[1][1]))


# ---------------------------------------------------------------- what cannot be


def test_it_must_be_a_trainer():
    with pytest.raises(ConfigError, match=r"trainer: expected a transformers Trainer .* found Linear"):
        EntropyProbeTrainerCallback(torch.nn.Linear(1, 1), ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "name"), [("deepspeed", "DeepSpeed"), ("fsdp", "FSDP with fsdp_version: 1")]
)
def test_sharded_training_is_refused(tmp_path, kind, name):
    trainer = language_model(tmp_path)
    setattr(trainer, f"is_{kind}_enabled", True)
    callback = EntropyProbeTrainerCallback(trainer, **LM_PROBE)
    with pytest.raises(ConfigError, match=f"or FSDP with fsdp_version: 2, found {name}"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_prompts_must_be_found(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prompts: expected the trainer's data set .* give the probe its prompts"
    ):
        train(language_model(tmp_path), {"prompts": None})


def test_a_streamed_data_set_has_no_length(tmp_path):
    stream = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]).to_iterable_dataset()
    trainer = language_model(tmp_path)
    trainer.train_dataset = stream  # GRPO itself refuses one
    with pytest.raises(ConfigError, match="prompts: expected the trainer's data set to have a length"):
        default_prompts(trainer)


def test_there_must_be_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer: expected a transformers tokenizer, found NoneType"):
        train(language_model(tmp_path, tokenizer=None), LM_PROBE)


def test_the_reaction_to_an_alarm_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="on_alarm: expected a function, 'stop' or None, found 'halt'"):
        train(language_model(tmp_path), LM_PROBE | {"on_alarm": "halt"})


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean every"):
        train(language_model(tmp_path), LM_PROBE | {"evry": 2})


# ---------------------------------------------------------------- helpers


def hooks(trainer: Trainer) -> int:
    """How many hooks are on the optimizer."""
    optimizer = trainer.optimizer.optimizer
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
