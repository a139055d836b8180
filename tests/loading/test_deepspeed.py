"""Optimizer states in the files of DeepSpeed's ZeRO."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import OptimizerStateError
from probe.loading import load_optimizer, locate_checkpoint
from probe.loading.deepspeed import deepspeed_folder, read_deepspeed
from probe.parameters import trainable_parameters
from tests.support.deepspeed_files import write_universal, write_zero
from tests.support.tiny_models import add_lora, save_checkpoint, take_steps, tiny_model

MOST = 10**9
KINDS = {
    "stage 2": {},
    "stage 2, one rank": {"ranks": 1},
    "stage 2, five ranks, in another order": {"ranks": 5, "reverse": True},
    "stage 1, older": {"mappings": False, "ranks": 3},
    "stage 2, DeepSpeed's Adam": {"fused": True},
    "stage 3": {"stage": 3, "ranks": 3},
    "stage 3, DeepSpeed's Adam": {"stage": 3, "fused": True},
}


def trained(lora):
    """A policy, and AdamW with decay for its matrices only, after a few steps."""
    model = add_lora(tiny_model(), lora_dropout=0.0) if lora else tiny_model()
    own = list(trainable_parameters(model).values())
    halves = own[::2], own[1::2]
    optimizer = torch.optim.AdamW(
        [{"params": halves[0], "weight_decay": 0.1, "lr": 2e-3}, {"params": halves[1], "weight_decay": 0.0}],
        lr=1e-3,
    )
    take_steps(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_optimizer_that_was_cut(tmp_path, kind, lora):
    model, optimizer = trained(lora)
    write_zero(tmp_path, model, optimizer, **KINDS[kind])
    loaded = load_optimizer(model, tmp_path, CheckpointConfig())
    assert any("DeepSpeed's files" in note for note in loaded.notes)
    assert any("float32 copies" in note for note in loaded.notes)
    groups = {id(p): group for group in loaded.optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state, own = loaded.optimizer.state[p], optimizer.state[p]
            assert torch.equal(state["exp_avg"], own["exp_avg"])
            assert torch.equal(state["exp_avg_sq"], own["exp_avg_sq"])
            assert float(state["step"]) == float(own["step"])
            for key in ("lr", "weight_decay", "eps"):
                assert groups[id(p)][key] == group[key]


def test_it_is_found_beside_a_model(tmp_path):
    model, optimizer = trained(lora=False)
    save_checkpoint(tmp_path, model, None, layout="flat")
    inside = write_zero(tmp_path, model, optimizer)
    assert locate_checkpoint(CheckpointConfig(checkpoint_path=str(tmp_path))).optimizer_file == inside
    assert deepspeed_folder(tmp_path) == deepspeed_folder(inside) == inside
    older = tmp_path / "global_step4"
    older.mkdir()
    (older / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert deepspeed_folder(tmp_path) == inside  # the one that `latest` names
    for outside in ("../elsewhere", "..", "."):
        (tmp_path / "latest").write_text(outside)
        assert deepspeed_folder(tmp_path) is None


def test_the_universal_format(tmp_path):
    model, optimizer = trained(lora=True)
    universal = write_universal(tmp_path, model, optimizer)
    loaded = load_optimizer(model, universal, CheckpointConfig())
    assert deepspeed_folder(tmp_path) == universal
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state[p].items():
                assert torch.equal(loaded.optimizer.state[p][key], value)
    write_zero(tmp_path, model, optimizer)
    assert deepspeed_folder(tmp_path) == tmp_path / "global_step5"  # which says more


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 2}, "2 groups with different settings"),
        ({"third": True}, "of ZeRO-3 without their shapes"),
    ],
)
def test_what_the_universal_format_does_not_say(tmp_path, options, said):
    model, optimizer = trained(lora=True)
    universal = write_universal(tmp_path, model, optimizer, **options)
    with pytest.raises(OptimizerStateError, match=f"{said}.*name the folder that it was converted from"):
        read_deepspeed(universal, MOST)


def damaged(tmp_path, change):
    """What is said of a checkpoint with a change to what its first rank has saved."""
    model, optimizer = trained(lora=True)
    inside = write_zero(tmp_path, model, optimizer)
    change(inside)
    with pytest.raises(OptimizerStateError) as error:
        read_deepspeed(inside, MOST)
    return str(error.value)


def rewrite(inside, act):
    """Change what the first rank's file holds, without the classes that nobody has here."""
    file = inside / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))

    class Plain:
        def __init__(self, *made_with):
            pass

    known = [(int if "Enum" in name else Plain, name) for name in names]
    with torch.serialization.safe_globals(known):
        content = torch.load(file, weights_only=True)
    own = content["optimizer_state_dict"]
    own.pop("loss_scaler", None)
    own.pop("param_slice_mappings", None)
    act(own)
    torch.save({"optimizer_state_dict": own}, file)


