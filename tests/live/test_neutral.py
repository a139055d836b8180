"""The host's training is bitwise what it would be without the probe."""

from __future__ import annotations

import logging
import random
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import probe.live.source
import probe.live.step
from probe.errors.exceptions import NumericalError
from probe.live.neutral import undisturbed
from probe.live.step import UpdateProbe
from probe.loading import quiet_libraries
from tests.support.live_loops import (
    SMALL,
    Loop,
    accumulating_step,
    adamw,
    attach,
    autocast_step,
    closure_step,
    differences,
    fp32_precisions,
    full_model,
    host_after,
    lora_model,
    plain_step,
    process_state,
    seeded,
    sgd,
    trainable,
)
from tests.support.tiny_models import (
    LINEAR_LAYERS,
    add_lora,
    quantize_linear_layers,
    tiny_experts,
    tiny_model,
)


def lora_adamw(**options: Any) -> Loop:
    model = lora_model()
    return Loop(model, [adamw(model)], **options)


def dora() -> Loop:
    model = add_lora(tiny_model(**SMALL), use_dora=True).train()
    return Loop(model, [adamw(model)])


def lora_sgd() -> Loop:
    model = lora_model(tied=False)
    return Loop(model, [sgd(model, momentum=0.9, dampening=0.1, weight_decay=0.01)])


def full_untied() -> Loop:
    model = full_model(tied=False)
    return Loop(model, [adamw(model, amsgrad=True)])


def full_tied() -> Loop:
    model = full_model(tied=True)
    return Loop(model, [adamw(model, foreach=True)])


def checkpointed() -> Loop:
    model = lora_model()
    model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return Loop(model, [adamw(model)])


def muon_and_adamw() -> Loop:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = full_model(tied=False)
    matrices = [p for p in trainable(model) if p.ndim == 2]
    rest = [p for p in trainable(model) if p.ndim != 2]
    return Loop(model, [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)])


def bitsandbytes_loop(kind: str) -> Loop:
    with quiet_libraries():
        bnb = pytest.importorskip("bitsandbytes")
    model = lora_model()
    options = {"min_8bit_size": 1} if "8bit" in kind else {}
    return Loop(model, [getattr(bnb.optim, kind)(trainable(model), lr=1e-3, weight_decay=0.1, **options)])


def four_bit() -> Loop:
    """QLoRA: the frozen linear layers are in 4 bits."""
    model = tiny_model(hidden=64, layers=1, tied=False)
    for layer in quantize_linear_layers(model):
        # as on CPUs with AVX512-bf16, where bitsandbytes repacks the weight in evaluation mode
        layer.support_avx512bf16_for_cpu = True
    model = add_lora(model.to("cpu"), target_modules=LINEAR_LAYERS).train()
    return Loop(model, [adamw(model)])


