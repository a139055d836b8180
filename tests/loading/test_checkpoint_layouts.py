"""Finding the parts of a checkpoint, with files that need no content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading import locate_checkpoint

LORA = ("adapter_config.json", "adapter_model.safetensors")
NESTED_LORA = tuple(f"model/{name}" for name in LORA)
FULL = ("config.json", "model.safetensors")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}", encoding="utf-8")
    return folder


def locate(path: Path | str | None, **options: str):
    return locate_checkpoint(CheckpointConfig(checkpoint_path=None if path is None else str(path), **options))


@pytest.mark.parametrize("given", ["step_60", "step_60/model", "step_60/model/../model"])
def test_nested_layout_given_either_way(tmp_path, given):
    root = touch(tmp_path / "step_60", *NESTED_LORA, "optimizer.pt", "model/tokenizer.json")
    found = locate(tmp_path / given)
    assert found.kind == "lora"
    assert found.model_dir == root / "model"
    assert found.optimizer_file == root / "optimizer.pt"
    assert found.tokenizer_dirs == (root / "model",)
    assert (found.name, found.step) == ("step_60", 60)
    assert found.trainer_state_file is None


def test_flat_trainer_layout(tmp_path):
    root = touch(tmp_path / "checkpoint-12", *LORA, "optimizer.pt", "tokenizer_config.json")
    (root / "trainer_state.json").write_text(json.dumps({"global_step": 12}), encoding="utf-8")
    found = locate(root)
    assert (found.kind, found.name, found.step) == ("lora", "checkpoint-12", 12)
    assert found.model_dir == root
    assert found.optimizer_file == root / "optimizer.pt"
    assert found.trainer_state_file == root / "trainer_state.json"


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_full_model(tmp_path, weights):
    root = touch(tmp_path / "final", "config.json", weights, "optimizer.pt")
    found = locate(root)
    assert (found.kind, found.name, found.step, found.tokenizer_dirs) == ("full", "final", None, ())


def test_adapter_goes_before_a_model_in_the_same_folder(tmp_path):
    assert locate(touch(tmp_path / "c", *LORA, *FULL, "optimizer.pt")).kind == "lora"


def test_step_of_the_trainer_state_goes_before_the_name(tmp_path):
    root = touch(tmp_path / "run_7", *FULL, "optimizer.pt")
    assert locate(root).step == 7
    (root / "trainer_state.json").write_text(json.dumps({"global_step": 900}), encoding="utf-8")
    assert locate(root).step == 900


def test_tokenizer_beside_the_model_folder_comes_second(tmp_path):
    root = touch(tmp_path / "c", *NESTED_LORA, "optimizer.pt", "tokenizer.json")
    assert locate(root).tokenizer_dirs == (root,)
    touch(root, "model/tokenizer.json")
    assert locate(root).tokenizer_dirs == (root / "model", root)


def test_optimizer_path_goes_first(tmp_path):
    root = touch(tmp_path / "c", *LORA, "optimizer.pt")
    other = touch(tmp_path, "elsewhere/adam.pt") / "elsewhere" / "adam.pt"
    assert locate(root, optimizer_path=str(other)).optimizer_file == other


def test_optimizer_bin_is_taken_where_there_is_no_optimizer_pt(tmp_path):
    root = touch(tmp_path / "c", *LORA, "optimizer.bin")
    assert locate(root).optimizer_file.name == "optimizer.bin"
    touch(root, "optimizer.pt")
    assert locate(root).optimizer_file.name == "optimizer.pt"


def test_a_flat_checkpoint_does_not_take_the_optimizer_of_its_parent(tmp_path):
    touch(tmp_path, "optimizer.pt")
    root = touch(tmp_path / "checkpoint-5", *LORA)
    with pytest.raises(
        CheckpointError, match=r"Optimizer state not found: looked for .*checkpoint-5/optimizer\.pt"
    ):
        locate(root)


def test_missing_path():
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.checkpoint_path: expected the folder of a checkpoint"
    ):
        locate(None)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"Checkpoint not found: .* there is no folder .*nowhere"):
        locate(tmp_path / "nowhere")


def test_file_instead_of_a_folder(tmp_path):
    touch(tmp_path, "adapter.txt")
    with pytest.raises(CheckpointError, match=r"expected a folder, found the file .*adapter\.txt"):
        locate(tmp_path / "adapter.txt")


def test_empty_folder_lists_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
        "/model/",
    ):
        assert name in str(caught.value)


def test_adapter_in_a_further_folder_is_pointed_at(tmp_path):
    touch(tmp_path, *(f"policy/{name}" for name in LORA))
    with pytest.raises(CheckpointError, match=r"adapters stand in .*policy: give that folder"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_pickled_weights_are_refused(tmp_path, name):
    touch(tmp_path, "adapter_config.json", "config.json", name, "optimizer.pt")
    with pytest.raises(CheckpointError, match=rf"found the pickle {name}, which can run code"):
        locate(tmp_path)


def test_missing_optimizer_names_the_remedy(tmp_path):
    touch(tmp_path, *NESTED_LORA)
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "optimizer.pt") in message
    assert str(tmp_path / "model" / "optimizer.pt") in message
    assert "checkpoint.optimizer_path" in message


def test_two_optimizers_are_ambiguous(tmp_path):
    touch(tmp_path, *NESTED_LORA, "optimizer.pt", "model/optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"ambiguous: expected one file, found .*checkpoint\.optimizer_path"
    ):
        locate(tmp_path)


def test_optimizer_path_that_does_not_exist(tmp_path):
    root = touch(tmp_path, *LORA)
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.optimizer_path: expected an existing file, found no"
    ):
        locate(root, optimizer_path=str(tmp_path / "none.pt"))


def test_optimizer_path_that_is_a_folder(tmp_path):
    root = touch(tmp_path / "c", *LORA)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.optimizer_path: expected a file, found the folder"
    ):
        locate(root, optimizer_path=str(tmp_path / "folder"))


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("epoch=3.ckpt", "a Lightning checkpoint"),
        ("optimizer_0/__0_0.distcp", "a sharded FSDP optimizer"),
        ("rank0-of-8-optimizer.pt", "an optimizer sharded by rank"),
    ],
)
def test_other_frameworks_are_recognised(tmp_path, name, what, with_model):
    touch(tmp_path, name, *(LORA if with_model else ()))
    with pytest.raises(CheckpointError, match=rf"found {what} .*gather it in one process"):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("name", "what", "how"),
    [
        ("last.ckpt/.metadata", "a Lightning checkpoint", "consolidate_checkpoint"),
        ("global_step9/mp_rank_00_model_states.pt", "DeepSpeed model shards", "zero_to_fp32"),
        (
            "global_step60/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "DeepSpeed optimizer shards",
            "zero_to_fp32.*is read as it is",
        ),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed optimizer shards", "zero_to_fp32"),
        ("_actor/global_step9/mp_rank_00_model_states.pt", "DeepSpeed shards", "zero_to_fp32"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "a sharded FSDP model", "accelerate merge-weights"),
        ("pytorch_model_fsdp.bin", "an FSDP model as a pickle", "accelerate merge-weights"),
        ("actor/optim_world_size_4_rank_0.pt", "verl's FSDP shards", r"verl\.model_merger"),
        ("model_world_size_4_rank_3.pt", "verl's FSDP model shards", r"verl\.model_merger"),
        (
            "optim_world_size_8_rank_0.pt",
            "verl's FSDP optimizer shards",
            r"verl\.model_merger.*is read as it is",
        ),
        ("dist_ckpt/__0_0.distcp", r"a torch\.distributed\.checkpoint folder", "dcp_to_torch_save"),
        ("actor/dist_ckpt/__0_0.distcp", r"a torch\.distributed\.checkpoint folder", "dcp_to_torch_save"),
        ("adapter_model-00001-of-00002.safetensors", "an adapter in several parts", "save_pretrained"),
        ("adapter_model.safetensors.index.json", "an adapter in several parts", "save_pretrained"),
        ("iter_0000010/mp_rank_00/model_optim_rng.pt", "a Megatron checkpoint", "export tool"),
        ("recipe_state/recipe_state.pt", "a torchtune checkpoint", "export tool"),
        ("adapters.safetensors", "an MLX adapter", "export tool"),
        ("model-q4.gguf", "a GGUF file", "the model it was made from"),
        ("consolidated.00.pth", "weights in their authors' format", "export tool"),
        ("tf_model.h5", "TensorFlow weights", "export tool"),
    ],
)
def test_each_layout_names_the_way_out_of_it(tmp_path, name, what, how):
    touch(tmp_path, name, "config.json", "adapter_config.json")
    with pytest.raises(CheckpointError, match=rf"found {what} .*{how}") as caught:
        locate(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_beside_a_folder_with_the_adapter(tmp_path):
    touch(tmp_path, *(f"lora_adapter/{name}" for name in LORA), "model_world_size_2_rank_0.pt")
    with pytest.raises(CheckpointError, match=r"found verl's FSDP model shards .*verl\.model_merger"):
        locate(tmp_path / "lora_adapter")
    with pytest.raises(CheckpointError, match=r"adapters stand in .*lora_adapter: give that folder"):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("model.safetensors", "config.json"), ("adapter_model.safetensors", "adapter_config.json")],
)
def test_weights_without_their_settings(tmp_path, name, missing):
    touch(tmp_path, name, "optimizer.bin")
    with pytest.raises(
        CheckpointError, match=rf"expected {missing} beside .*{name}, found none .*save_pretrained"
    ):
        locate(tmp_path)


def test_a_file_says_how_to_make_a_folder(tmp_path):
    touch(tmp_path, "step_3.pt")
    with pytest.raises(
        CheckpointError, match=r"found the file .*step_3\.pt; save the model with `save_pretrained`"
    ):
        locate(tmp_path / "step_3.pt")


def test_lightning_file_given_as_the_checkpoint_or_the_optimizer(tmp_path):
    touch(tmp_path, "last.ckpt", *LORA)
    with pytest.raises(CheckpointError, match=r"found a Lightning checkpoint .*last\.ckpt"):
        locate(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"found a Lightning checkpoint .*last\.ckpt"):
        locate(tmp_path, optimizer_path=str(tmp_path / "last.ckpt"))


def test_sharded_folder_given_as_the_optimizer(tmp_path):
    touch(tmp_path, *LORA, "fsdp/__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"found a torch\.distributed\.checkpoint folder"):
        locate(tmp_path, optimizer_path=str(tmp_path / "fsdp"))


@pytest.mark.parametrize(
    ("text", "match"), [("{", "expected JSON"), ("[]", r"\(a JSON object\), found list")]
)
def test_broken_trainer_state(tmp_path, text, match):
    touch(tmp_path, *LORA, "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        locate(tmp_path)
