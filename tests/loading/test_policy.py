"""Loading policies: adapters, whole models, 4-bit bases, tokenizers, and everything that is refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading import (
    BACKBONES,
    load_policy_model,
    locate_checkpoint,
    quiet_libraries,
    trainable_parameters,
)
from probe.loading.base_model import _check_loading_report
from probe.loading.base_name import resolve_base
from probe.loading.checks import check_forward
from probe.loading.quantization import dequantized_weight, find_4bit_layers
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import (
    VOCABULARY,
    add_lora,
    load_base,
    lora_checkpoint,
    save_base,
    save_checkpoint,
    set_gradients,
    tiny_model,
)

IDS = torch.tensor([[5, 9, 77, 12, 40, 8], [30, 4, 4, 61, 99, 11]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    """A LoRA checkpoint with the live model that wrote it; tests that change files copy it first."""
    path, model, _ = lora_checkpoint(tmp_path_factory.mktemp("lora") / "step_60", base)
    return path, model


@pytest.fixture
def copied(tmp_path, checkpoint) -> Path:
    return Path(shutil.copytree(checkpoint[0], tmp_path / "step_60"))


def load(path: Path, **options):
    config = CheckpointConfig(checkpoint_path=str(path), **options)
    return load_policy_model(config, locate_checkpoint(config), "cpu")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


class TestAdapters:
    def test_it_is_the_policy_that_was_saved(self, checkpoint):
        path, live = checkpoint
        model, tokenizer = load(path)
        assert torch.equal(logits(model), logits(live.eval()))
        assert tokenizer.eos_token_id == 1
        assert not any(module.training for module in model.modules())

    def test_only_the_adapter_is_trainable_in_the_order_of_the_live_model(self, checkpoint):
        path, live = checkpoint
        model, _ = load(path)
        assert list(trainable_parameters(model)) == list(trainable_parameters(live))
        assert all("lora_" in name for name in trainable_parameters(model))

    def test_flat_layout(self, tmp_path, base, checkpoint):
        path, live, _ = lora_checkpoint(tmp_path / "checkpoint-3", base, layout="flat")
        model, _ = load(path)
        assert torch.equal(logits(model), logits(live.eval()))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_low_precision_base_keeps_float32_adapters(self, checkpoint, dtype):
        model, _ = load(checkpoint[0], dtype=dtype)
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
        torch.testing.assert_close(logits(model).float(), logits(checkpoint[1].eval()), rtol=0.1, atol=0.1)

    def test_adapters_saved_in_16_bits_become_float32(self, copied, caplog):
        file = copied / "model" / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
        model, _ = load(copied, dtype="bfloat16")
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}

    def test_float64_is_float64_throughout(self, checkpoint):
        model, _ = load(checkpoint[0], dtype="float64")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        found = logits(model)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), logits(checkpoint[1].eval()), rtol=1e-4, atol=1e-4)

    def test_device_map(self, checkpoint):
        model, _ = load(checkpoint[0], device_map="auto")
        assert torch.equal(logits(model), logits(checkpoint[1].eval()))
        assert len(trainable_parameters(model)) == 28

    def test_modules_to_save_need_a_float32_base(self, tmp_path, base):
        live = add_lora(load_base(base), target_modules=["q_proj"], modules_to_save=["lm_head"])
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(trainable_parameters(live).values()))
        model, _ = load(path)
        assert torch.equal(logits(model), logits(live.eval()))
        assert any("modules_to_save" in name for name in trainable_parameters(model))
        match = r"a forward pass of the policy: .*set checkpoint\.dtype: float32"
        with pytest.raises(CheckpointError, match=match):
            load(path, dtype="bfloat16")

    def test_rank_that_does_not_fit_the_weights(self, copied):
        edit_json(copied / "model" / "adapter_config.json", r=8)
        with pytest.raises(CheckpointError, match=r"adapter .*size mismatch .*checkpoint\.backbone"):
            load(copied)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"hidden": 64}, r"size mismatch .*checkpoint\.backbone"),
            ({"layers": 3}, r"missing adapter keys .*layers\.2.*checkpoint\.backbone"),
            (
                {"layers": 1},
                r"expected 14 LoRA weights as in the base model, found 28: .*layers\.1.* have no place",
            ),
        ],
    )
    def test_adapter_of_another_base(self, checkpoint, tmp_path, options, match):
        other = save_base(tmp_path / "other", **options)
        with pytest.raises(CheckpointError, match=match):
            load(checkpoint[0], backbone=str(other))

    def test_prompt_tuning_is_refused(self, copied):
        edit_json(copied / "model" / "adapter_config.json", peft_type="PROMPT_TUNING")
        match = r"expected an adapter of the model's weights .* found PROMPT_TUNING"
        with pytest.raises(CheckpointError, match=match):
            load(copied)

    def test_another_task_is_refused(self, copied):
        edit_json(copied / "model" / "adapter_config.json", task_type="SEQ_CLS")
        with pytest.raises(CheckpointError, match="expected task_type CAUSAL_LM, found SEQ_CLS"):
            load(copied)

    @pytest.mark.parametrize("text", ["{", "{}", "[]"])
    def test_broken_adapter_config(self, copied, text):
        (copied / "model" / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"expected PEFT's JSON with a peft_type"):
            load(copied)

    def test_truncated_weights(self, copied):
        file = copied / "model" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=r"adapter .*SafetensorError"):
            load(copied)

    def test_an_adapter_without_weights(self, copied, monkeypatch):
        monkeypatch.setattr("peft.PeftModel.parameters", lambda model: iter(()))
        with pytest.raises(CheckpointError, match="expected trainable weights, found none"):
            load(copied)


class TestBase:
    def test_backbone_goes_before_the_adapters_own(self, copied, base):
        edit_json(copied / "model" / "adapter_config.json", base_model_name_or_path="/nowhere/else")
        model, _ = load(copied, backbone=str(base))
        assert len(trainable_parameters(model)) == 28

    def test_short_names(self):
        assert BACKBONES["qwen2_5_15"] == "Qwen/Qwen2.5-1.5B"
        assert BACKBONES["qwen2_5_7_instruct"] == "Qwen/Qwen2.5-7B-Instruct"
        found = resolve_base(CheckpointConfig(backbone="qwen2_5_05", revision="abc"), Path("x"), {})
        assert found == ("Qwen/Qwen2.5-0.5B", "abc")

    def test_relative_to_the_adapter(self, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "run").mkdir()
        found = resolve_base(CheckpointConfig(), tmp_path / "run", {"base_model_name_or_path": "../base"})
        assert found == (str(tmp_path / "base"), None)

    def test_relative_to_the_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "base").mkdir()
        monkeypatch.chdir(tmp_path)
        found = resolve_base(CheckpointConfig(), tmp_path / "run", {"base_model_name_or_path": "base"})
        assert found == (str(tmp_path / "base"), None)

    def test_hub_id_with_the_adapters_revision(self):
        adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-1.5B", "revision": "v1"}
        assert resolve_base(CheckpointConfig(), Path("x"), adapter) == ("Qwen/Qwen2.5-1.5B", "v1")
        assert resolve_base(CheckpointConfig(revision="v2"), Path("x"), adapter)[1] == "v2"

    @pytest.mark.parametrize("name", [None, ""])
    def test_no_base_named(self, name):
        match = r"expected base_model_name_or_path, found none; .*checkpoint\.backbone"
        with pytest.raises(CheckpointError, match=match):
            resolve_base(CheckpointConfig(), Path("x"), {"base_model_name_or_path": name})

    def test_missing_folders(self):
        match = r"checkpoint\.backbone: expected an existing folder, found no /nowhere"
        with pytest.raises(CheckpointError, match=match):
            resolve_base(CheckpointConfig(backbone="/nowhere"), Path("x"), {})
        match = "expected the base model in /nowhere, found no such folder"
        with pytest.raises(CheckpointError, match=match):
            resolve_base(CheckpointConfig(), Path("x"), {"base_model_name_or_path": "/nowhere"})

    def test_hub_model_that_cannot_be_reached(self, checkpoint):
        match = r"model no_such_model: .*one of the short names qwen2_5_05"
        with pytest.raises(CheckpointError, match=match) as caught:
            load(checkpoint[0], backbone="no_such_model")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "options", "found"),
        [
            ("BertConfig", {}, r"an encoder-only model \(bert\)"),
            ("T5Config", {}, r"an encoder-decoder \(seq2seq\) model \(t5\)"),
            ("ViTConfig", {}, r"a model without a causal language-model head \(vit\)"),
        ],
    )
    def test_other_kinds_of_models(self, checkpoint, tmp_path, kind, options, found):
        import transformers

        getattr(transformers, kind)(**options).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"expected a causal language model, found {found}"):
            load(checkpoint[0], backbone=str(tmp_path), tokenizer_path=str(checkpoint[0] / "model"))

    @pytest.mark.parametrize(
        ("settings", "found"),
        [
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes"),
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ],
    )
    def test_quantisation_without_reliable_derivatives(self, checkpoint, tmp_path, base, settings, found):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        edit_json(other / "config.json", quantization_config=settings)
        with pytest.raises(CheckpointError, match=rf"found {found} quantisation, .*checkpoint\.backbone"):
            load(checkpoint[0], backbone=str(other))

    def test_a_weight_that_the_file_lacks_is_not_made_up(self, checkpoint, tmp_path, base):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        weights = load_file(other / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"missing are model\.layers\.1\.mlp\.up_proj\.weight"):
            load(checkpoint[0], backbone=str(other))

    def test_weights_that_do_not_fit_the_config(self, checkpoint, tmp_path, base):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        edit_json(other / "config.json", intermediate_size=128)
        match = r"weights do not fit its config\.json: .*\(64, 32\) instead of \(128, 32\)"
        with pytest.raises(CheckpointError, match=match):
            load(checkpoint[0], backbone=str(other))

    def test_unused_weights_are_said(self, caplog):
        report = {"mismatched_keys": set(), "missing_keys": set(), "unexpected_keys": {"v_head.weight"}}
        with caplog.at_level(logging.WARNING):
            _check_loading_report("some/model", report)
        assert "unused weights v_head.weight" in caplog.text

    def test_code_of_the_checkpoint_is_not_run_unasked(self, checkpoint, tmp_path, base):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        edit_json(other / "config.json", model_type="own", auto_map={"AutoConfig": "code.Config"})
        (other / "code.py").write_text("raise SystemExit('ran')", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"set checkpoint\.trust_remote_code: true"):
            load(checkpoint[0], backbone=str(other))


class TestWholeModels:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
    def test_all_parameters_are_trainable_in_float32(self, tmp_path, tied, saved):
        live = tiny_model(tied=tied).to(saved)
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(live.parameters()), layout="flat")
        model, _ = load(path, dtype="bfloat16")
        parameters = trainable_parameters(model)
        assert list(parameters) == [name for name, _ in live.named_parameters()]
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert ("lm_head.weight" in parameters) is not tied
        assert all(
            torch.equal(p, q.float()) for p, q in zip(parameters.values(), live.parameters(), strict=True)
        )

    def test_float64(self, tmp_path):
        live = tiny_model()
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(live.parameters()))
        model, _ = load(path, dtype="float64")
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float64}

    def test_4bit_is_for_adapters(self, tmp_path):
        live = tiny_model()
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(live.parameters()))
        match = r"checkpoint\.load_in_4bit: expected an adapter checkpoint"
        with pytest.raises(CheckpointError, match=match):
            load(path, load_in_4bit=True)


class Test4Bit:
    @pytest.mark.parametrize(
        "options", [{}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}]
    )
    def test_it_is_the_dense_policy_with_the_dequantised_weights(self, checkpoint, options):
        path, live = checkpoint
        model, _ = load(path, load_in_4bit=True, **options)
        layers = find_4bit_layers(model)
        assert len(layers) == 14
        kinds = {layer.weight.quant_state.quant_type for layer in layers.values()}
        assert kinds == {options.get("bnb_4bit_quant_type", "nf4")}
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
        dense, _ = load(path)
        with torch.no_grad():
            for name, layer in layers.items():
                dense.get_submodule(name).weight.copy_(dequantized_weight(layer, torch.float32))
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(model), logits(live.eval()), atol=1e-3)
        gradients = []
        for policy in (model, dense):
            policy(input_ids=IDS).logits.log_softmax(-1)[:, :, 7].sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(policy).values()]))
        assert gradients[0].norm() > 0
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    def test_base_that_was_saved_in_4_bits(self, checkpoint, tmp_path, base):
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        quantised = load_base(base, quantization_config=settings, device_map={"": "cpu"})
        with quiet_libraries():
            quantised.save_pretrained(tmp_path / "q")
        model, _ = load(checkpoint[0], backbone=str(tmp_path / "q"))
        layers = find_4bit_layers(model)
        assert len(layers) == 14
        assert {layer.compute_dtype for layer in layers.values()} == {torch.float32}

    def test_4bit_base_is_neither_float64_nor_trainable(self, checkpoint, tmp_path, base):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        edit_json(other / "config.json", quantization_config=settings)
        with pytest.raises(CheckpointError, match="expected plain weights for float64, found 4-bit ones"):
            load(checkpoint[0], backbone=str(other), dtype="float64")
        (other / "optimizer.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="expected plain weights for a trainable model"):
            load(other)

    def test_device_map(self, checkpoint):
        model, _ = load(checkpoint[0], device_map="auto", load_in_4bit=True)
        plain, _ = load(checkpoint[0], load_in_4bit=True)
        assert torch.equal(logits(model), logits(plain))

    def test_bitsandbytes_missing(self, checkpoint, monkeypatch):
        monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda *args: False)
        match = r"checkpoint\.load_in_4bit: expected the package bitsandbytes"
        with pytest.raises(CheckpointError, match=match):
            load(checkpoint[0], load_in_4bit=True)


class TestTokenizers:
    def test_the_checkpoints_own_goes_before_the_bases(self, tmp_path, base, copied):
        char_tokenizer(pad="eos").save_pretrained(copied / "model")
        assert load(copied)[1].pad_token == "<eos>"
        for file in (copied / "model").glob("token*"):
            file.unlink()
        assert load(copied)[1].pad_token == "<pad>"

    def test_tokenizer_path_goes_first(self, copied, tmp_path):
        char_tokenizer(pad="eos").save_pretrained(tmp_path / "t")
        assert load(copied, tokenizer_path=str(tmp_path / "t"))[1].pad_token == "<eos>"

    def test_whole_model_without_any(self, tmp_path):
        live = tiny_model()
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(live.parameters()), tokenizer=False)
        with pytest.raises(CheckpointError, match=r"no tokenizer in .*checkpoint\.tokenizer_path"):
            load(path)

    def test_unreadable(self, copied, tmp_path):
        with pytest.raises(CheckpointError, match=r"tokenizer .*/none: .*checkpoint\.tokenizer_path"):
            load(copied, tokenizer_path=str(tmp_path / "none"))

    def test_without_eos(self, copied):
        tokenizer = char_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(copied / "model")
        with pytest.raises(CheckpointError, match=r"expected an EOS token, .*found none"):
            load(copied)

    def test_more_tokens_than_embeddings(self, copied):
        tokenizer = char_tokenizer()
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(10)])
        tokenizer.save_pretrained(copied / "model")
        added = len(tokenizer) - VOCABULARY
        match = rf"embed_tokens of the {added} tokens that were added .* {VOCABULARY}, found none"
        with pytest.raises(CheckpointError, match=match):
            load(copied)

    def test_more_tokens_than_embeddings_of_a_whole_model(self, tmp_path):
        live = tiny_model()
        path = save_checkpoint(tmp_path / "c", live, torch.optim.AdamW(live.parameters()))
        tokenizer = char_tokenizer()
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(10)])
        tokenizer.save_pretrained(path / "model")
        match = rf"at most the {VOCABULARY} tokens .* found {len(tokenizer)}"
        with pytest.raises(CheckpointError, match=match):
            load(path)


class TestChecks:
    def test_non_finite_adapter_weights_are_named_and_counted(self, copied):
        file = copied / "model" / "adapter_model.safetensors"
        weights = load_file(file)
        keys = sorted(weights)[:2]
        weights[keys[0]][0, :3] = float("nan")
        weights[keys[1]][0, 0] = float("inf")
        save_file(weights, file)
        match = r"non-finite weights in 2 of \d+ parameters: .*lora_\w.* \(3 of \d+ values\)"
        with pytest.raises(CheckpointError, match=match):
            load(copied)

    @pytest.mark.parametrize("four_bit", [False, True])
    def test_non_finite_base_weights(self, checkpoint, tmp_path, base, four_bit):
        other = Path(shutil.copytree(base, tmp_path / "other"))
        weights = load_file(other / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        match = r"non-finite weights in 1 of \d+ parameters: .*layers\.0\.mlp\.up_proj"
        with pytest.raises(CheckpointError, match=match):
            load(checkpoint[0], backbone=str(other), load_in_4bit=four_bit)

    def test_logits_that_overflow(self, copied):
        file = copied / "model" / "adapter_model.safetensors"
        save_file({key: value * 1e30 for key, value in load_file(file).items()}, file)
        with pytest.raises(CheckpointError, match="expected finite logits"):
            load(copied)

    def test_bidirectional_model(self):
        class Bidirectional(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(8, 8)

            def get_input_embeddings(self):
                return self.embedding

            def forward(self, input_ids, **_):
                hidden = self.embedding(input_ids)
                return SimpleNamespace(logits=hidden + hidden.mean(1, keepdim=True))

        match = "expected a causal language model, found logits that change"
        with pytest.raises(CheckpointError, match=match):
            check_forward(Bidirectional())

    def test_the_random_state_and_the_libraries_settings_are_left_alone(self, checkpoint):
        from transformers.utils import logging as hf_logging

        def settings():
            return (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), list(warnings.filters))

        before = settings()
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        load(checkpoint[0])
        assert torch.equal(torch.rand(3), expected)
        assert settings() == before
        with pytest.raises(CheckpointError):
            load(checkpoint[0], backbone="no_such_model")
        assert settings() == before

    def test_running_out_of_memory_stays_what_it_is(self, checkpoint, monkeypatch):
        def run_out(*args, **options):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            load(checkpoint[0])

    def test_files_are_not_written(self, copied):
        before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
        model, _ = load(copied)
        set_gradients(trainable_parameters(model).items())
        assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before

    def test_library_warnings_are_logged(self, caplog):
        with caplog.at_level(logging.DEBUG), quiet_libraries():
            warnings.warn("something odd", UserWarning, stacklevel=1)
        assert "something odd" in caplog.text
