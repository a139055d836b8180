"""A probe inside of a training whose processes hold parts of the weights (FSDP2)."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from probe.errors.exceptions import ConfigError
from probe.shards import part
from tests.support.live_loops import SMALL, adamw, attach, full_model, lora_model, numbers, sgd
from tests.support.tiny_models import add_lora, tiny_model
from tests.support.trainings import bits, in_processes, set_streams, streams

STEPS = 3
PROBE = {
    "B_E": 6,
    "max_new_tokens": 4,
    "microbatch_size": 2,
    "derivative": "finite_difference",
    "strict": True,
}


def train(folder, kind="lora", how="fsdp", probe=None, optimizer=adamw, bf16=False, break_at=None):
    """A loop on data that differs between the processes: what is left of it, and what the probe has found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    set_streams(100 + rank)
    torch.manual_seed(0)
    model = full_model(seed=0, layers=2) if kind == "full" else lora_model(seed=0, layers=2)
    if kind == "thin":  # the second process has no part of A, and B is 0
        model = add_lora(tiny_model(**SMALL), r=1).train()
        for name, p in model.named_parameters():
            p.data *= 0.0 if "lora_B" in name else 1.0
    if not bf16:
        model = model.double()
    forward = model
    if how == "fsdp":
        mesh = torch.distributed.init_device_mesh("cpu", (size,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
        for layer in (model if kind == "full" else model.get_base_model()).model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:
        forward = torch.nn.parallel.DistributedDataParallel(model)
    made = optimizer(model)
    torch.manual_seed(100 + rank)
    watch = None if probe is None else attach(model, made, **probe)
    if break_at is not None:
        spoil(watch, break_at, rank)
    losses = []
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(10 * k + rank)
        ids = torch.randint(4, 100, (2, 6), generator=generator)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(float(loss.detach()))
    left = [{n: part(p) for n, p in model.named_parameters()}, moments(made), streams(), losses]
    found = None if watch is None else (numbers(watch.history), watch.error and str(watch.error))
    return bits(left), found


def moments(optimizer):
    return [
        {k: part(x) for k, x in optimizer.state[p].items()}
        for g in optimizer.param_groups
        for p in g["params"]
    ]


def spoil(watch, number, rank):
    """Let the probe of one update fail on one process, in the middle of its work."""
    original = watch._probe.before

    def before(k):
        if k == number and rank == 1:
            raise ValueError("a broken probe")
        return original(k)

    watch._probe.before = before


@pytest.mark.parametrize(("kind", "ranks"), [("lora", 2), ("full", 3)])
def test_it_leaves_no_trace_and_finds_what_a_training_with_whole_weights_does(tmp_path, kind, ranks):
    plain = in_processes(ranks, train, tmp_path, kind)
    probed = in_processes(ranks, train, tmp_path, kind, "fsdp", PROBE)
    assert [one[0] for one in plain] == [one[0] for one in probed]
    histories = [one[1][0] for one in probed]
    assert all(bits(history) == bits(histories[0]) for history in histories)
    whole = in_processes(ranks, train, tmp_path, kind, "ddp", PROBE)[0][1][0]
    assert [entry["step"] for entry in histories[0]] == [entry["step"] for entry in whole] == [1, 2, 3]
    for sharded, entry in zip(histories[0], whole, strict=True):
        for key in ("deltaH1", "deltaH_true", "deltaH1_tok", "deltaH_true_tok", "H", "step_norm", "momentum"):
            if key in entry and entry[key] is not None:
                assert sharded[key] == pytest.approx(entry[key], rel=1e-4, abs=1e-9), key


def test_a_part_of_the_step_that_one_process_has_none_of(tmp_path):
    for _, (history, error) in in_processes(2, train, tmp_path, "thin", "fsdp", PROBE):
        assert error is None
        assert abs(history[0]["deltaH1_decay_tok"]) >= 0.0
        assert len(history) == STEPS


def test_forwards_in_16_bits_and_another_optimizer(tmp_path):
    settings = {**PROBE, "derivative": "auto"}
    plain = in_processes(2, train, tmp_path, "lora", "fsdp", None, sgd, True)
    probed = in_processes(2, train, tmp_path, "lora", "fsdp", settings, sgd, True)
    assert [one[0] for one in plain] == [one[0] for one in probed]
    for _, (history, error) in probed:
        assert error is None
        assert len(history) == STEPS


def test_a_probe_that_fails_on_one_process_ends_on_all_and_the_training_goes_on(tmp_path):
    plain = in_processes(2, train, tmp_path)
    broken = in_processes(2, train, tmp_path, "lora", "fsdp", {**PROBE, "strict": False}, adamw, False, 2)
    assert [one[0] for one in plain] == [one[0] for one in broken]
    assert [one[1][1] for one in broken] == ["a broken probe"] * 2
    assert all(len(one[1][0]) == 1 for one in broken)


def refusals(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    said = []
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    parts = full_model(seed=0)
    for layer in parts.model.layers:
        fully_shard(layer, mesh=mesh)
    parallel = full_model(seed=0, tied=False)
    parallel.lm_head.weight = torch.nn.Parameter(
        torch.distributed.tensor.distribute_tensor(
            parallel.lm_head.weight.data, mesh, [torch.distributed.tensor.Shard(0)]
        )
    )
    for model in (parts, parallel):
        try:
            attach(model, adamw(model))
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_the_probe_cannot_work_with_is_refused(tmp_path):
    for said in in_processes(2, refusals, tmp_path):
        assert "call it on the policy too" in said[0]
        assert "tensor parallelism is not supported" in said[1]
