"""What is checked when the probe is attached: one clear line for everything that would fail later."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import pytest
import torch
from torch import nn

import probe
from probe.errors.exceptions import ConfigError, ProbeError, RolloutError
from probe.live.attach import unwrapped_model, watched_parameters
from probe.live.optimizers import unwrapped_optimizers
from probe.loading import quiet_libraries
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import PROMPTS, SMALL, adamw, attach, full_model, lora_model
from tests.support.tiny_models import LINEAR_LAYERS, VOCABULARY, tiny_model


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- models


def bert(masked: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with quiet_libraries():
        return (BertForMaskedLM if masked else BertModel)(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with quiet_libraries():
        return T5ForConditionalGeneration(config)


def headless() -> nn.Module:
    from transformers import Qwen2Model

    with quiet_libraries():
        return Qwen2Model(tiny_model(**SMALL).config)


def classifier() -> nn.Module:
    from transformers import Qwen2ForSequenceClassification

    with quiet_libraries():
        return Qwen2ForSequenceClassification(tiny_model(**SMALL).config)


POLICY = "give the policy itself, loaded with AutoModelForCausalLM"
WHOLE = ""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: "Qwen/Qwen2-0.5B", "model: expected a torch module, found str"),
        (lambda: None, "model: expected a torch module, found NoneType"),
        (
            lambda: nn.Linear(2, 2),
            "expected a transformers causal language model, found Linear without config",
        ),
        (
            lambda: bert(False),
            "expected a transformers causal language model, found BertModel without generate",
        ),
        (
            lambda: bert(True),
            "expected a transformers causal language model, found BertForMaskedLM without generate",
        ),
        (lambda: t5(), "found the encoder-decoder T5ForConditionalGeneration"),
        (headless, "expected a transformers causal language model, found Qwen2Model without generate"),
        (classifier, "found Qwen2ForSequenceClassification without generate"),
    ],
)
def test_models_without_responses(build, message):
    model = build()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else [nn.Parameter(torch.ones(1))]
    with pytest.raises(ConfigError) as error:
        attach(model, torch.optim.SGD(parameters, lr=0.1))
    assert message in one_line(error)
    assert not isinstance(model, nn.Module) or POLICY in str(error.value)


class FullyShardedDataParallel(nn.Module):
    """Only the name of torch's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Linear8bitLt(nn.Linear):
    """Only the name of bitsandbytes'."""


def with_deepspeed() -> nn.Module:
    model = full_model()
    model.model.norm.weight.ds_id = 3
    return model


def on_meta() -> nn.Module:
    model = full_model()
    model.model.norm.weight = nn.Parameter(torch.empty(SMALL["hidden"], device="meta"))
    return model


def in_8_bits() -> nn.Module:
    model = full_model(tied=False)
    model.lm_head = Linear8bitLt(16, VOCABULARY)
    return model