def dynamic_rope() -> Loop:
    """Rotary embeddings that remember the longest input: training sees longer ones than the probe."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = lora_model(max_position_embeddings=16, rope_parameters=rope)

    def step(loop: Loop, k: int) -> float:
        loop.length = (20, 18, 24, 19)[k % 4]
        return plain_step(loop, k)

    return Loop(model, [adamw(model)], step=step, fixed=False)


def experts() -> Any:
    """A mixture of experts whose kernel has no forward mode."""
    model = tiny_experts(moe=8, head_dim=4, **SMALL)
    model.set_experts_implementation("grouped_mm")
    return model


def full_experts() -> Loop:
    model = experts().train()
    return Loop(model, [adamw(model, lr=1e-3)])


def adapted_experts() -> Loop:
    """LoRA on the stacked weights of the experts, which are no modules of their own."""
    model = add_lora(
        experts(),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        lora_dropout=0.0,
    ).train()
    return Loop(model, [adamw(model, lr=1e-3)])


def padded_by_eos() -> Loop:
    model = full_model(pad_token_id=1)
    return Loop(model, [adamw(model)])


COMPILED: list[Any] = []


def counting(graph: Any, inputs: Any) -> Any:
    """A backend that compiles nothing, and counts."""
    COMPILED.append(graph)
    return graph.forward


def compiled(where: str) -> Loop:
    torch.compiler.reset()
    COMPILED.clear()
    model = lora_model()
    optimizer = adamw(model)
    if where == "in place":
        model.compile(backend=counting)
    elif where == "part":
        layers = model.base_model.model.model.layers
        layers[0] = torch.compile(layers[0], backend=counting)
    return Loop(model, [optimizer], steps=6)


def scaled() -> Loop:
    return lora_adamw(step=autocast_step, scaler=torch.amp.GradScaler("cpu", init_scale=128.0))


LOOPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora, AdamW": (lambda: lora_adamw(steps=10), {}),
    "lora, AdamW, differences": (lora_adamw, {"derivative": "finite_difference"}),
    "lora, AdamW, noise floor": (
        lora_adamw,
        {"noise_floor": "on", "snapshot_device": "cpu", "temperature": 0.7},
    ),
    "lora, SGD": (lora_sgd, {}),
    "full, untied": (full_untied, {}),
    "full, tied": (full_tied, {}),
    "gradient checkpointing": (checkpointed, {}),
    "Muon and AdamW": (muon_and_adamw, {}),
    "bitsandbytes Lion": (lambda: bitsandbytes_loop("Lion"), {}),
    "bitsandbytes AdamW8bit": (lambda: bitsandbytes_loop("AdamW8bit"), {}),
    "autocast": (lambda: lora_adamw(step=autocast_step), {}),
    "autocast, scaler": (scaled, {}),
    "closure": (lambda: lora_adamw(step=closure_step), {}),
    "accumulation": (lambda: lora_adamw(step=accumulating_step), {}),
    "4 bits": (four_bit, {}),
    "dynamic rope": (dynamic_rope, {}),
    "experts": (full_experts, {}),
    "adapted experts": (adapted_experts, {}),
    "DoRA": (dora, {}),
    "padded by EOS": (padded_by_eos, {}),
    "compiled in place": (lambda: compiled("in place"), {}),
    "compiled in part": (lambda: compiled("part"), {}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_training_is_bitwise_the_same(name):
    build, settings = LOOPS[name]
    without, _ = host_after(build, probed=False)
    graphs = len(COMPILED)
    found, watch = host_after(build, probed=True, **settings)
    assert differences(without, found) == []
    assert len(COMPILED) == graphs
    assert len(watch.history) == (10 if name == "lora, AdamW" else 6)
    assert watch.error is None
    assert all(np.isfinite(entry["deltaH_true_tok"]) for entry in watch.history)
    assert any(entry["deltaH_true_tok"] != 0 for entry in watch.history)


def test_the_comparison_can_fail(monkeypatch):
    """One random number drawn from the global stream is enough to be seen."""
    without, _ = host_after(lora_adamw, probed=False)
    own = probe.live.source.sample_rollouts
    monkeypatch.setattr("probe.live.updates.undisturbed", lambda model: nullcontext(model.eval()))
    monkeypatch.setattr(
        probe.live.source, "sample_rollouts", lambda *args, **kw: (torch.rand(1), own(*args, **kw))[1]
    )
    found, _ = host_after(lambda: lora_adamw(fixed=False), probed=True)
    where = differences(without, found)
    assert ".process.torch" in where
    assert any(w.startswith(".modules") for w in where)  # evaluation mode stayed on
    assert any(w.startswith(".parameters") for w in where)


# ---------------------------------------------------------------- errors inside of the probe


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("a bug in the probe")


PLACES = ["probe.live.step.measured_change", "probe.live.source.sample_rollouts", "probe.live.step.copied"]


@pytest.mark.parametrize("other_hook", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_the_probe_ends_the_probe_and_not_the_training(monkeypatch, caplog, place, other_hook):
    """With a hook of somebody else's after ours, which torch still has to call."""
    without, _ = host_after(lora_adamw, probed=False)
    caplog.set_level(logging.INFO, "probe.live")
    calls = []
    with seeded():
        loop = lora_adamw()
        watch = attach(loop.model, loop.optimizers[0], tokenizer=loop.tokenizer, strict=False)
        if other_hook:
            loop.optimizers[0].register_step_pre_hook(lambda *_: calls.append("pre"))
            loop.optimizers[0].register_step_post_hook(lambda *_: calls.append("post"))
        loop.run(3)
        monkeypatch.setattr(place, fail)
        loop.run()
        found = loop.everything()
    assert differences(without, found) == []
    assert calls == (["pre", "post"] * 6 if other_hook else [])
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    text = warnings[0].getMessage()
    assert "switched off at step 4, training goes on: ZeroDivisionError: a bug in the probe" in text
    assert "Traceback (most recent call last)" in text
    assert text.count("in fail") == 1
    assert isinstance(watch.error, ZeroDivisionError)
    assert not watch.active
    assert [entry["step"] for entry in watch.history] == [1, 2, 3]
    hooks = loop.optimizers[0]._optimizer_step_pre_hooks, loop.optimizers[0]._optimizer_step_post_hooks
    if not other_hook:
        assert [len(h) for h in hooks] == [0, 0]


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize(("error", "strict"), [(ZeroDivisionError, True), (KeyboardInterrupt, False)])
def test_what_is_raised_leaves_everything_as_it_was(monkeypatch, place, error, strict):
    def interrupt(*_: Any, **__: Any) -> Any:
        assert not any(m.training for m in loop.model.modules())
        torch.rand(3)
        torch.set_float32_matmul_precision("high")
        raise error("stop")

    without, _ = host_after(lora_adamw, probed=False)
    with seeded():
        loop = lora_adamw()
        watch = attach(loop.model, loop.optimizers[0], tokenizer=loop.tokenizer, strict=strict)
        loop.run(3)
        monkeypatch.setattr(place, interrupt)
        loss = float(loop_loss_and_grad(loop, 3).detach())
        process = process_state()
        with pytest.raises(error, match="stop"):
            loop.optimizers[0].step()
        assert differences(process, process_state()) == []
        assert all(m.training for m in loop.model.modules())
        # the step itself: not taken where sampling failed, taken where its effect was to be measured
        monkeypatch.undo()
        watch.detach()
        if place.endswith("sample_rollouts"):
            loop.optimizers[0].step()
        loop.zero_grad(3)
        loop.losses.append(loss)
        loop.run()
        assert differences(without, loop.everything()) == []
    assert len(watch.history) == 3
    assert (watch.error is None) == (error is KeyboardInterrupt)


