"""The base model: checked and loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading.base_name import is_folder, needs_no_hub, source_remedy
from probe.loading.foreign import rewritten, some
from probe.loading.model_folder import check_model_folder, check_promised_size
from probe.loading.quantization import find_4bit_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def load_base(
    config: CheckpointConfig, source: str, revision: str | None, device: torch.device, trainable: bool = False
) -> Any:
    """The model in `source`, on its device, in `config.dtype` (trainable ones in float32 or better)."""
    from transformers import AutoModelForCausalLM

    dtype: torch.dtype = getattr(torch, config.dtype)
    if trainable and dtype != torch.float64:
        if dtype != torch.float32:
            logger.info("checkpoint.dtype is for frozen weights: the whole model is trainable, and float32")
        dtype = torch.float32
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": revision or "main"}
    options["local_files_only"] = needs_no_hub(config, source)
    if is_folder(Path(source)):
        check_model_folder(Path(source))
    model_config = _read_model_config(source, options)
    check_promised_size(source, model_config)
    quantized = config.load_in_4bit or getattr(model_config, "quantization_config", None) is not None
    if quantized and (trainable or dtype == torch.float64):
        raise CheckpointError(
            f"model {source}: expected plain weights for {'a trainable model' if trainable else 'float64'}, "
            "found 4-bit ones; name an unquantised model"
        )
    if config.load_in_4bit:
        options["quantization_config"] = _quantization_config(config, dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.device_map is not None or quantized:
        options["device_map"] = config.device_map or {"": device}
    with rewritten(f"model {source}", source_remedy(source)):
        # Sizes that do not match are collected, not raised, so that the message below can name them.
        loader: Any = AutoModelForCausalLM
        model, report = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_loading_report(source, report)
    for layer in find_4bit_layers(model).values():
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
    if "device_map" not in options:
        model.to(device)
    model.requires_grad_(trainable)
    return model


def _read_model_config(source: str, options: dict[str, Any]) -> PretrainedConfig:
    """The model's configuration; refuses what is not a causal language model before any weight is read."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with rewritten(f"model {source}", source_remedy(source)):
        model_config = AutoConfig.from_pretrained(source, **options)
    kind = model_config.model_type
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(model_config, "is_encoder_decoder", False):
        found = "an encoder-decoder (seq2seq) model"
    elif masked and not getattr(model_config, "is_decoder", False):
        found = "an encoder-only model"
    elif not causal and not own_code:
        found = "a model without a causal language-model head"
    else:
        _check_quantization(source, getattr(model_config, "quantization_config", None))
        return model_config
    raise CheckpointError(f"model {source}: expected a causal language model, found {found} ({kind})")


def _check_quantization(source: str, quantization: Any) -> None:
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("quant_method") == "bitsandbytes" and settings.get("load_in_4bit"):
        return
    found = "8-bit bitsandbytes" if settings.get("load_in_8bit") else settings.get("quant_method")
    raise CheckpointError(
        f"model {source}: expected plain or 4-bit bitsandbytes weights, found {found} quantisation, whose "
        "derivatives cannot be relied on; name the unquantised base in checkpoint.backbone"
    )


def _quantization_config(config: CheckpointConfig, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise CheckpointError(
            "checkpoint.load_in_4bit: expected the package bitsandbytes, found none; install it, or set it "
            "to false"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_loading_report(source: str, report: dict[str, Any]) -> None:
    """A weight that the file lacks would be random: refused, not warned of."""
    mismatched = [
        f"{name} {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in report["mismatched_keys"]
    ]
    if mismatched:
        raise CheckpointError(
            f"model {source}: weights do not fit its config.json: {some(sorted(mismatched))}; the folder "
            "mixes two models"
        )
    if report["missing_keys"]:
        unused = sorted(report["unexpected_keys"])
        wrapped = (
            f"; unused are {some(unused)}: save the unwrapped model with `save_pretrained`" if unused else ""
        )
        raise CheckpointError(
            f"model {source}: expected all weights of the model, missing are "
            f"{some(sorted(report['missing_keys']))}{wrapped}"
        )
    if report["unexpected_keys"]:
        logger.warning("model %s: unused weights %s", source, some(sorted(report["unexpected_keys"])))