@pytest.fixture
def process_group():
    """One process that counts as distributed."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FullyShardedDataParallel(full_model()), f"found FullyShardedDataParallel; {WHOLE}"),
        (with_deepspeed, f"found DeepSpeed ZeRO-3's in model.norm.weight; {WHOLE}"),
        (on_meta, "expected parameters with values, found model.norm.weight on the meta device"),
        (in_8_bits, "expected weights in 4 bits or in floating point, found bitsandbytes' Linear8bitLt"),
    ],
)
def test_models_that_are_sharded_or_quantised(build, message):
    model = build()
    with pytest.raises(ConfigError) as error:
        attach(model, adamw(model))
    assert message in one_line(error)


@pytest.mark.filterwarnings("ignore")
def test_sharded_tensors(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = full_model()
    mesh = init_device_mesh("cpu", (1,))
    model.model.norm.weight = nn.Parameter(distribute_tensor(model.model.norm.weight.data, mesh, [Shard(0)]))
    with pytest.raises(ConfigError) as error:
        attach(model, adamw(model))
    assert (
        "parts that fully_shard makes, found a DTensor in model.norm.weight that fully_shard alone"
        in one_line(error)
    )


def test_a_repacked_4_bit_weight():
    with quiet_libraries():
        bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model(hidden=64, layers=1, tied=False)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    model.model.layers[0].self_attn.o_proj = layer
    with pytest.raises(ConfigError) as error:
        attach(model, adamw(model))
    assert "layers.0.self_attn.o_proj as it was quantised, found it repacked" in one_line(error)


@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
def test_distributed_data_parallel(process_group):
    model = lora_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert unwrapped_model(wrapped) is model
    optimizer = adamw(wrapped)
    with attach(wrapped, optimizer) as watch:
        ids = torch.tensor([[5, 6, 7, 8]])
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert watch.model is model
    assert watch.last["deltaH_true_tok"] != 0


def test_compiled_and_parallel_models_are_unwrapped():
    model = lora_model()
    compiled = torch.compile(model, backend="eager")
    assert unwrapped_model(compiled) is model
    assert unwrapped_model(nn.DataParallel(compiled)) is model
    assert unwrapped_model(model) is model
    optimizer = adamw(compiled)
    with attach(compiled, optimizer) as watch:
        ids = torch.tensor([[5, 6, 7, 8]])
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert watch.model is model
    assert watch.last["deltaH_true_tok"] != 0


# ---------------------------------------------------------------- optimizers


def test_an_optimizer_that_was_built_before_the_adapter(caplog):
    model = tiny_model(**SMALL)
    optimizer = adamw(model)
    from tests.support.tiny_models import add_lora

    policy = add_lora(model)
    with pytest.raises(ConfigError) as error:
        attach(policy, optimizer)
    text = one_line(error)
    assert (
        f"expected the model's {2 * len(LINEAR_LAYERS)} trainable parameters in it, found none of them"
        in text
    )
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in text
    assert "build the optimizer from this model's parameters, after peft has wrapped it" in text


def test_some_parameters_in_no_optimizer_are_a_warning(caplog):
    model = lora_model()
    found = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    with caplog.at_level(logging.INFO, "probe.live"):
        watch = attach(model, torch.optim.SGD(list(found.values()), lr=0.1))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "7 trainable tensors are in no watched optimizer and taken as constant (base_model." in warnings[0]
    assert warnings[0].count("lora_B") == 3
    assert warnings[0].endswith(", ...)")
    assert list(watch._probe.parameters) == list(found)
    ready = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    numbers = sum(p.numel() for p in found.values())
    assert (
        f"watching 7 trainable tensors ({numbers:,} numbers); deltaH1 by jvp: forward mode agrees" in ready[0]
    )
    assert watched_parameters(model, watch.optimizers)[1] == [
        n for n, _ in model.named_parameters() if "lora_B" in n
    ]


def test_a_model_without_trainable_parameters():
    model = full_model()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ConfigError) as error:
        attach(model, optimizer)
    assert "expected trainable parameters, found none with requires_grad=True" in one_line(error)


class NotAnOptimizer:
    def step(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("optimizer", "found"),
    [
        (
            NotAnOptimizer(),
            "expected a torch.optim.Optimizer, whose steps can be hooked, found NotAnOptimizer",
        ),
        (None, "found NoneType"),
        ("adamw", "found str"),
        ({"a": 1}, "found dict"),
        ([None], "found NoneType"),
        ([], "optimizer: expected at least one, found an empty list"),
        (torch.optim.AdamW, "found type"),
    ],
)
def test_what_is_no_optimizer(optimizer, found):
    with pytest.raises(ConfigError) as error:
        attach(full_model(), optimizer)
    assert one_line(error).startswith("optimizer: expected")
    assert found in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_optimizers_are_found_inside_of_wrappers():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState
    from lightning.fabric.wrappers import _FabricOptimizer
    from lightning.pytorch.core.optimizer import LightningOptimizer

    own = adamw(full_model())
    Accelerator(cpu=True)
    try:
        accelerated = AcceleratedOptimizer(own)
        fabric = _FabricOptimizer(own, strategy=None)
        lightning = LightningOptimizer(own)
        for wrapper in (own, accelerated, fabric, lightning, LightningOptimizer(accelerated)):
            assert unwrapped_optimizers(wrapper)[0] is own
        other = adamw(full_model())
        assert [id(o) for o in unwrapped_optimizers([lightning, other])] == [id(own), id(other)]
        assert unwrapped_optimizers((accelerated,))[0] is own
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.mark.filterwarnings("ignore:.*srun.*")
def test_steps_through_fabric_are_seen():
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = lora_model()
    wrapped, optimizer = fabric.setup(model, adamw(model))
    with attach(model, optimizer) as watch:
        ids = torch.tensor([[5, 6, 7, 8]])
        fabric.backward(wrapped(input_ids=ids, labels=ids).loss)
        optimizer.step()
    assert watch.last["step"] == 1
    assert watch.last["deltaH_true_tok"] != 0


# ---------------------------------------------------------------- prompts and tokenizer


def without_eos() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def foreign() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.add_tokens([f"<{k}>" for k in range(9)])
    tokenizer.eos_token = "<8>"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: "gpt2", "tokenizer: expected a transformers tokenizer, found str"),
        (lambda: print, "tokenizer: expected a transformers tokenizer, found builtin_function_or_method"),
        (without_eos, "expected an EOS token, found none: responses could not end; set tokenizer.eos_token"),
        (
            foreign,
            f"expected tokens of the model's vocabulary of {VOCABULARY}, found EOS with the id 108; give the",
        ),
    ],
)
def test_bad_tokenizers(tokenizer, message):
    model = full_model()
    with pytest.raises(ConfigError) as error:
        attach(model, adamw(model), tokenizer=tokenizer())
    assert message in one_line(error)


def test_no_tokenizer():
    model = full_model()
    with pytest.raises(
        ConfigError, match=r"^tokenizer: expected a transformers tokenizer, found NoneType; give the one that"
    ):
        probe.watch(model, adamw(model), PROMPTS, None)


def test_the_hosts_tokenizer_is_left_alone():
    tokenizer = char_tokenizer()
    tokenizer.padding_side, tokenizer.truncation_side = "left", "right"
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    before = copy.deepcopy(tokenizer.backend_tokenizer.to_str())
    assert "max_length" in before
    model = full_model()
    attach(model, adamw(model), ["a prompt of more than two tokens"], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_unknown_settings_alarms_and_logs():
    model = full_model()
    with pytest.raises(ConfigError, match=r"evry: .* did you mean every\?"):
        attach(model, adamw(model), evry=3)
    with pytest.raises(ConfigError, match="on_alarm: expected a function, 'stop' or None, found 'halt'"):
        attach(model, adamw(model), on_alarm="halt")
    message = r"log: expected a function of \(mapping, step\), a Lightning logger, .*, found int"
    with pytest.raises(ConfigError, match=message):
        attach(model, adamw(model), log=3)
    optimizer = adamw(model)
    with pytest.raises(ConfigError, match="B_E"):
        attach(model, optimizer, B_E=True)
    assert not optimizer._optimizer_step_pre_hooks


def test_errors_name_the_probes_own_settings(monkeypatch):
    """Not those of a configuration file, which there is none of."""
    import probe.rollouts.generation as sampling

    monkeypatch.setattr(sampling, "SAMPLING_GAP_LIMIT", {torch.float32: -1.0, torch.bfloat16: -1.0})
    model = full_model()
    with pytest.raises(RolloutError) as error:
        attach(model, adamw(model))
    assert "try attn_implementation: eager" in one_line(error)
    assert "checkpoint." not in str(error.value)


def test_forward_mode_that_is_asked_for_and_not_there(monkeypatch):
    from probe.estimators.forward_mode_check import ForwardModeCheck

    refusal = ForwardModeCheck(False, "the model has no forward-mode derivative: aten::foo")
    monkeypatch.setattr("probe.phases.passes.forward_mode_check", lambda *_: refusal)
    model = full_model()
    with pytest.raises(probe.errors.exceptions.NumericalError) as error:
        attach(model, adamw(model), derivative="jvp")
    assert "derivative: expected a model that allows jvp, found that the model has no" in one_line(error)
    watch = attach(model, adamw(model))
    assert watch._probe.way.mode == "finite_difference"


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(kind):
    import peft

    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(num_virtual_tokens=2, task_type="CAUSAL_LM", **options)
    with quiet_libraries():
        model = peft.get_peft_model(tiny_model(hidden=16, layers=1), config)
    with pytest.raises(
        ConfigError, match="which puts virtual tokens before every input; this is not supported"
    ):
        attach(model, adamw(model))


class Checkpointed(nn.Module):
    """A layer that keeps no activations, by torch's reentrant checkpointing: it has no gradient by `autograd.grad`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_without_a_gradient_of_its_own_is_probed_by_differences():
    model = tiny_model(**SMALL)
    for layer in model.model.layers:
        layer.mlp.up_proj = Checkpointed(layer.mlp.up_proj)
    optimizer = adamw(model)
    watch = attach(model, optimizer)
    assert watch._probe.way.mode == "finite_difference"
    assert "use_reentrant=True" in watch._probe.way.reason
    ids = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(ids)
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    optimizer.step()
    assert watch.last is not None
    assert watch.last["deltaH1"] != 0
    asked = {"derivative": "jvp"}
    with pytest.raises(
        ProbeError, match=r"derivative: expected a model that allows jvp, found .*use_reentrant"
    ):
        attach(model, optimizer, **asked)


@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel failed\nin two lines"), KeyError("x"), ValueError("?")]
)
def test_what_the_model_raises_when_attaching_is_one_line(error):
    model = full_model()

    def fail(*_: Any) -> None:
        raise error

    model.model.layers[0].register_forward_pre_hook(fail)
    optimizer = adamw(model)
    with pytest.raises(ProbeError, match=rf"^model: expected .* found {type(error).__name__}: ") as caught:
        attach(model, optimizer)
    assert "or train without the probe" in one_line(caught)
    assert not optimizer._optimizer_step_pre_hooks