def drop(inside):
    (inside / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def truncate(inside):
    file = inside / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-900])


def without_shapes(inside):
    (inside / "mp_rank_00_model_states.pt").unlink()


def tensor_parallel(inside):
    (inside / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"x")


def short(own):
    own["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(3)


def no_state(own):
    own["base_optimizer_state"] = 7


def elastic(own):
    own["base_optimizer_state"] = [own["base_optimizer_state"]["state"][0]] * 2


def endless(own):
    own["partition_count"] = 10**12


def spread(own):
    state = own["base_optimizer_state"]["state"][0]
    state["exp_avg"] = torch.zeros(1).expand(10**10)


def twice(inside):
    (inside / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")


def uncorrected(own):
    own["base_optimizer_state"]["param_groups"][0]["bias_correction"] = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "a file of each of 2 ranks, found those of [0]"),
        (truncate, "expected a file that DeepSpeed wrote"),
        (without_shapes, "expected the shapes of the parameters"),
        (tensor_parallel, "tensor parallelism"),
        (lambda inside: rewrite(inside, short), "entries of another kind"),
        (lambda inside: rewrite(inside, no_state), "entries of another kind"),
        (lambda inside: rewrite(inside, elastic), "found an elastic one"),
        (lambda inside: rewrite(inside, endless), "a file of each of 1000000000000 ranks"),
        (lambda inside: rewrite(inside, spread), "entries of another kind"),
        (twice, "one file of each rank"),
        (lambda inside: rewrite(inside, uncorrected), "Adam without bias correction"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, said):
    assert said in damaged(tmp_path, change)


class Hostile:
    """Runs a command where it is unpickled as pickle does it."""

    def __init__(self, file, how="subprocess"):
        self.file, self.how = file, how

    def __reduce__(self):
        if self.how == "os":
            return os.system, (f"touch {self.file}",)
        return subprocess.call, (["touch", str(self.file)],)


def test_no_code_in_the_files_runs(tmp_path):
    model, optimizer = trained(lora=True)
    inside = write_zero(tmp_path / "checkpoint", model, optimizer)
    target = tmp_path / "ran"
    rewrite(inside, lambda own: own.update(extra=Hostile(target)))
    found, _ = read_deepspeed(inside, MOST)
    assert not target.exists()
    assert set(found["state"]) == set(trainable_parameters(model))
    rewrite(inside, lambda own: own.update(extra=Hostile(target, "os")))
    with pytest.raises(OptimizerStateError, match=r"a pickle that needs posix\.system, which could run code"):
        read_deepspeed(inside, MOST)
    assert not target.exists()


def test_too_large_for_the_model(tmp_path):
    model, optimizer = trained(lora=True)
    inside = write_zero(tmp_path, model, optimizer)
    with pytest.raises(OptimizerStateError, match="at most 1000 bytes"):
        read_deepspeed(inside, 1000)
