"""TRL's own prompts and its sampling options."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from probe.callbacks.training_transformers import EntropyProbeTrainerCallback
from probe.errors.exceptions import DataError
from probe.live.hosts.trl import sampling_changes, trainer_prompts
from probe.loading import quiet_libraries
from tests.support.helpers import char_tokenizer, said

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


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


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
