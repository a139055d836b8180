"""The demo policy: its tokenizer, its cache, and that it is the same every time."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from probe.config.checkpoint import CheckpointConfig
from probe.config.schema import ProbeConfig
from probe.data.arithmetic import (
    PROMPT_TEMPLATE,
    SPLITS,
    arithmetic_corpus,
    arithmetic_rows,
    vocabulary_texts,
)
from probe.demo import DemoRecipe, build, cache, ensure_demo_checkpoint
from probe.demo.cache import demo_is_cached
from probe.demo.pretraining import IGNORED, encode_corpus
from probe.demo.tokenizer import build_tokenizer
from probe.errors.exceptions import CheckpointError
from probe.loading import load_policy_model, locate_checkpoint
from probe.module import EntropyProbe
from tests.support.helpers import name_of_ended_process
from tests.support.terminal import Terminal

TINY = DemoRecipe(
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    corpus_size=256,
    pretrain_steps=40,
    pretrain_batch=16,
    grpo_steps=2,
    prompts_per_step=8,
    group_size=4,
    max_new_tokens=16,
    evaluation_prompts=8,
)
REPRODUCED = (
    "base/model.safetensors",
    "base/tokenizer.json",
    "checkpoint/model/adapter_model.safetensors",
    "checkpoint/optimizer.pt",
)


def make(folder, recipe=TINY, **options):
    return ensure_demo_checkpoint(folder, progress=False, recipe=recipe, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache folder with a tiny demo; not to be changed."""
    folder = tmp_path_factory.mktemp("demo")
    make(folder)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it that may be changed, in a place where its adapter points to itself."""
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    config = folder / "demo-v1-seed0/checkpoint/model/adapter_config.json"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    return folder


@pytest.fixture
def builds(monkeypatch):
    """The seeds of the demos that are built, which stay fakes: one file per name."""
    seeds = []

    def fake(folder, base_path, version, seed, recipe, progress):
        seeds.append(seed)
        for name in cache.DEMO_FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        (folder / "checkpoint/model/adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(base_path)})
        )
        (folder / "demo.json").write_text(json.dumps({"version": version}))

    monkeypatch.setattr(cache, "build_demo", fake)
    return seeds


# --- tokenizer -------------------------------------------------------------------------------------------------


def test_tokenizer_gives_every_text_back(tmp_path):
    build_tokenizer(vocabulary_texts()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    texts = [
        PROMPT_TEMPLATE.format(prompt=row["question"]) for s in SPLITS for row in arithmetic_rows(s, 500)
    ]
    for prompt, completion in arithmetic_corpus(2000, seed=5):
        texts.append(prompt + completion)
        # No special tokens, and no token across the border.
        alone = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
        assert alone == tokenizer(texts[-1])["input_ids"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_vocabulary_is_what_occurs():
    tokenizer = build_tokenizer(vocabulary_texts())
    texts = [prompt + completion for prompt, completion in arithmetic_corpus(5000)]
    used = {i for text in texts for i in tokenizer.backend_tokenizer.encode(text).ids}
    unused = set(tokenizer.get_vocab()) - set(tokenizer.convert_ids_to_tokens(sorted(used)))
    # Numbers that no problem leads to are kept, so that the vocabulary has no gaps.
    assert {token for token in unused if not token.strip().isdigit()} == {"<pad>", "<eos>", "<unk>"}


def test_tokenizer_of_other_text():
    tokenizer = build_tokenizer(["One fish."])
    assert tokenizer.tokenize("One fish? Two.") == ["One", " fish", "<unk>", "<unk>", "."]
    assert tokenizer.decode(
        tokenizer("One fish.")["input_ids"] + [tokenizer.eos_token_id], skip_special_tokens=True
    ) == ("One fish.")


def test_labels_are_the_completion_and_eos():
    tokenizer = build_tokenizer(vocabulary_texts())
    pairs = arithmetic_corpus(20)
    input_ids, labels = encode_corpus(pairs, tokenizer)
    for (prompt, completion), ids, row in zip(pairs, input_ids, labels, strict=True):
        assert tokenizer.decode(row[row != IGNORED]) == completion + "<eos>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


# --- the policy ------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(made, tmp_path):
    again = make(tmp_path).parent
    for name in REPRODUCED:
        assert (made / "demo-v1-seed0" / name).read_bytes() == (again / name).read_bytes(), name


def test_another_seed_gives_another_policy(made, tmp_path):
    other = make(tmp_path, seed=1).parent
    assert other.name == "demo-v1-seed1"
    for name in ("base/model.safetensors", "checkpoint/optimizer.pt"):
        assert (made / "demo-v1-seed0" / name).read_bytes() != (other / name).read_bytes(), name


def test_checkpoint_is_one_that_the_library_loads(made):
    checkpoint = made / "demo-v1-seed0/checkpoint"
    config = CheckpointConfig(checkpoint_path=str(checkpoint))
    model, tokenizer = load_policy_model(config, locate_checkpoint(config), "cpu")
    assert tokenizer.eos_token == "<eos>"
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(bool(p.any()) for name, p in trainable.items() if "lora_B" in name)  # GRPO has changed it
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["lr"] == TINY.grpo_lr
    assert state["param_groups"][0]["param_names"] == list(trainable)
    assert len(state["state"]) == len(trainable)
    assert all(float(entries["step"]) == TINY.grpo_steps for entries in state["state"].values())


def test_facts_of_the_demo(made):
    facts = json.loads((made / "demo-v1-seed0/demo.json").read_text())
    assert (facts["version"], facts["seed"], facts["recipe"]["hidden_size"]) == (cache.DEMO_VERSION, 0, 32)
    for part in ("before_grpo", "after_grpo"):
        assert facts[part]["entropy_per_response"] > 0
        assert 0 <= facts[part]["accuracy"] <= 1


def test_global_state_is_left_alone(tmp_path):
    def seen():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, threads = seen(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            make(tmp_path, replace(TINY, pretrain_steps=1, grpo_steps=1))
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen() == before


def test_progress_is_on_stderr_or_nowhere(tmp_path, capfd, monkeypatch):
    short = replace(TINY, pretrain_steps=3, grpo_steps=2)
    make(tmp_path / "quiet", short)
    assert capfd.readouterr() == ("", "")
    ensure_demo_checkpoint(tmp_path / "in a file", recipe=short)
    out, lines = capfd.readouterr()
    assert out == ""
    assert [re.sub(r"[\d.]+", "#", line.replace(" ", "")) for line in lines.splitlines()] == [
        "pre-training#sdemopolicy:#steps,loss#",
        "GRPO#sdemopolicy:#steps,reward#",
    ]
    with Terminal() as terminal:
        terminal.take_over(monkeypatch)
        monkeypatch.setattr("probe.progress.REDRAW_SECONDS", 0.0)
        ensure_demo_checkpoint(tmp_path / "loud", recipe=short)
    raw = terminal.raw.decode()
    assert "demo: pre-training, loss " in raw
    assert "2/3" in raw
    assert "demo: GRPO, reward " in raw
    assert [line.split()[0] for line in terminal.lines] == ["pre-training", "GRPO"]  # the bars are gone


def test_whether_it_is_there(copied, tmp_path, monkeypatch):
    assert demo_is_cached(copied)
    assert not demo_is_cached(copied, seed=1)
    assert not demo_is_cached(tmp_path / "empty")
    config = ProbeConfig(checkpoint=CheckpointConfig(checkpoint_path="demo"))
    monkeypatch.setenv("ENTROPY_PROBE_CACHE", str(copied))
    assert not EntropyProbe(config).make_demo()  # reused
    monkeypatch.setenv("ENTROPY_PROBE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("probe.module.ensure_demo_checkpoint", lambda: make(tmp_path / "empty"))
    assert EntropyProbe(config).make_demo()  # trained


@pytest.mark.slow
def test_demo_is_worth_probing(demo_cache):
    facts = json.loads((demo_cache / "demo-v1-seed0" / "demo.json").read_text())
    before, after = facts["before_grpo"], facts["after_grpo"]
    assert 0.2 < before["accuracy"] < 0.6
    assert after["accuracy"] > before["accuracy"]
    assert 0.3 < after["entropy_per_token"] < before["entropy_per_token"]
    assert 8 < after["mean_length"] < 20
    assert after["truncated_fraction"] < 0.01


# --- the cache -------------------------------------------------------------------------------------------------


def test_cache_is_reused(copied, builds):
    assert make(copied) == copied / "demo-v1-seed0/checkpoint"
    assert builds == []


@pytest.mark.parametrize("name", cache.DEMO_FILES)
def test_damaged_cache_is_made_again(copied, builds, name):
    (copied / "demo-v1-seed0" / name).unlink()
    make(copied)
    assert builds == [0]
    assert [path.name for path in copied.iterdir()] == ["demo-v1-seed0"]
    assert cache.is_complete(copied / "demo-v1-seed0")


def test_unreadable_or_older_facts_count_as_damage(copied):
    facts = copied / "demo-v1-seed0/demo.json"
    for content in ("", "[]", "{}", '{"version": 0}'):
        facts.write_text(content)
        assert not cache.is_complete(copied / "demo-v1-seed0")


def test_moved_cache_is_made_again(copied, builds):
    moved = copied.rename(copied.with_name("moved"))
    make(moved)
    assert builds == [0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupted(*args, **options):
        raise error

    monkeypatch.setattr(build, "demo_statistics", interrupted)  # after the base model is saved
    with pytest.raises(error):
        make(tmp_path, replace(TINY, pretrain_steps=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["save_pretrained", "torch.save", "write_text"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/2"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_which_folder_and_leaves_nothing(tmp_path, monkeypatch, where, error):
    """Every library that writes a part of the demo has an error of its own for it."""
    names = {
        "save_pretrained": "transformers.PreTrainedModel.save_pretrained",
        "torch.save": "torch.save",
        "write_text": "pathlib.Path.write_text",
    }

    def full(*args, **options):
        raise error

    monkeypatch.setattr(names[where], full)
    with pytest.raises(CheckpointError, match=f"found {tmp_path} .*; set ENTROPY_PROBE_CACHE"):
        make(tmp_path, replace(TINY, pretrain_steps=1))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_goes(tmp_path, builds):
    left = tmp_path / name_of_ended_process().replace(".tmp-entropy-probe", ".demo-v1-seed0")
    left.mkdir(parents=True)
    (left / "base").mkdir()
    make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v1-seed0"]


def test_loser_of_a_race_takes_the_winners_demo(tmp_path, builds, monkeypatch):
    fake = cache.build_demo

    def overtaken(folder, base_path, *args):
        fake(folder, base_path, *args)
        if len(builds) == 1:  # the other process starts later and ends sooner
            make(tmp_path)
            (base_path.parent / "winner").touch()

    monkeypatch.setattr(cache, "build_demo", overtaken)
    make(tmp_path)
    assert len(builds) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v1-seed0"]
    assert (tmp_path / "demo-v1-seed0/winner").exists()


def test_cache_folder_of_the_environment(tmp_path, builds, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("ENTROPY_PROBE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    demo = "demo-v1-seed0/checkpoint"
    assert make(None) == tmp_path / "home/.cache/entropy-probe" / demo
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert make(None) == tmp_path / "xdg/entropy-probe" / demo
    monkeypatch.setenv("ENTROPY_PROBE_CACHE", "~/own")
    assert make(None) == tmp_path / "home/own" / demo
    monkeypatch.chdir(tmp_path)
    assert make("here") == tmp_path / "here" / demo  # absolute: the adapter names its base model


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"expected a cache folder that can be written, found .*ENTROPY_PROBE_CACHE"
    ):
        make(tmp_path / "file/cache")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed(tmp_path, seed):
    with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\*\*32 - 1, found"):
        make(tmp_path, seed=seed)
