"""The schema: every shipped file is valid, every mistake is named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from probe.config.files import find_config_file, read_config_file
from probe.config.parsing import parse_config
from probe.config.schema import SECTIONS, ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.runner import TrainerSection

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_the_folder_of_configurations_is_found():
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "detailed_logging_example", "test_deltaH1", "qwen2_5_1_5b_gsm8k"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid_and_reproduce_themselves(path):
    resolved = parse_config(read_config_file(path), TrainerSection)
    again = parse_config(resolved.mapping, TrainerSection)
    assert again.probe == resolved.probe
    assert again.mapping == resolved.mapping


def test_the_detailed_example_shows_every_option():
    given = read_config_file("detailed_logging_example")
    resolved = parse_config({}, TrainerSection).mapping
    for section in [*SECTIONS, "trainer"]:
        assert list(given[section]) == list(resolved[section]), section
    assert set(given) == set(resolved)


def test_defaults():
    assert parse_config({}, TrainerSection).probe == ProbeConfig()
    assert parse_config({"batch_config": None}, TrainerSection).seed == 42


MISTAKES = [
    (
        {"batch_config": {"BE": 3}},
        r"batch_config.BE: unknown configuration key; did you mean batch_config.B_E\?",
    ),
    ({"batchconfig": {"B_E": 3}}, r"did you mean batch_config.B_E\?"),
    ({"checkpoint": {"temperature": 1}}, r"did you mean generation.temperature\?"),
    ({"zzz": 1}, r"zzz: unknown configuration key; the sections are checkpoint"),
    ({"batch_config": {"B_E": "three"}}, r"batch_config.B_E: expected int, found 'three'"),
    ({"batch_config": [1]}, "batch_config: expected a mapping"),
    ({"batch_config": {"B_E": 1}}, "batch_config.B_E: expected an integer of at least 2, found 1"),
    ({"batch_config": {"B_U": 0}}, "batch_config.B_U: expected"),
    ({"batch_config": {"G": 1}}, "batch_config.G: expected"),
    ({"batch_config": {"prompt_template": "x"}}, "prompt_template: expected a text that contains {prompt}"),
    ({"generation": {"top_p": 0.9}}, "generation.top_p: expected 1.0"),
    ({"generation": {"top_k": 50}}, "generation.top_k: expected 0"),
    ({"generation": {"min_p": 0.1}}, "generation.min_p: expected 0.0"),
    ({"generation": {"temperature": 0.0}}, "generation.temperature: expected"),
    ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens: expected"),
    ({"generation": {"batch_size": 0}}, "generation.batch_size: expected"),
    ({"memory_config": {"microbatch_size": 0}}, "memory_config.microbatch_size: expected"),
    ({"memory_config": {"head_chunk_tokens": 0}}, "memory_config.head_chunk_tokens: expected"),
    ({"probe_rework": {"learning_rate": -1.0}}, "probe_rework.learning_rate: expected"),
    ({"probe_rework": {"max_grad_norm": 0.0}}, "probe_rework.max_grad_norm: expected"),
    ({"probe_rework": {"clip_range": 2.0}}, "probe_rework.clip_range: expected"),
    ({"probe_rework": {"clip_range_high": -1.0}}, "probe_rework.clip_range_high: expected"),
    ({"probe_rework": {"kl_coef": -1.0}}, "probe_rework.kl_coef: expected"),
    ({"probe_rework": {"loss": "ppo"}}, "probe_rework.loss: expected 'grpo' or"),
    ({"importance": {"is_mode": "other"}}, "importance.is_mode: expected 'per_decision' or"),
    ({"importance": {"clip_log_weight": 0.0}}, "importance.clip_log_weight: expected"),
    ({"probe_rework": {"derivative_mode": "forward"}}, "probe_rework.derivative_mode: expected 'auto' or"),
    ({"probe_rework": {"control_variates": "yes"}}, "probe_rework.control_variates"),
    ({"batch_config": {"G_E": 0}}, "batch_config.G_E: expected"),
    ({"detailed_logging": {"level": "all"}}, "detailed_logging.level: expected"),
    ({"detailed_logging": {"max_files": 0}}, "detailed_logging.max_files: expected"),
    ({"detailed_logging": {"filename_template": "{foo}"}}, "filename_template: expected only the fields"),
    (
        {"detailed_logging": {"filename_template": "a/b"}},
        "filename_template: expected a file name without folders",
    ),
    ({"checkpoint": {"load_in_4bit": True, "dtype": "float64"}}, "checkpoint.dtype: expected"),
    (
        {"probe_rework": {"compute_delta_h1": False}, "importance": {"enabled": False}},
        "at least one of them true",
    ),
    ({"seed_everything": "x"}, "seed_everything: expected bool or int"),
    ({"seed_everything": -1}, "seed_everything: expected an integer of at least 0"),
    ({"seed_everything": 10**30}, "seed_everything: expected an integer of at most 9223372036854775807"),
    ({"probe_rework": {"master_seed": 2**63}}, "probe_rework.master_seed: expected an integer of at most"),
    ({"batch_config": {"B_E": 10**9}}, "batch_config.B_E: expected an integer of at most 10000000, found"),
    ({"batch_config": {"B_U": 10**30}}, "batch_config.B_U: expected an integer of at most 10000000, found"),
    ({"batch_config": {"G": 10**30}}, "batch_config.G: expected an integer of at most 10000000, found"),
    ({"batch_config": {"B_U": 10**4, "G": 10**4}}, r"B_U \* batch_config.G: expected at most 10000000"),
    ({"generation": {"max_new_tokens": 10**30}}, "generation.max_new_tokens: expected an integer of at most"),
    ({"generation": {"batch_size": 10**24}}, "generation.batch_size: expected an integer of at most"),
    ({"memory_config": {"microbatch_size": 10**21}}, "memory_config.microbatch_size: expected an integer of"),
    (
        {"memory_config": {"head_chunk_tokens": 10**24}},
        "memory_config.head_chunk_tokens: expected an integer",
    ),
    ({"generation": {"stop_strings": [""]}}, "generation.stop_strings: expected texts that are not empty"),
    ({"generation": {"temperature": float("inf")}}, "generation.temperature: expected a finite number"),
    ({"batch_config": {"reward_weights": [float("nan")]}}, "batch_config.reward_weights: expected a finite"),
    ({"batch_config": {"reward_weights": [float("inf")]}}, "batch_config.reward_weights: expected a finite"),
    (
        {"probe_rework": {"learning_rate": float("inf")}},
        "probe_rework.learning_rate: expected a finite number",
    ),
    ({"probe_rework": {"entropy_coef": float("nan")}}, "probe_rework.entropy_coef: expected a finite number"),
    ({"trainer": {"precision": "bf16-true"}}, "trainer.precision: expected"),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES)
def test_mistakes_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(config, TrainerSection)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_limits(section):
    """No setting takes a number that is not finite, or one that no computer can count to."""
    kind = next(f.default_factory for f in dataclasses.fields(ProbeConfig) if f.name == section)
    for setting in dataclasses.fields(kind):
        beyond = {"float": math.inf, "int": 10**400}
        for name, value in beyond.items():
            if name in setting.type.split(" | "):
                with pytest.raises(
                    ConfigError, match=rf"^{section}.{setting.name}: expected .*found"
                ) as caught:
                    kind(**{setting.name: value})
                assert len(str(caught.value)) < 400


def test_truncated_sampling_can_be_asked_for():
    config = parse_config(
        {"generation": {"top_p": 0.9, "allow_truncated_support": True}}, TrainerSection
    ).probe
    assert config.generation.truncates_support
    assert not ProbeConfig().generation.truncates_support


def test_a_random_seed_is_written_down():
    resolved = parse_config({"seed_everything": True}, TrainerSection)
    assert resolved.mapping["seed_everything"] == resolved.seed
    assert parse_config(resolved.mapping, TrainerSection).seed == resolved.seed


def test_not_a_mapping():
    with pytest.raises(ConfigError, match="expected a mapping with sections"):
        parse_config([1], TrainerSection)


def test_files(tmp_path, monkeypatch):
    assert find_config_file("quickstart").name == "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert find_config_file(name).is_file()
    with pytest.raises(
        ConfigError, match=r"shipped configurations \(.*quickstart.*\), found no nowhere.yaml"
    ):
        read_config_file("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping with sections"):
        read_config_file(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="expected a YAML file"):
        read_config_file(tmp_path / "broken.yaml")
    assert yaml.safe_load((CONFIGS[0]).read_text())
