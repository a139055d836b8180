"""Optimizer states in one file of every rank, as verl writes them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError, OptimizerStateError
from probe.loading import load_optimizer, locate_checkpoint
from probe.loading.rank_files import has_rank_files, read_rank_files
from tests.support.tiny_models import adamw, add_lora, save_checkpoint, tiny_model
from tests.support.trainings import in_processes

MOST = 10**9


def policy(lora):
    model = tiny_model(hidden=20, num_attention_heads=2, num_key_value_heads=1)
    return add_lora(model, lora_dropout=0.0) if lora else model


def gradient(p, k):
    generator = torch.Generator().manual_seed(1000 * k + p.numel())
    return torch.randn(p.shape, generator=generator)


def save(folder, name, lora, two_groups):
    """Train on shards, and write what verl's checkpoint manager writes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = policy(lora)
    shape = (2, size // 2) if two_groups else (size,)
    names = ("ddp", "fsdp") if two_groups else ("fsdp",)
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (model.get_base_model() if lora else model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    for k in range(2):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.distributed.tensor.distribute_tensor(
                    gradient(p, k), p.device_mesh, p.placements, src_data_rank=None
                )
        optimizer.step()
    own = folder / name
    own.mkdir(exist_ok=True)
    torch.save(optimizer.state_dict(), own / f"optim_world_size_{size}_rank_{rank}.pt")
    torch.save(model.state_dict(), own / f"model_world_size_{size}_rank_{rank}.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    in_processes(2, save, folder, "full", False, False)
    in_processes(3, save, folder, "lora", True, False)
    in_processes(4, save, folder, "two groups", True, True)
    return folder


@pytest.mark.parametrize("name", ["full", "lora", "two groups"])
def test_it_is_the_optimizer_that_was_cut(saved, name):
    model = policy(name != "full")
    optimizer = adamw(model)
    for k in range(2):
        for p in model.parameters():
            p.grad = gradient(p, k) if p.requires_grad else None
        optimizer.step()
    loaded = load_optimizer(model, saved / name, CheckpointConfig())
    assert any("the files of" in note for note in loaded.notes)
    for p in model.parameters():
        if p.requires_grad:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(loaded.optimizer.state[p][key], optimizer.state[p][key])


def test_it_is_found_beside_adapter_and_model(saved, tmp_path):
    actor = tmp_path / "global_step_5" / "actor"
    for inner in ("lora_adapter", "huggingface"):
        save_checkpoint(actor / inner, policy(inner == "lora_adapter"), None, layout="flat")
    for file in (saved / "lora").iterdir():
        (actor / file.name).write_bytes(file.read_bytes())
    for inner in ("lora_adapter", "huggingface"):
        found = locate_checkpoint(CheckpointConfig(checkpoint_path=str(actor / inner)))
        assert found.optimizer_file == actor
    with pytest.raises(CheckpointError, match="adapters stand in"):
        locate_checkpoint(CheckpointConfig(checkpoint_path=str(actor)))


def said(folder):
    with pytest.raises(OptimizerStateError) as error:
        read_rank_files(folder, MOST)
    return str(error.value)


def test_what_is_wrong_is_said(saved, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    assert not has_rank_files(own)
    files = sorted((saved / "lora").glob("optim*"))
    for file in files[:2]:
        (own / file.name).write_bytes(file.read_bytes())
    assert "expected a file of each rank" in said(own)
    (own / files[2].name).write_bytes(files[2].read_bytes()[:-500])
    assert files[2].name in said(own)
    (own / files[2].name).write_bytes(files[1].read_bytes())  # a part twice
    other = torch.load(files[1], weights_only=True)
    other["state"].pop(0)
    torch.save(other, own / files[2].name)
    assert "entries that not all ranks have" in said(own)
    torch.save({"state": {}, "param_groups": [], "more": torch.nn.Linear}, own / files[2].name)
    assert "could run code" in said(own)
    with pytest.raises(OptimizerStateError, match="at most 1000 bytes"):
        read_rank_files(saved / "lora", 1000)


def test_parts_that_do_not_make_up_the_tensor(saved, tmp_path):
    files = sorted((saved / "full").glob("optim*"))
    for file in files:
        (tmp_path / file.name).write_bytes(files[0].read_bytes())
    broken = torch.load(files[0], weights_only=True)
    state = broken["state"][0]
    state["exp_avg"]._local_tensor = state["exp_avg"]._local_tensor[:1]
    torch.save(broken, tmp_path / files[1].name)
    assert "of a tensor of shape" in said(tmp_path)
