"""A tiny checkpoint, prompts, and a configuration of a run on them."""

from __future__ import annotations

import pytest

from tests.support.runs import number_prompts, small_config
from tests.support.tiny_models import lora_checkpoint, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, base):
    return lora_checkpoint(tmp_path_factory.mktemp("lora") / "step_60", base)[0]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return number_prompts(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(checkpoint, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_config(checkpoint, prompts)
