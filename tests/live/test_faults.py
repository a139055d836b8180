"""Ctrl-C, failing handlers, replaced optimizers, updates outside of `step`: training goes on, and nothing is hidden."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import pytest
import torch
from torch import nn

from probe.errors.exceptions import ConfigError, DataError, NumericalError
from probe.live.neutral import undisturbed
from probe.loading import quiet_libraries
from tests.support.helpers import char_tokenizer, said
from tests.support.live_loops import (
    SMALL,
    Loop,
    adamw,
    attach,
    differences,
    full_model,
    lora_model,
    plain_step,
    process_state,
    trainable,
)
from tests.support.tiny_models import tiny_model

# ---------------------------------------------------------------- Ctrl-C


def objects(model: nn.Module) -> Any:
    """The very objects that stand in the model, by every path, and the flags of the process."""
    modules = [
        (
            module.__class__,
            {k: id(v) for k, v in vars(module).items()},
            *(
                [(k, id(v)) for k, v in vars(module)[name].items()]
                for name in ("_parameters", "_buffers", "_modules")
            ),
        )
        for module in model.modules()
    ]
    flags = [(id(p.grad), p.requires_grad, p._version) for p in model.parameters()]
    values = [b.tolist() for b in model.buffers()]
    switches = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
    )
    return modules, flags, values, switches, signal.getsignal(signal.SIGINT)


PUTTING_BACK = ("live/neutral.py", "live/held_model.py", "live/interrupts.py", "probe/snapshot.py")
"""Where what a probe changes is put back."""


def interrupted(model: nn.Module, strikes: tuple[int, ...]) -> int:
    """Disturb a model inside of `undisturbed`, interrupted at the n-th lines of its code; the number of lines."""
    count = 0

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(PUTTING_BACK):
            return None
        if event == "line":
            count += 1
            if count in strikes:
                raise KeyboardInterrupt
        return tracer

    own, outer = sys.gettrace(), sys.settrace
    outer(tracer)
    try:
        with undisturbed(model):
            torch.set_grad_enabled(False)
            torch.rand(1)
            layer = model.get_submodule("model.layers.0.self_attn.q_proj")
            layer._parameters["weight"] = torch.zeros(1)  # as an interrupted pass at other values leaves it
            model.register_buffer("odd", torch.ones(2))
            model.model.embed_tokens.weight.requires_grad_(False)
            model.model.embed_tokens.weight.grad = None
    except KeyboardInterrupt:
        pass
    finally:
        outer(own)
    return count


def test_whatever_line_an_interrupt_strikes_the_model_is_as_before():
    model = tiny_model(**SMALL)
    model.register_buffer("odd", torch.tensor([1.0, 2.0]))
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    before, state = objects(model), process_state()
    total = interrupted(model, ())
    assert objects(model) == before
    assert total > 100
    for n in range(1, total + 1, 7):
        interrupted(model, (n,))
        assert objects(model) == before, n
        assert differences(process_state(), state) == [], n


def test_a_second_interrupt_while_the_first_is_being_dealt_with():
    model = tiny_model(**SMALL)
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    before = objects(model)
    total = interrupted(model, ())
    for n in range(total // 2, total, 97):
        interrupted(model, (n, n + 3))
        assert objects(model) == before, n


def test_a_signal_while_things_are_put_back_waits_and_reaches_the_hosts_handler(monkeypatch):
    model, got = tiny_model(**SMALL), []
    own = signal.signal(signal.SIGINT, lambda *_: got.append(torch.is_grad_enabled()))
    handler = signal.getsignal(signal.SIGINT)
    try:
        put_back = torch.set_rng_state

        def struck(state: torch.Tensor) -> None:
            signal.raise_signal(signal.SIGINT)
            assert got == []
            put_back(state)

        with undisturbed(model):
            monkeypatch.setattr(torch, "set_rng_state", struck)
        assert got == [True]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, own)


def test_what_the_hosts_handler_of_a_signal_does_stays(monkeypatch):
    def handler(*_: Any) -> None:
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    model, own, put_back = tiny_model(**SMALL), signal.signal(signal.SIGINT, handler), torch.set_rng_state

    def struck(state: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        put_back(state)

    try:
        with pytest.raises(KeyboardInterrupt), undisturbed(model):
            monkeypatch.setattr(torch, "set_rng_state", struck)
        assert not torch.is_grad_enabled()
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        torch.set_grad_enabled(True)
        signal.signal(signal.SIGINT, own)


def test_a_gradient_that_was_written_to_is_an_error():
    model = tiny_model(**SMALL)
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    with pytest.raises(NumericalError, match=r"the gradient of .* written to"), undisturbed(model):
        next(model.parameters()).grad.zero_()


# ---------------------------------------------------------------- what fails around the probe


class FullDisk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


def test_a_logging_handler_that_raises_does_not_end_the_training(capsys, caplog):
    caplog.set_level(logging.INFO, "probe.live")
    model = lora_model()
    loop = Loop(model, [adamw(model)])
    handler, logger = FullDisk(), logging.getLogger("probe")
    watch = attach(model, loop.optimizers[0])
    logger.addHandler(handler)
    try:
        loop.run(3)
    finally:
        logger.removeHandler(handler)
    assert len(watch.history) == 3
    assert "logging failed: OSError" in capsys.readouterr().err


class WordlessError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_error_without_a_text_switches_the_probe_off(monkeypatch, caplog):
    model = lora_model()
    loop = Loop(model, [adamw(model)])
    watch = attach(model, loop.optimizers[0], strict=False)

    def fails(*_: Any) -> Any:
        raise WordlessError

    monkeypatch.setattr(watch._probe, "before", fails)
    loop.run(2)
    assert isinstance(watch.error, WordlessError)
    assert len(loop.losses) == 2
    assert "WordlessError: (without a text" in said(caplog)


def test_a_log_whose_error_has_no_text(caplog):
    def log(*_: Any) -> None:
        raise WordlessError

    model = lora_model()
    loop = Loop(model, [adamw(model)])
    watch = attach(model, loop.optimizers[0], strict=False, log=log)
    loop.run(2)
    assert len(watch.history) == 2
    assert "the log failed at step 1" in said(caplog)


# ---------------------------------------------------------------- what cannot work is refused when attaching


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshot_device": "nowhere"}, "snapshot_device: expected a device"),
        ({"snapshot_device": "meta"}, "snapshot_device: expected a device"),
        ({"first_step": "3"}, "first_step: expected an integer of at least 0, found '3'"),
        ({"first_step": -1}, "first_step: expected an integer of at least 0"),
        ({"first_step": True}, "first_step: expected an integer of at least 0"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    model = lora_model()
    with pytest.raises(ConfigError, match=message):
        attach(model, adamw(model), **settings)


def test_tokens_that_the_model_has_no_row_for_are_refused():
    model = lora_model()
    tokenizer = char_tokenizer()
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<extra {k}>" for k in range(rows)])
    with pytest.raises(DataError, match=r"vocabulary of \d+, found the id \d+ in prompts\[1\]"):
        attach(model, adamw(model), ["ab", f"<extra {rows - 1}>"], tokenizer)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: 5,
        lambda state: {"format": state["format"]},
        lambda state: {**state, "run": {**state["run"], "step": "x"}},
        lambda state: {**state, "run": {**state["run"], "history": [{"step": 1}]}},
        lambda state: {**state, "run": {**state["run"], "readings": [{"step": 1}]}},
        lambda state: {**state, "run": {**state["run"], "threshold": "low"}},
        lambda state: {**state, "alarm": None},
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(spoil):
    model = lora_model()
    loop = Loop(model, [adamw(model)])
    watch = attach(model, loop.optimizers[0])
    loop.run(1)
    state = watch.state_dict()
    with pytest.raises(ConfigError, match="state: expected"):
        watch.load_state_dict(spoil(state))
    assert watch.state_dict() == state


def test_a_state_does_not_grow_with_the_history():
    model = lora_model()
    watch = attach(model, adamw(model))
    watch.history.extend([{"step": k, "H_orig": 1.0, "H_orig_tok": 0.5} for k in range(1, 500)])
    kept = watch.state_dict()["run"]["history"]
    assert [entry["step"] for entry in kept] == [1, *range(480, 500)]
    assert len(watch.history) == 499


def test_advice_names_what_is_there():
    """`probe.watch` has no configuration file, whose keys have sections."""
    model = lora_model()
    with pytest.raises(DataError) as caught:
        attach(model, adamw(model), [[{"role": "user", "content": "ab"}]], char_tokenizer())
    assert "give the prompts as texts" in str(caught.value)
    assert "checkpoint." not in str(caught.value)
    assert "prompt_template" not in str(caught.value)


# ---------------------------------------------------------------- the step


def test_an_optimizer_that_took_the_watched_ones_place_is_noticed(caplog):
    model = lora_model()
    watch = attach(model, adamw(model))
    Loop(model, [adamw(model)]).run(2)
    assert watch.history == []
    assert said(caplog).count("an optimizer that is not watched (AdamW) has moved watched parameters") == 1
    watch.detach()


def test_an_unrelated_optimizer_is_no_news(caplog):
    model, other = lora_model(), nn.Linear(2, 2)
    watch = attach(model, adamw(model))
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert "not watched" not in said(caplog)
    watch.detach()


def test_emptied_groups_are_no_step_of_zero():
    model = lora_model()
    loop = Loop(model, [adamw(model)])
    watch = attach(model, loop.optimizers[0], strict=False)
    loop.optimizers[0].param_groups[0]["params"].clear()
    plain_step(loop, 0)
    assert watch.history == []
    assert isinstance(watch.error, ConfigError)


class InBackward(torch.optim.Optimizer):
    """Moves each parameter as soon as its gradient is there; `step` has nothing to do."""

    def __init__(self, parameters: list[nn.Parameter], how: str) -> None:
        super().__init__(parameters, {"lr": 0.05})
        for p in parameters:
            if how == "accumulated":
                p.register_post_accumulate_grad_hook(self._move)
            else:
                p.register_hook(lambda grad, p=p: self._move_by(p, grad))

    def _move(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        self._move_by(p, p.grad)
        p.grad = None

    @torch.no_grad()
    def _move_by(self, p: nn.Parameter, grad: torch.Tensor) -> None:
        p.add_(grad, alpha=-0.05)

    def step(self, closure: Any = None) -> None:
        return None


@pytest.mark.parametrize(("how", "probed"), [("accumulated", 3), ("gradient", 2)])
def test_updates_during_the_backward_pass_are_measured_whole(how, probed, caplog):
    """Hooks that are seen when attaching cost no probe; others are noticed at the first step, which is left out."""
    model = full_model(tied=False)
    watch = attach(model, InBackward(trainable(model), how), shares=False)
    loop = Loop(model, watch.optimizers)
    sizes = []
    for k in range(3):
        start = [p.detach().clone() for p in trainable(model)]
        plain_step(loop, k)
        sizes.append(
            float(
                torch.stack(
                    [(p.detach() - q).norm() for p, q in zip(trainable(model), start, strict=True)]
                ).norm()
            )
        )
    assert [entry["step"] for entry in watch.history] == [1, 2, 3][-probed:]
    assert [entry["step_norm"] for entry in watch.history] == pytest.approx(sizes[-probed:], rel=1e-4)
    assert "parameters may move outside of optimizer.step" in said(caplog)


def test_a_compiled_step_is_probed_as_it_is():
    model = full_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=torch.tensor(1e-2))
    watch = attach(model, optimizer)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for k in range(2):
        ids = torch.randint(4, 100, (2, 8), generator=torch.Generator().manual_seed(k))
        model(input_ids=ids, labels=ids).loss.backward()
        step()
        optimizer.zero_grad()
    torch._dynamo.reset()
    assert [entry["step"] for entry in watch.history] == [1, 2]
    assert all(entry["step_norm"] > 0 and entry["deltaH1"] != 0 for entry in watch.history)


@pytest.mark.parametrize("rate", [None, torch.tensor(1e-2)])
def test_rates_that_are_no_plain_numbers(rate):
    model = full_model()
    if rate is None:
        from transformers.optimization import Adafactor

        optimizer: Any = Adafactor(trainable(model), relative_step=True, warmup_init=True, lr=None)
    else:
        optimizer = adamw(model, lr=rate)
    watch = attach(model, optimizer)
    Loop(model, [optimizer]).run(1)
    assert watch.history[0]["learning_rate"] == (None if rate is None else pytest.approx(1e-2))
    assert watch.history[0]["step_norm"] > 0


# ---------------------------------------------------------------- the policy


def test_the_policy_is_the_adapter_that_was_active_when_attaching(caplog):
    from peft import LoraConfig

    with quiet_libraries():
        model = lora_model()
        model.add_adapter("critic", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    entries = []
    for at_step in ("default", "critic"):
        torch.manual_seed(0)
        model.set_adapter("default")
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        watch = attach(model, optimizer, B_E=8)
        model.set_adapter(at_step)
        flags = [p.requires_grad for p in parameters]
        optimizer.step()
        assert model.active_adapter == at_step
        assert [p.requires_grad for p in parameters] == flags
        entries.append(watch.history[0])
        watch.detach()
    assert entries[0]["H_orig"] == entries[1]["H_orig"]
    assert said(caplog).count("another adapter is active at this step") == 1


def test_a_deleted_adapter_switches_the_probe_off():
    from peft import LoraConfig

    with quiet_libraries():
        model = lora_model()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1)
    watch = attach(model, optimizer, strict=False)
    model.set_adapter("second")
    model.delete_adapter("default")
    optimizer.step()
    assert isinstance(watch.error, ConfigError)
    assert "'default'" in str(watch.error)


def test_steps_that_16_bits_round_away_are_said(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    model = full_model().to(torch.bfloat16)
    watch = attach(model, adamw(model))
    watch.detach()
    assert "are in 16 bits: steps below their resolution are rounded away" in said(caplog)


def test_an_adapter_that_is_merged_after_the_step_is_no_change_of_zero():
    """Its weights are in the base then: the parameters have no influence of their own."""
    model = lora_model()
    optimizer = adamw(model)
    watched = attach(model, optimizer)
    ids = torch.randint(4, 100, (4, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    model.merge_adapter()
    with pytest.raises(NumericalError, match=r"found it merged into .* unmerge it"):
        optimizer.step()
    model.unmerge_adapter()
    watched.detach()
