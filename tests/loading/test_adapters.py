"""Adapters as trainings leave them: the policy that is rebuilt is the one that was saved, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError, OptimizerStateError
from probe.loading import (
    BACKBONES,
    load_optimizer,
    load_policy_model,
    locate_checkpoint,
    other_base,
    quiet_libraries,
)
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import (
    VOCABULARY,
    adamw,
    add_lora,
    load_base,
    save_base,
    save_checkpoint,
    take_steps,
)

ADDED = 6


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tied=request.param)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    return model(input_ids=torch.arange(4, rows)[None]).logits


def trained(model: Any) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    take_steps(model, optimizer)
    return optimizer


def rebuilt(folder: Path, **options: Any) -> Any:
    config = CheckpointConfig(checkpoint_path=str(folder), **options)
    files = locate_checkpoint(config)
    model, _ = load_policy_model(config, files, "cpu")
    load_optimizer(model, files, config)
    return model


def same(found: Any, live: Any) -> None:
    torch.testing.assert_close(logits(found), logits(live.eval()), rtol=0, atol=1e-5)


def tokenizer_with_added(count: int = ADDED) -> Any:
    tokenizer = char_tokenizer()
    tokenizer.add_tokens([f"<new_{index}>" for index in range(VOCABULARY + count - len(tokenizer))])
    return tokenizer


def saved(folder: Path, live: Any, tokenizer: Any = None, **options: Any) -> Path:
    optimizer = trained(live)
    save_checkpoint(folder, live, optimizer, tokenizer=tokenizer is None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    if options:
        with quiet_libraries():
            live.save_pretrained(folder / "model", **options)
    return folder


# ---------------------------------------------------------------- another number of tokens


def resized(base: Path, rows: int) -> Any:
    model = load_base(base)
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(7)
        model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},  # peft saves the embeddings on its own where their number changed
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {
            "trainable_token_indices": list(range(VOCABULARY, VOCABULARY + ADDED)),
            "target_modules": ["q_proj"],
        },
    ],
)
@pytest.mark.parametrize("rows", [VOCABULARY + ADDED, VOCABULARY + ADDED + 10])
def test_tokens_were_added(tmp_path, base, options, rows):
    options = dict(options)
    if "trainable_token_indices" in options:
        rows = VOCABULARY + ADDED
    live = add_lora(resized(base, rows), **options)
    same(rebuilt(saved(tmp_path / "c", live, tokenizer_with_added())), live)


def test_an_adapter_of_the_embeddings_themselves(tmp_path, base):
    """peft saves the layer that the adapter is on, and no other; an output layer of its own is then lost."""
    live = add_lora(resized(base, VOCABULARY + ADDED), target_modules=["embed_tokens", "q_proj"])
    folder = saved(tmp_path / "c", live, tokenizer_with_added())
    if live.config.tie_word_embeddings:
        same(rebuilt(folder), live)
    else:
        with pytest.raises(CheckpointError, match=rf"expected lm_head of the {ADDED} tokens that were added"):
            rebuilt(folder)


def test_tokens_were_taken_away(tmp_path, base):
    live = add_lora(resized(base, 100), modules_to_save=["embed_tokens", "lm_head"])
    model = rebuilt(saved(tmp_path / "c", live))
    same(model, live)
    assert model.get_input_embeddings().weight.shape[0] == 100


def test_the_base_stays_frozen_and_the_added_rows_are_trained(tmp_path, base):
    live = add_lora(resized(base, VOCABULARY + ADDED), modules_to_save=["embed_tokens", "lm_head"])
    model = rebuilt(saved(tmp_path / "c", live, tokenizer_with_added()))
    wanted = {name for name, p in live.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def test_added_tokens_that_were_not_saved_are_refused(tmp_path, base):
    live = add_lora(resized(base, VOCABULARY + ADDED))
    folder = saved(tmp_path / "c", live, tokenizer_with_added(), save_embedding_layers=False)
    match = rf"embed_tokens of the {ADDED} tokens that were added .* save_embedding_layers=True"
    with pytest.raises(CheckpointError, match=match):
        rebuilt(folder)


def test_two_numbers_of_tokens_in_one_file_are_refused(tmp_path, base):
    live = add_lora(resized(base, VOCABULARY + ADDED), modules_to_save=["embed_tokens", "lm_head"])
    folder = saved(tmp_path / "c", live, tokenizer_with_added())
    file = folder / "model/adapter_model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if "embed_tokens" in key)
    weights["base_model.model.lm_head.weight"] = weights[key][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expected embeddings of one number of tokens"):
        rebuilt(folder)


# ---------------------------------------------------------------- bases that an adapter changes


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["norm"]},
    ],
)
def test_what_can_be_rebuilt_is(tmp_path, base, options):
    from peft import LoraConfig, get_peft_model

    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(3)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        live = get_peft_model(load_base(base), LoraConfig(**settings, **options))
    same(rebuilt(saved(tmp_path / "c", live)), live)


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "model/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("kind", ["pissa_niter_1", "pissa_niter_16", "corda", "lora_ga", "loftq"])
def test_what_cannot_be_rebuilt_is_refused(tmp_path, base, kind):
    folder = edited(saved(tmp_path / "c", add_lora(load_base(base))), init_lora_weights=kind)
    match = (
        rf"found init_lora_weights {kind}, .*path_initial_model_for_weight_conversion.*checkpoint\.backbone"
    )
    with pytest.raises(CheckpointError, match=match):
        rebuilt(folder)


def test_a_changed_base_that_was_saved_is_what_the_remedy_says(tmp_path, base):
    """The residual base, and the adapter marked as one of a base that stays as it is."""
    live = add_lora(load_base(base), init_lora_weights="pissa_niter_4")
    folder = saved(tmp_path / "c", live)
    residual = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in live.state_dict().items()
        if "lora_" not in name
    }
    other = Path(shutil.copytree(base, tmp_path / "residual"))
    kept = load_file(other / "model.safetensors")
    save_file({name: residual[name] for name in kept}, other / "model.safetensors", metadata={"format": "pt"})
    same(rebuilt(edited(folder, init_lora_weights=True), backbone=str(other)), live)


def test_a_rebuilt_base_needs_the_type_it_was_changed_in(tmp_path, base):
    folder = saved(tmp_path / "c", add_lora(load_base(base), init_lora_weights="pissa"))
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.dtype: expected float32, .*pissa was changed, found float64"
    ):
        rebuilt(folder, dtype="float64")


def test_a_reference_that_would_change_the_base_is_refused(tmp_path, base):
    folder = saved(tmp_path / "c", add_lora(load_base(base)))
    reference = folder / "model/ref"
    reference.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "model" / name, reference / name)
    settings = json.loads((reference / "adapter_config.json").read_text())
    (reference / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "olora"}))
    with pytest.raises(CheckpointError, match="expected a reference adapter of the base model as it is"):
        rebuilt(folder)


@pytest.mark.parametrize("name", ["base_model.model.model.layers.0.mlp.no_such.bias", "other.weight"])
def test_weights_without_a_place_are_refused(tmp_path, base, name):
    folder = saved(tmp_path / "c", add_lora(load_base(base), bias="all"))
    file = folder / "model/adapter_model.safetensors"
    save_file({**load_file(file), name: torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"found {name}, which have no place in it"):
        rebuilt(folder)


# ---------------------------------------------------------------- parameters without a gradient


def vision_model(folder: Path) -> Path:
    """A model with a vision tower, which texts do not reach."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    special = {"image_token_index": 101, "boi_token_index": 102, "eoi_token_index": 103}
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
        char_tokenizer().save_pretrained(folder)
    return folder