def loop_loss_and_grad(loop: Loop, k: int) -> torch.Tensor:
    """A plain step up to the optimizer's."""
    from tests.support.live_loops import loss_of

    loss = loss_of(loop, k)
    loss.backward()
    nn.utils.clip_grad_norm_(trainable(loop.model), 1.0)
    return loss


def test_training_can_go_on_with_the_probe_after_an_interrupt(monkeypatch):
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with seeded():
        loop = lora_adamw()
        watch = attach(loop.model, loop.optimizers[0])
        with monkeypatch.context() as patch:
            patch.setattr("probe.live.source.sample_rollouts", interrupt)
            with pytest.raises(KeyboardInterrupt):
                loop.run(1)
        loop.run(3)
    assert watch.step == 3
    assert [entry["step"] for entry in watch.history] == [2, 3]
    assert watch.error is None


@pytest.mark.parametrize("other_hook", [False, True])
def test_errors_of_the_alarms_callback_are_raised(other_hook):
    """Also after it has detached the watch from inside of the optimizer's hook."""

    def react(alarm):
        watch.detach()
        raise LookupError(alarm.message)

    with seeded():
        loop = lora_adamw()
        settings = {"collapse_entropy": 100.0, "on_alarm": react, "strict": False}
        watch = attach(loop.model, loop.optimizers[0], **settings)
        if other_hook:
            loop.optimizers[0].register_step_post_hook(lambda *_: None)
        with pytest.raises(
            LookupError, match=r"the policy's entropy has collapsed after step 3: .* at or below 100;"
        ):
            loop.run()
        assert len(loop.losses) == 2  # a forecast needs three probes
        assert not watch.active
        loop.run(2)
    assert len(watch.history) == 3
    assert watch.history[-1]["alarms"] == [3]


# ---------------------------------------------------------------- the context manager itself


def test_buffers_are_put_back_and_large_ones_are_watched(monkeypatch):
    model = tiny_model(**SMALL)
    model.register_buffer("odd", torch.tensor([1.0, float("nan"), -0.0]))
    saved = model.odd.clone()
    own = model.odd
    with undisturbed(model):
        model.odd.add_(1.0)
        model.odd = torch.zeros(2)
    assert model.odd is own
    assert differences(saved, own) == []

    monkeypatch.setattr("probe.live.held_model.SMALL_BUFFER", 4)
    with undisturbed(model):
        pass
    with (
        pytest.raises(NumericalError, match=r"leave the model alone, found buffer odd changed"),
        undisturbed(model),
    ):
        model.odd.add_(1.0)


def test_attributes_of_modules_are_put_back():
    model = tiny_model(**SMALL)
    model.seen = 3
    with undisturbed(model):
        model.seen = 9
        model.model.cache = [1]
        del model.name_or_path
    assert model.seen == 3
    assert not hasattr(model.model, "cache")
    assert "name_or_path" in vars(model)


