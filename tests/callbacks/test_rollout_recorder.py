"""A record of TRL's rollouts with their token ids."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from probe import RolloutRecorderCallback
from probe.config.batches import BatchConfig
from probe.errors.exceptions import ConfigError
from probe.loading import quiet_libraries
from probe.rollouts.read import read_rollouts
from tests.support.helpers import said
from tests.support.tiny_models import VOCABULARY

with quiet_libraries():
    pytest.importorskip("trl")
    from tests.callbacks.test_training_transformers import grpo, language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


class Spy(TrainerCallback):
    """Notes what the trainer holds for its first update."""

    trainer: Any = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.seen = [
                {name: x.clone() for name, x in part.items() if torch.is_tensor(x)}
                for part in self.trainer._buffered_inputs
            ]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_rollouts_are_recorded_as_they_were_sampled(tmp_path, file_format):
    spy = Spy()
    trainer, _ = grpo(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    spy.trainer = trainer
    trainer.add_callback(spy)
    recorder = RolloutRecorderCallback(trainer, tmp_path / "rolls", every=2, file_format=file_format)
    trainer.add_callback(recorder)
    trainer.train()
    assert [file.name for file in recorder.files] == [f"rollouts_0000{n}.{file_format}" for n in (1, 3)]
    config = BatchConfig(dataset_name="arithmetic")
    batch = read_rollouts(recorder.files[0], trainer.processing_class, config, 8, VOCABULARY)
    rows = [
        (
            part["prompt_ids"][i][part["prompt_mask"][i].bool()].tolist(),
            part["completion_ids"][i][part["completion_mask"][i].bool()].tolist(),
        )
        for part in spy.seen
        for i in range(len(part["completion_ids"]))
    ]
    assert len(rows) == 8
    assert [list(ids) for ids in batch.prompt_ids] == [prompt for prompt, _ in rows]
    assert [batch.completion_ids[i][batch.mask[i]].tolist() for i in range(8)] == [ids for _, ids in rows]
    eos = trainer.processing_class.eos_token_id
    assert batch.truncated.tolist() == [ids[-1] != eos for _, ids in rows]


def test_the_recorded_advantages_and_groups_are_the_trainers(tmp_path):
    trainer, _ = grpo(tmp_path, max_steps=1, steps_per_generation=2, gradient_accumulation_steps=1)
    spy = Spy()
    spy.trainer = trainer
    trainer.add_callback(spy)
    recorder = RolloutRecorderCallback(trainer, tmp_path)
    trainer.add_callback(recorder)
    trainer.train()
    table = pq.read_table(recorder.files[0]).to_pydict()
    assert table["step"] == [1] * 4  # of two microbatches that were sampled, the update uses the first
    assert table["advantage"] == pytest.approx(spy.seen[0]["advantages"].tolist())
    assert len(set(table["group"])) == len(set(map(tuple, table["prompt_ids"])))


def test_a_response_that_a_stop_string_ended_was_not_cut_off(tmp_path):
    stops = {"stop_strings": list("0123456789abcdefgh")}
    trainer, _ = grpo(tmp_path, max_steps=1, generation_kwargs=stops)
    trainer.model.generate = partial(trainer.model.generate, tokenizer=trainer.processing_class)
    recorder = RolloutRecorderCallback(trainer, tmp_path)
    trainer.add_callback(recorder)
    trainer.train()
    table = pq.read_table(recorder.files[0]).to_pydict()
    eos = trainer.processing_class.eos_token_id
    found = list(zip(table["truncated"], table["completion_ids"], strict=True))
    assert any(len(ids) < 8 and ids[-1] != eos for _, ids in found)
    assert all(cut == (len(ids) == 8 and ids[-1] != eos) for cut, ids in found)


def test_recording_does_not_change_the_training(tmp_path):
    weights = []
    for record in (False, True):
        trainer, _ = grpo(tmp_path, max_steps=2)
        if record:
            trainer.add_callback(RolloutRecorderCallback(trainer, tmp_path))
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_record_that_cannot_be_written_ends_no_training(tmp_path, caplog, monkeypatch):
    trainer, _ = grpo(tmp_path, max_steps=2)
    recorder = RolloutRecorderCallback(trainer, tmp_path)
    trainer.add_callback(recorder)

    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probe.rollouts.recording.write_table", full)
    caplog.set_level(logging.INFO, "probe.live")
    trainer.train()
    assert trainer.state.global_step == 2
    assert said(caplog).count("rollouts are not recorded any more, from step 1 on") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected an integer of at least 1"),
        ({"file_format": "csv"}, "file_format: expected 'parquet' or 'jsonl'"),
    ],
)
def test_a_recorder_is_checked_when_made(tmp_path, options, message):
    trainer, _ = grpo(tmp_path)
    with pytest.raises(ConfigError, match=message):
        RolloutRecorderCallback(trainer, tmp_path, **options)


def test_a_recorder_needs_a_trainer_that_samples(tmp_path):
    with pytest.raises(ConfigError, match="trainer: expected TRL's GRPOTrainer, found Trainer"):
        RolloutRecorderCallback(language_model(tmp_path), tmp_path)
