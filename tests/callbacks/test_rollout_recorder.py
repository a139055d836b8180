"""TRL's own prompts, its sampling options, and a record of its rollouts with token ids."""

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
from probe.callbacks.training_transformers import EntropyProbeTrainerCallback
from probe.config.batches import BatchConfig
from probe.errors.exceptions import ConfigError, DataError
from probe.live.hosts.trl import sampling_changes, trainer_prompts
from probe.loading import quiet_libraries
from probe.rollouts.read import read_rollouts
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import VOCABULARY

with quiet_libraries():
    pytest.importorskip("trl")
    from tests.callbacks.test_training_transformers import PROBE, grpo, language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

PARTS = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "3+4=",
        [message("3+4=")],
        [message([{"type": "text", "text": "3+4="}])],
        [message("3+4="), message("it is", role="assistant")],
    ],
)
def test_prompts_are_tokenised_as_the_trainer_does(tmp_path, prompt):
    trainer, _ = grpo(tmp_path, chat=True, rows=[{"prompt": prompt}] * 4)
    trainer.processing_class.chat_template = PARTS
    found = trainer_prompts(trainer, [{"prompt": prompt}], trainer.processing_class, 0)
    assert [list(example.ids or ()) for example in found] == [list(trainer._tokenize_prompts([prompt])[0][0])]


def test_prompts_that_cannot_be_text_are_left_out_and_said(tmp_path, caplog):
    trainer, _ = grpo(tmp_path)
    rows = [{"prompt": "ab"}, {"prompt": "cd", "image": object()}, {"prompt": " "}]
    found = trainer_prompts(trainer, rows, trainer.processing_class, 0)
    assert [example.text for example in found] == ["ab"]
    assert "2 of 3 prompts are left out (prompts[1]: DataError: expected a prompt of text alone" in said(
        caplog
    )


def test_no_prompt_that_can_be_rendered_ends_no_training(tmp_path, caplog):
    trainer = language_model(tmp_path, tokenizer=char_tokenizer())
    bad = [[message("ab")]]  # without a chat template
    callback = EntropyProbeTrainerCallback(trainer, prompts=bad, **PROBE)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 6
    assert callback.watch is None
    assert "not attached, training goes on without it" in said(caplog)

    strict = language_model(tmp_path, tokenizer=char_tokenizer())
    strict.add_callback(EntropyProbeTrainerCallback(strict, prompts=bad, strict=True, **PROBE))
    with pytest.raises(DataError, match="chat template"):
        strict.train()


class BrokenLog(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if any("entropy_probe" in name for name in logs or {}):
            raise OSError(28, "No space left on device")


def test_a_reporter_that_fails_on_the_probes_numbers_ends_no_training(tmp_path, caplog):
    trainer = language_model(tmp_path, tokenizer=char_tokenizer())
    callback = EntropyProbeTrainerCallback(trainer, prompts=["ab"], max_new_tokens=3, **PROBE)
    trainer.add_callback(callback)
    trainer.add_callback(BrokenLog())
    trainer.train()
    assert trainer.state.global_step == 6
    assert callback.watch is not None
    assert len(callback.watch.history) == 6
    assert said(caplog).count("the trainer's log failed") == 1


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_p": 1.0, "repetition_penalty": 1.0}, {}),
        ({"generation_kwargs": {"min_p": 0.1, "typical_p": 1.0}}, {"min_p": 0.1}),
        ({"generation_kwargs": {"bad_words_ids": [[5]]}}, {"bad_words_ids": [[5]]}),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, {"no_repeat_ngram_size": 2}),
        ({"generation_kwargs": {"temperature": 0.5}}, {"temperature": 0.5}),
        ({"generation_kwargs": {"do_sample": False}}, {"do_sample": False}),
    ],
)
def test_what_makes_the_trainers_sampling_another_distribution(tmp_path, options, expected):
    trainer, _ = grpo(tmp_path, **options)
    assert sampling_changes(trainer) == expected


def test_a_trainer_that_does_not_sample_changes_nothing(tmp_path):
    assert sampling_changes(language_model(tmp_path)) == {}


# ---------------------------------------------------------------- the record


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
