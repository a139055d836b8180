"""Optimizer states that FSDP has sharded: read as they are, to the numbers that an unsharded training has."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError, OptimizerStateError
from probe.loading import load_optimizer, locate_checkpoint
from probe.loading.sharded import is_sharded, read_sharded
from tests.support.tiny_models import add_lora, tiny_model
from tests.support.trainings import in_processes

LARGE = 10**9


def trained(model, steps=3):
    """An AdamW that has taken some steps, with the same gradients whatever the sharding."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
    )
    for k in range(steps):
        ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(k))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def policy(kind):
    return add_lora(tiny_model()) if kind == "lora" else tiny_model()


def save_sharded(folder, kind):
    """What FSDP2 leaves of a training on two ranks, as accelerate saves it."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = policy(kind)
    for module in model.modules():
        if type(module).__name__ == "Qwen2DecoderLayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = trained(model)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=str(folder / "optimizer_0"))
    return sorted(type(p).__name__ for p in model.parameters())


@pytest.fixture(scope="module", params=["lora", "full"])
def saved(request, tmp_path_factory):
    """The folder of a sharded training, and the same training unsharded."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint-3"
    folder.mkdir()
    names, _ = in_processes(2, save_sharded, folder, request.param)
    assert set(names) == {"DTensor"}
    model = policy(request.param)
    fresh = policy(request.param)
    optimizer = trained(model)
    fresh.save_pretrained(folder)
    return folder, fresh, model, optimizer


def test_moments_are_those_of_the_training_unsharded(saved):
    folder, fresh, model, optimizer = saved
    files = locate_checkpoint(CheckpointConfig(checkpoint_path=str(folder)))
    assert files.optimizer_file == folder / "optimizer_0"
    loaded = load_optimizer(fresh, files, CheckpointConfig(checkpoint_path=str(folder)))
    assert loaded.rule == "adamw"
    assert loaded.step == 3
    assert loaded.learning_rate == 1e-3
    assert loaded.optimizer.param_groups[0]["weight_decay"] == 0.1
    expected = {n: optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}
    found = {n: loaded.optimizer.state[p] for n, p in fresh.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, state in expected.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert float(state[key].abs().max()) > 0
            torch.testing.assert_close(found[name][key], state[key], rtol=1e-4, atol=1e-9)


def test_a_folder_is_named_like_a_file(saved):
    folder, fresh, *_ = saved
    config = CheckpointConfig(checkpoint_path=str(folder), optimizer_path=str(folder / "optimizer_0"))
    assert load_optimizer(fresh, locate_checkpoint(config), config).step == 3


# ---------------------------------------------------------------- what cannot be read


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the sharded optimizer to spoil."""
    return shutil.copytree(saved[0] / "optimizer_0", tmp_path / "optimizer_0")


class Code:
    """Runs code where it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_table_that_would_run_code_is_refused(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copy / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(OptimizerStateError, match=r"could run code \(posix\.mkdir\)"):
        read_sharded(copy, LARGE)
    assert not (tmp_path / "ran").exists()


def test_a_value_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "optimizer_0"
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save({"optimizer": {"state": Code()}}, checkpoint_id=str(folder))
    with pytest.raises(OptimizerStateError, match="copy all of its files"):
        read_sharded(folder, LARGE)
    assert not (tmp_path / "ran").exists()


def spoiled_table(copy, change):
    """The table of contents with a change."""
    table = pickle.loads((copy / ".metadata").read_bytes())
    change(table)
    (copy / ".metadata").write_bytes(pickle.dumps(table))


def elsewhere(table):
    for info in table.storage_data.values():
        info.relative_path = "../secret"


def huge(table):
    entry = next(e for e in table.state_dict_metadata.values() if hasattr(e, "size"))
    del entry.chunks[1:]
    entry.size = entry.chunks[0].sizes = torch.Size([10**12])
    entry.chunks[0].offsets = torch.Size([0])


def unfilled(table):
    entry = next(e for e in table.state_dict_metadata.values() if hasattr(e, "size"))
    entry.chunks.clear()


def twice(table):
    entry = next(e for e in table.state_dict_metadata.values() if hasattr(e, "size") and len(e.chunks) == 2)
    entry.chunks[1].offsets = entry.chunks[0].offsets


def negative(table):
    entry = next(e for e in table.state_dict_metadata.values() if hasattr(e, "size"))
    entry.size = torch.Size([-1, -1])


def packed(table):
    next(iter(table.storage_data.values())).transform_descriptors = ["zstd"]


def of_another_kind(table):
    table.storage_data = {"a": 1}


def test_a_table_cannot_change_classes(copy):
    is_file = type(copy).is_file
    (copy / ".metadata").write_bytes(b"cpathlib\nPath\n(N}X\x07\0\0\0is_fileX\x01\0\0\0xstb.")
    with pytest.raises(OptimizerStateError, match="could run code"):
        read_sharded(copy, LARGE)
    assert type(copy).is_file is is_file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unfilled, "parts that do not make up"),
        (twice, "lie over each other"),
        (negative, "parts that do not"),
        (packed, "packed"),
        (of_another_kind, "of another kind"),
        (elsewhere, "which is no file in its folder"),
        (huge, "tensors of 4"),
    ],
)
def test_a_table_that_promises_what_is_not_there_is_refused(copy, change, said):
    spoiled_table(copy, change)
    with pytest.raises(OptimizerStateError, match=said):
        read_sharded(copy, LARGE)


def test_missing_and_damaged_files_are_one_line(copy):
    with pytest.raises(OptimizerStateError, match="where at most 1000 can be"):
        read_sharded(copy, 1000)
    shards = sorted(copy.glob("*.distcp"))
    assert len(shards) == 2
    size = shards[1].stat().st_size
    shards[1].write_bytes(b"\0" * size)
    with pytest.raises(OptimizerStateError, match="copy all of its files"):
        read_sharded(copy, LARGE)
    shards[1].unlink()
    with pytest.raises(OptimizerStateError, match="no file in its folder"):
        read_sharded(copy, LARGE)
    (copy / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(OptimizerStateError, match="expected"):
        read_sharded(copy, LARGE)
    (copy / ".metadata").unlink()
    assert not is_sharded(copy)
    config = CheckpointConfig(checkpoint_path=str(copy.parent), optimizer_path=str(copy))
    with pytest.raises(CheckpointError):
        locate_checkpoint(config)