def test_accelerates_wrapper_of_the_forward_is_taken_off_and_put_back():
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model(**SMALL)
    model._original_forward = model.forward
    seen = []

    def forward(*args: Any, **kw: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return convert_outputs_to_fp32(model._original_forward)(*args, **kw)

    model.forward = forward
    with undisturbed(model):
        model(input_ids=torch.tensor([[5, 6]]))
    assert seen == []
    assert model.forward is forward
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(seen) == 1


def test_no_autocast_inside():
    model = tiny_model(**SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(model):
            assert not torch.is_autocast_enabled("cpu")
            assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode(), undisturbed(model):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("how", ["old", "allow_tf32", "new", "all"])
def test_products_are_exact_inside_and_the_switches_are_put_back(how):
    """Both ways of torch to set them; it refuses to read the old one where the new one was used."""
    cuda, own = torch.backends.cuda.matmul, fp32_precisions()
    if how in ("new", "all") and not hasattr(cuda, "fp32_precision"):
        pytest.skip("this torch has only the old switch")
    backends = [torch.backends, cuda, torch.backends.mkldnn.matmul] if own else []
    saved = [b.fp32_precision for b in backends]
    precision = torch.get_float32_matmul_precision()
    try:
        if how == "old":
            torch.set_float32_matmul_precision("medium")
        elif how == "allow_tf32":
            cuda.allow_tf32 = True
        elif how == "new":
            cuda.fp32_precision = "tf32"
        else:
            torch.backends.fp32_precision = "tf32"
        before = fp32_precisions()
        with undisturbed(tiny_model(**SMALL)):
            assert not cuda.allow_tf32 if how in ("old", "allow_tf32") else cuda.fp32_precision == "ieee"
        assert fp32_precisions() == before
    finally:
        for backend, value in zip(backends, saved, strict=True):
            backend.fp32_precision = value
        torch.set_float32_matmul_precision(precision)
        for backend, value in zip(backends, saved, strict=True):
            backend.fp32_precision = value
    assert fp32_precisions() == own


# ---------------------------------------------------------------- what hosts do that is unusual


class Merging(nn.Module):
    """A layer that merges a delta into its weight in evaluation mode, and takes it out again in training mode."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.merged = inside, False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            with torch.no_grad():
                self.inside.weight.add_(-0.01 if mode else 0.01)
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


def test_modules_that_work_in_train_are_not_called():
    def merging() -> Loop:
        loop = lora_adamw()
        mlp = loop.model.get_base_model().model.layers[0].mlp
        mlp.act_fn = nn.Sequential(Merging(nn.LayerNorm(2 * SMALL["hidden"])), nn.SiLU())
        return loop

    (plain, _), (probed, _) = host_after(merging, False), host_after(merging, True)
    assert differences(plain, probed) == []


def test_a_module_that_writes_to_its_weights_is_refused():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.add_(1.0)
            return torch.nn.functional.silu(x)

    loop = lora_adamw()
    loop.model.get_base_model().model.layers[0].mlp.act_fn = Writing()
    with pytest.raises(NumericalError, match=r"model alone, found .*act_fn\.weight written to"):
        attach(loop.model, loop.optimizers[0])


def test_operators_without_a_deterministic_kernel_are_allowed_inside():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with undisturbed(lora_model()):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_error_keeps_nothing_alive(monkeypatch):
    """After running out of memory, training needs what the probe had."""
    loop = lora_adamw()
    watch = attach(loop.model, loop.optimizers[0], strict=False)
    alive: list[weakref.ref[torch.Tensor]] = []
    original = UpdateProbe.before

    def before(self: UpdateProbe, number: int) -> Any:
        found = original(self, number)
        alive.extend(weakref.ref(x) for x in found.old.values())
        return found

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(UpdateProbe, "before", before)
    monkeypatch.setattr("probe.live.step.measured_change", out_of_memory)
    loop.run(2)
    assert isinstance(watch.error, torch.OutOfMemoryError)
    assert alive
    assert [x() for x in alive if x() is not None] == []


def test_a_log_that_fails_is_dropped_and_the_probe_goes_on(caplog):
    def full_disk(metrics: Any, step: int) -> None:
        random.random()
        raise OSError("no space left")

    states = []
    for log in (None, full_disk):
        loop = lora_adamw()
        with seeded():
            watch = attach(loop.model, loop.optimizers[0], strict=False, log=log)
            loop.run(3)
            states.append(loop.everything())
        assert len(watch.history) == 3
    assert differences(*states) == []
    assert watch.active
    assert watch.error is None
    assert sum("the log failed at step 1" in record.message for record in caplog.records) == 1
