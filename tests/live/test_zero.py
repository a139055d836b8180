"""Trainings with DeepSpeed's ZeRO-1 and ZeRO-2, by a stand-in with its interface."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from probe.errors.exceptions import ConfigError
from probe.live.zero import ZeroOptimizer, zero_optimizer
from tests.support.live_loops import adamw, attach, full_model, lora_model, numbers
from tests.support.stand_in_deepspeed import DeepSpeedEngine, DeepSpeedZeroOptimizer
from tests.support.trainings import bits, in_processes, set_streams, streams

STEPS = 4
PROBE = {"B_E": 6, "max_new_tokens": 4, "microbatch_size": 2, "strict": True}


def made(kind, dtype):
    torch.manual_seed(0)
    model = (lora_model if kind == "lora" else full_model)(seed=0, layers=2).to(dtype)
    return model, adamw(model, lr=1e-3)


def train(folder, kind="lora", how="zero", probe=None, dtype=torch.float32, spoil=None):
    """A loop on data that differs between the ranks: what is left of it, and what the probe has found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    set_streams(100 + rank)
    model, optimizer = made(kind, dtype)
    torch.manual_seed(100 + rank)
    if how == "zero":
        engine = DeepSpeedEngine(model, optimizer)
        watch = None if probe is None else attach(engine, engine, **probe)
    else:
        engine = torch.nn.parallel.DistributedDataParallel(model)
        watch = None if probe is None else attach(model, optimizer, **probe)
    losses = []
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(10 * k + rank)
        ids = torch.randint(4, 100, (2, 6), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        if how == "zero":
            engine.optimizer.overflow = spoil == "overflow" and k == 1
            engine.backward(loss)
            engine.step()
            engine.optimizer.zero_grad()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if spoil == "detach" and k == 1 and watch is not None:
            watch.detach()
    left = bits([dict(model.named_parameters()), optimizer.state_dict()["state"], streams(), losses])
    return left, None if watch is None else numbers(watch.history)


@pytest.mark.parametrize(("kind", "dtype"), [("lora", torch.float32), ("full", torch.bfloat16)])
def test_every_step_of_the_engine_is_probed_and_none_is_changed(tmp_path, kind, dtype):
    plain = in_processes(2, train, tmp_path, kind, "zero", None, dtype)
    probed = in_processes(2, train, tmp_path, kind, "zero", PROBE, dtype)
    assert [one[0] for one in plain] == [one[0] for one in probed]
    histories = [one[1] for one in probed]
    assert bits(histories[0]) == bits(histories[1])
    assert [entry["step"] for entry in histories[0]] == [1, 2, 3, 4]
    assert all(entry["learning_rate"] == 1e-3 for entry in histories[0])
    assert all(abs(entry["deltaH_true"]) > 0 for entry in histories[0])


def test_the_numbers_are_those_of_the_same_training_with_ddp(tmp_path):
    zero = in_processes(2, train, tmp_path, "lora", "zero", PROBE)[0][1]
    whole = in_processes(2, train, tmp_path, "lora", "ddp", PROBE)[0][1]
    for one, other in zip(zero, whole, strict=True):
        for key in ("deltaH1", "deltaH_true", "deltaH1_tok", "H_orig_tok", "step_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-2, abs=1e-6), key


def test_a_step_that_overflows_is_one_of_nothing(tmp_path):
    for _, history in in_processes(2, train, tmp_path, "lora", "zero", PROBE, torch.float32, "overflow"):
        assert [entry["deltaH_true"] == 0 for entry in history] == [False, True, False, False]


def test_a_detached_probe_leaves_the_training_as_it_was(tmp_path):
    plain = in_processes(2, train, tmp_path)
    detached = in_processes(2, train, tmp_path, "lora", "zero", PROBE, torch.float32, "detach")
    assert [one[0] for one in plain] == [one[0] for one in detached]
    assert [len(one[1]) for one in detached] == [2, 2]


class Zero(DeepSpeedZeroOptimizer):
    """A class derived from it, of one process that makes no step."""

    def __init__(self, parameters, groups):
        self.optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.5)
        self.bit16_groups = groups
        self.steps = []

    def step(self, closure=None):
        self.steps.append(closure)
        return "stepped"


def test_hooks_stand_around_the_step_and_rates_are_set_through():
    p = torch.nn.Parameter(torch.zeros(3))
    zero = Zero([p], [[p]])
    adapted = zero_optimizer(zero)
    assert adapted is zero_optimizer(zero)
    assert "step" not in vars(zero)
    seen = []
    before = adapted.register_step_pre_hook(lambda *_: seen.append("before"))
    after = adapted.register_step_post_hook(lambda *_: seen.append("after"))
    assert zero.step() == "stepped"
    assert seen == ["before", "after"]
    (group,) = adapted.param_groups
    group["lr"] = 0.25
    assert zero.param_groups[0]["lr"] == 0.25
    assert [q is p for q in group["params"]] == [True]
    assert set(group) == set(zero.param_groups[0])
    before.remove()
    after.remove()
    assert zero.step() == "stepped"
    assert "step" not in vars(zero)
    assert seen == ["before", "after"]
    assert zero.steps == [None, None]


def test_a_step_that_somebody_has_put_around_it_stays():
    p = torch.nn.Parameter(torch.zeros(3))
    zero = Zero([p], [[p]])
    handle = zero_optimizer(zero).register_step_pre_hook(lambda *_: None)
    inner, calls = zero.step, []

    def outer(*args):
        calls.append(1)
        return inner(*args)

    zero.step = outer
    handle.remove()
    for _ in range(2):
        assert zero.step() == "stepped"
    assert vars(zero)["step"] is outer
    assert len(calls) == len(zero.steps) == 2


def test_it_is_not_kept_alive():
    p = torch.nn.Parameter(torch.zeros(3))
    zero = Zero([p], [[p]])
    zero_optimizer(zero)
    gone = weakref.ref(zero)
    del zero
    gc.collect()
    assert gone() is None


def test_groups_that_cannot_be_read_are_refused():
    zero = Zero([], [])
    with pytest.raises(ConfigError, match="to hold the model's parameters by its groups"):
        ZeroOptimizer(zero)


def test_zero_3_is_refused():
    model, optimizer = full_model(seed=0), None
    optimizer = adamw(model)
    for p in model.parameters():
        p.ds_id = 1
    with pytest.raises(ConfigError, match="found DeepSpeed ZeRO-3's"):
        attach(model, optimizer)