def steps_on_texts(live: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(4, 24)[None]
    for _ in range(2):
        live(input_ids=ids, token_type_ids=torch.zeros_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("named", [False, True])
def test_a_vision_tower_in_a_training_on_texts(tmp_path, named):
    live = add_lora(load_base(vision_model(tmp_path / "base")), target_modules="all-linear")
    trainable = [(name, p) for name, p in live.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable if named else [p for _, p in trainable], lr=1e-3)
    steps_on_texts(live, optimizer)
    seen = {name for name, p in trainable if p in optimizer.state}
    assert len(seen) < len(trainable)
    folder = save_checkpoint(tmp_path / "c", live, optimizer)
    config = CheckpointConfig(checkpoint_path=str(folder))
    files = locate_checkpoint(config)
    model, _ = load_policy_model(config, files, "cpu")
    loaded = load_optimizer(model, files, config)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == seen
    assert any(
        f"{len(trainable) - len(seen)} trainable parameters never had" in note for note in loaded.notes
    )
    own = dict(model.named_parameters())
    for name, p in trainable:
        if name in seen:
            assert torch.equal(loaded.optimizer.state[own[name]]["exp_avg"], optimizer.state[p]["exp_avg"])
    assert all(p.grad is None for p in model.parameters())


def test_a_state_that_a_gradient_should_have_left_is_missed(tmp_path):
    live = add_lora(load_base(vision_model(tmp_path / "base")), target_modules="all-linear")
    optimizer = adamw(live)
    steps_on_texts(live, optimizer)
    gone = next(name for name, p in live.named_parameters() if p in optimizer.state)
    del optimizer.state[live.get_parameter(gone)]
    folder = save_checkpoint(tmp_path / "c", live, optimizer)
    with pytest.raises(OptimizerStateError, match=rf"found 1 faults: {gone}: .* found no state"):
        rebuilt(folder)


def test_a_state_that_is_missing_without_a_vision_tower(tmp_path, base):
    live = add_lora(load_base(base))
    optimizer = trained(live)
    del optimizer.state[next(p for p in live.parameters() if p.requires_grad)]
    with pytest.raises(OptimizerStateError, match="found 1 faults"):
        rebuilt(save_checkpoint(tmp_path / "c", live, optimizer))


# ---------------------------------------------------------------- another base, other layouts


def located(folder: Path, **options: Any) -> tuple[CheckpointConfig, Any]:
    config = CheckpointConfig(checkpoint_path=str(folder), **options)
    return config, locate_checkpoint(config)


@pytest.mark.parametrize(
    ("recorded", "given", "same"),
    [
        ("Qwen/Qwen2.5-1.5B", "qwen2_5_15", True),
        ("/models/Qwen2.5-1.5B/", "Qwen/Qwen2.5-1.5B", True),
        ("/cache/models--Qwen--Qwen2.5-1.5B/snapshots/0a1b", "qwen2_5_15", True),
        ("qwen/qwen2.5-1.5b", "qwen2_5_15", True),
        ("Qwen/Qwen2.5-1.5B", "qwen2_5_15_instruct", False),
        ("unsloth/Qwen2.5-1.5B-bnb-4bit", "qwen2_5_15", False),
        ("Qwen/Qwen2.5-Math-1.5B", "qwen2_5_15", False),
        (None, "qwen2_5_15", True),
    ],
)
def test_names_of_bases(tmp_path, base, recorded, given, same):
    folder = edited(saved(tmp_path / "c", add_lora(load_base(base))), base_model_name_or_path=recorded)
    found = other_base(*located(folder, backbone=given))
    assert (found is None) is same
    if not same:
        assert found == (recorded, BACKBONES[given])


def test_a_link_to_the_recorded_base_is_that_base(tmp_path, base):
    folder = saved(tmp_path / "c", add_lora(load_base(base)))
    (tmp_path / "elsewhere").symlink_to(base)
    assert other_base(*located(folder, backbone=str(tmp_path / "elsewhere"))) is None
    assert other_base(*located(folder)) is None


def test_another_base_of_the_same_shapes_is_said(tmp_path, base, caplog):
    live = add_lora(load_base(base))
    folder = saved(tmp_path / "c", live)
    another = save_base(tmp_path / "another", seed=5, tied=live.config.tie_word_embeddings)
    config, files = located(folder, backbone=str(another))
    with caplog.at_level("WARNING"):
        load_policy_model(config, files, "cpu")
    assert f"trained on {base}, put on {another}" in caplog.text


def test_a_whole_model_in_parts_with_an_index(tmp_path, base):
    live = load_base(base)
    optimizer = trained(live)
    folder = save_checkpoint(tmp_path / "c", live, optimizer)
    (folder / "model/model.safetensors").unlink()
    with quiet_libraries():
        live.save_pretrained(folder / "model", max_shard_size="20KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    same(rebuilt(folder), live)
    next((folder / "model").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"expected files in its own folder, found .*copy all parts"):
        rebuilt(folder)


def test_a_base_in_parts(tmp_path, base):
    live = add_lora(load_base(base))
    folder = saved(tmp_path / "c", live)
    parts = tmp_path / "parts"
    with quiet_libraries():
        load_base(base).save_pretrained(parts, max_shard_size="20KB")
        char_tokenizer().save_pretrained(parts)
    same(rebuilt(folder, backbone=str(parts)), live)


def test_weights_of_a_wrapped_model_say_what_to_save(tmp_path, base):
    live = load_base(base)
    folder = save_checkpoint(tmp_path / "c", live, trained(live))
    file = folder / "model/model.safetensors"
    save_file(
        {f"module.{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        CheckpointError, match=r"missing are .*; unused are module\..*save the unwrapped model"
    ):
        rebuilt(folder)
