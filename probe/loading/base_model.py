"""The base model: found, checked and loaded."""

from __future__ import annotations

import copy
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.limits import MODEL_EXPERTS, MODEL_LAYERS
from probe.loading.adapters import read_adapter_config
from probe.loading.checkpoint import ADAPTER_CONFIG, MODEL_CONFIG, CheckpointFiles
from probe.loading.foreign import check_folder, check_sizes, read_json_object, rewritten, some, walk
from probe.loading.quantization import find_4bit_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_LONGEST_NAME = 1000
_WEIGHTS_PER_BYTE = 4  # 4-bit weights are 2, and tied ones are saved once
_LAYERS = re.compile(r"(num|n)_(hidden_|decoder_|encoder_)?(layers?|blocks)")
BACKBONES: dict[str, str] = {
    f"qwen2_5_{short}{suffix}": f"Qwen/Qwen2.5-{size}{ending}"
    for short, size in (
        ("05", "0.5B"),
        ("15", "1.5B"),
        ("3", "3B"),
        ("7", "7B"),
        ("14", "14B"),
        ("32", "32B"),
    )
    for suffix, ending in (("", ""), ("_instruct", "-Instruct"))
}
"""Short names of `checkpoint.backbone` and the hub ids they stand for."""


def other_base(config: CheckpointConfig, files: CheckpointFiles) -> tuple[str, str] | None:
    """The base that an adapter says it was trained on, and the one it is put on, where these have different names.

    Shapes cannot tell two models of one architecture apart.

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.

    Returns:
        Recorded and given name; None where they are the same, as far as names tell.
    """
    if files.kind != "lora" or not config.backbone:
        return None
    recorded = read_adapter_config(files.model_dir).get("base_model_name_or_path")
    given, _ = resolve_base(config, files.model_dir, {})
    if not isinstance(recorded, str) or not recorded or _same_base(recorded, given, files.model_dir):
        return None
    return recorded, given


def _same_base(recorded: str, given: str, adapter_dir: Path) -> bool:
    if _last_name(recorded) == _last_name(given):
        return True
    places = (adapter_dir / recorded, Path(recorded))
    return is_folder(Path(given)) and any(
        is_folder(place) and os.path.samefile(place, given) for place in places
    )


def _last_name(name: str) -> str:
    """The model's own name: the last part of a path or hub id, also of a folder in the hub's cache."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def resolve_base(
    config: CheckpointConfig, adapter_dir: Path, adapter: dict[str, Any]
) -> tuple[str, str | None]:
    """The base model of an adapter.

    Args:
        config: the `checkpoint` section; its `backbone` goes before what the adapter says.
        adapter_dir: folder of the adapter, to which a relative name in it may refer.
        adapter: content of adapter_config.json.

    Returns:
        A local folder or hub id, and the hub revision.

    Raises:
        CheckpointError: neither names a base model, or a path does not exist.
    """
    if config.backbone:
        name = full_name(config.backbone)
        assert name is not None
        if _looks_local(name) and not is_folder(Path(name)):
            raise CheckpointError(f"checkpoint.backbone: expected an existing folder, found no {name}")
        return str(Path(name).expanduser()) if _looks_local(name) else name, config.revision
    name = adapter.get("base_model_name_or_path")
    if name is not None and (not isinstance(name, str) or len(name) > _LONGEST_NAME or "\0" in name):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected the name of a model in base_model_name_or_path, found "
            f"{name!r:.60}; name the base model in checkpoint.backbone"
        )
    if not name:
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected base_model_name_or_path, found none; name the base "
            "model in checkpoint.backbone"
        )
    for folder in (adapter_dir / name, Path(name)):
        if is_folder(folder):
            return str(folder.resolve()), None
    if _looks_local(name):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected the base model in {name}, found no such folder; name "
            "the base model in checkpoint.backbone"
        )
    return name, config.revision or adapter.get("revision")


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
    _check_promised_size(source, model_config)
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
    with rewritten(f"model {source}", _source_remedy(source)):
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


def check_model_folder(folder: Path) -> None:
    """Refuse a model's folder that would keep a library busy without an end.

    Args:
        folder: with config.json and weights.

    Raises:
        CheckpointError: an entry is no file, a size is none that a model has, there are more layers than weights, or
            the index of the weights names a file elsewhere.
    """
    check_folder(folder)
    file = folder / MODEL_CONFIG
    if not file.is_file():
        return  # transformers says what it looks for
    settings = read_json_object(file, "a model's configuration")
    check_sizes(str(file), settings)
    weights = _weight_count(folder)
    for name, value in walk(settings):
        if not isinstance(value, int):
            continue
        if _LAYERS.fullmatch(name) and value > weights:
            raise CheckpointError(
                f"{file}: expected {name} of at most {weights}, the number of weights beside it, found {value}; the "
                "folder mixes two models"
            )
        if "expert" in name and value > MODEL_EXPERTS and "size" not in name and "dim" not in name:
            raise CheckpointError(f"{file}: expected {name} of at most {MODEL_EXPERTS}, found {value}")


def _weight_count(folder: Path) -> int:
    """The number of weights that safetensors files or their index hold; the most a model may have where none does."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        with rewritten(f"model {folder}", _source_remedy(str(folder))), safe_open(single, "pt") as weights:
            return len(weights.keys())
    if not index.is_file():
        return MODEL_LAYERS
    table = read_json_object(index, "an index of weights").get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(
            f"{index}: expected the name of a file for each weight, found no such weight_map"
        )
    for name in sorted(set(table.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(
                f"{index}: expected files in its own folder, found {name!r:.80}, which is no file there; copy all "
                "parts of the model"
            )
    return len(table)


def _check_promised_size(source: str, model_config: PretrainedConfig) -> None:
    """Refuse a configuration of many times the weights that are there: they would be made up before they are missed."""
    from transformers import AutoModelForCausalLM

    files = list(Path(source).glob("*.safetensors")) if is_folder(Path(source)) else []
    if not files:
        return
    try:
        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    except Exception:
        return  # loading says why
    promised = sum(parameter.numel() for parameter in empty.parameters())
    found = sum(file.stat().st_size for file in files)
    if promised > _WEIGHTS_PER_BYTE * found:
        raise CheckpointError(
            f"model {source}: weights do not fit its config.json: expected {promised} values, found files of {found} "
            "bytes; the folder mixes two models"
        )


def needs_no_hub(config: CheckpointConfig, source: str) -> bool:
    """Whether everything is in a local folder, so that nothing is to be looked up; its code may be on the hub."""
    return is_folder(Path(source)) and not config.trust_remote_code


def _read_model_config(source: str, options: dict[str, Any]) -> PretrainedConfig:
    """The model's configuration; refuses what is not a causal language model before any weight is read."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with rewritten(f"model {source}", _source_remedy(source)):
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


def full_name(backbone: str | None) -> str | None:
    """The hub's name for a short one; other names as they are."""
    return BACKBONES.get(backbone, backbone) if backbone else None


def _looks_local(name: str) -> bool:
    return (
        is_folder(Path(name))
        or Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    )


def is_folder(path: Path) -> bool:
    """Whether there is a folder; also for what cannot be a path."""
    try:
        return path.expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a user that is not there
        return False


def _source_remedy(source: str) -> str:
    if os.path.isdir(source):
        return "the folder must be one that `save_pretrained` wrote"
    return (
        "expected a local folder, a hub id that can be reached or is cached, or one of the short names "
        f"{', '.join(BACKBONES)}; set checkpoint.backbone"
    )
