"""A tiny checkpoint, prompts, and a configuration of a run on them."""

from __future__ import annotations

import json

import pytest

from tests.support.tiny_models import lora_checkpoint, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, base):
    return lora_checkpoint(tmp_path_factory.mktemp("lora") / "step_60", base)[0]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(40))
    )
    return path


@pytest.fixture
def config(checkpoint, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "checkpoint": {"checkpoint_path": str(checkpoint)},
        "batch_config": {
            "dataset_name": str(prompts),
            "split": "train",
            "reward": "tests.support.runs:digits",
            "B_E": 24,
            "B_U": 4,
            "G": 4,
        },
        "generation": {"max_new_tokens": 8, "batch_size": 64},
        "memory_config": {"microbatch_size": 8},
        "detailed_logging": {"enabled": False},
        "trainer": {"accelerator": "cpu", "logger": False},
    }
