"""The policy: a base model with a LoRA or QLoRA adapter, or a whole model, ready to be differentiated.

The model comes in evaluation mode (no dropout), its trainable weights in float32 or better, its 4-bit layers
with an exact forward, checked for finite weights and logits.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from probe.config import CheckpointConfig
from probe.errors import CheckpointError
from probe.limits import MODEL_EXPERTS, MODEL_LAYERS
from probe.loading.adapters import attach_adapter, read_adapter_config, rebuilds_base
from probe.loading.checkpoint import ADAPTER_CONFIG, MODEL_CONFIG, CheckpointFiles
from probe.loading.foreign import check_folder, check_sizes, read_json_object, rewritten, some, walk
from probe.loading.quantization import dequantized_weight, find_4bit_layers, use_exact_4bit_layers
from probe.loading.tokenizer import load_saved_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

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


def load_policy_model(
    config: CheckpointConfig,
    files: CheckpointFiles,
    device: torch.device | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the policy and its tokenizer. The torch random state is left as it was.

    An adapter's weights are trainable and its base is frozen, in `config.dtype`. Of a whole model every
    parameter is trainable. Trainable weights are float32, or float64 where `config.dtype` says so (the whole
    model then).

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.
        device: where the model goes, unless `config.device_map` distributes it.
        tokenizer: from `load_tokenizer`, where it is there already.

    Returns:
        The model (a `PreTrainedModel` or a `PeftModel`) in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: a part cannot be loaded or does not fit the others, the model is no causal language
            model, the tokenizer has no EOS token, or weights or logits are not finite.
    """
    device = torch.device(device)
    tokenizer = load_tokenizer(config, files) if tokenizer is None else tokenizer
    with quiet_libraries(), _fork_torch_rng():
        if files.kind == "lora":
            adapter = read_adapter_config(files.model_dir)
            base, revision = resolve_base(config, files.model_dir, adapter)
            if config.dtype == "float64" and rebuilds_base(adapter):
                raise CheckpointError(
                    "checkpoint.dtype: expected float32, in which the base of an adapter with init_lora_weights "
                    f"{adapter['init_lora_weights']:.40} was changed, found float64"
                )
            if (names := other_base(config, files)) is not None:
                logger.warning("adapter %s: trained on %s, put on %s", files.model_dir, *names)
            model = _load_base(config, base, revision, device)
            model = attach_adapter(model, files.model_dir, adapter, device, len(tokenizer))
        else:
            if config.load_in_4bit:
                raise CheckpointError(
                    "checkpoint.load_in_4bit: expected an adapter checkpoint, found a whole model, whose "
                    f"weights are all trainable, in {files.model_dir}; set it to false"
                )
            model = _load_base(config, str(files.model_dir), None, device, trainable=True)
        use_exact_4bit_layers(model)
        _settle_precision(model, config)
        model.eval()
        _check_finite_weights(model)
        _check_vocabulary(model, tokenizer)
        _check_forward(model)
    return model, tokenizer


def load_tokenizer(config: CheckpointConfig, files: CheckpointFiles) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer: that of `config.tokenizer_path`, else the checkpoint's, else the base model's.

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has no EOS token.
    """
    with quiet_libraries(), _fork_torch_rng():
        if files.kind == "lora":
            base, revision = resolve_base(config, files.model_dir, read_adapter_config(files.model_dir))
            return _load_tokenizer(config, files, base, revision)
        return _load_tokenizer(config, files, _full_name(config.backbone), config.revision)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an update changes, in the order of `named_parameters` (tied ones once).

    Args:
        model: the policy.

    Returns:
        Name to parameter.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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
    return _is_folder(Path(given)) and any(
        _is_folder(place) and os.path.samefile(place, given) for place in places
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
        name = _full_name(config.backbone)
        assert name is not None
        if _looks_local(name) and not _is_folder(Path(name)):
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
        if _is_folder(folder):
            return str(folder.resolve()), None
    if _looks_local(name):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected the base model in {name}, found no such folder; name "
            "the base model in checkpoint.backbone"
        )
    return name, config.revision or adapter.get("revision")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the messages of transformers, peft and bitsandbytes down; their Python warnings are logged.

    Verbosity, progress bars and warning filters are as before afterwards.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    bnb_logger = logging.getLogger("bitsandbytes")
    bnb_level = bnb_logger.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    bnb_logger.setLevel(logging.ERROR)
    recorded: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        bnb_logger.setLevel(bnb_level)
        for category, message in dict.fromkeys((entry.category, str(entry.message)) for entry in recorded):
            # A library's plans for its next version are no news to the user.
            notice = issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))
            logger.log(logging.DEBUG if notice else logging.INFO, "while loading: %s", message)


def _load_base(
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
    options["local_files_only"] = _needs_no_hub(config, source)
    if _is_folder(Path(source)):
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

    files = list(Path(source).glob("*.safetensors")) if _is_folder(Path(source)) else []
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


def _needs_no_hub(config: CheckpointConfig, source: str) -> bool:
    """Whether everything is in a local folder, so that nothing is to be looked up; its code may be on the hub."""
    return _is_folder(Path(source)) and not config.trust_remote_code


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


def _settle_precision(model: nn.Module, config: CheckpointConfig) -> None:
    """Trainable weights in float32 or better: 16 bits round steps of a learning rate's size away."""
    if config.dtype == "float64":
        model.to(torch.float64)
        switch = getattr(model, "set_experts_implementation", None)
        if callable(switch):  # grouped products of experts have no kernel for it
            switch("eager")
        return
    low = [p for p in trainable_parameters(model).values() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in low:
        parameter.data = parameter.data.float()
    if low:
        logger.info("%d trainable weights are kept in float32 instead of 16 bits", len(low))


def training_dropout(model: nn.Module) -> float:
    """The largest dropout probability of a model in training mode; 0 where there is none.

    Args:
        model: a transformers model, possibly wrapped: its dropout layers count, adapters' included, and the attention's
            own, which is no layer.
    """
    layers = [m.p for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout1d, nn.AlphaDropout))]
    attention = [getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    found = [p for p in (*layers, *attention) if isinstance(p, float) and p > 0]
    return max(found, default=0.0)


def _check_finite_weights(model: nn.Module) -> None:
    bad = []
    count = 0
    for name, parameter in model.named_parameters():
        count += 1
        if parameter.is_floating_point():
            wrong = int((~torch.isfinite(parameter.detach())).sum())
            if wrong:
                bad.append(f"{name} ({wrong} of {parameter.numel()} values)")
    for name, layer in find_4bit_layers(model).items():
        wrong = int((~torch.isfinite(dequantized_weight(layer, torch.float32))).sum())
        if wrong:
            bad.append(f"{name}.weight ({wrong} values)")
    if bad:
        raise CheckpointError(
            f"non-finite weights in {len(bad)} of {count} parameters: {some(bad)}; the checkpoint is "
            "broken, take an earlier one"
        )


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"tokenizer {tokenizer.name_or_path}: expected at most the {rows} tokens the model has "
            f"embeddings for, found {len(tokenizer)}; name the model's own in checkpoint.tokenizer_path"
        )


@torch.no_grad()
def _check_forward(model: Any) -> None:
    """Four tokens through the model: they must go through, be finite, and not depend on what follows."""
    embeddings = model.get_input_embeddings().weight
    last = embeddings.shape[0] - 1
    ids = torch.tensor([[0, last // 2, last, 0], [0, last // 2, last, last]], device=embeddings.device)
    remedy = "set checkpoint.dtype: float32, or another checkpoint.attn_implementation"
    with rewritten("a forward pass of the policy", remedy):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logits = logits.detach().double().cpu()
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            "a forward pass of the policy: expected finite logits, found "
            f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} that are not; {remedy}"
        )
    # The rows differ in the last token only; rounding differs between rows by far less than this.
    difference = (logits[0, :3] - logits[1, :3]).abs().max()
    if difference > 0.05 * logits.abs().max():
        raise CheckpointError(
            "a forward pass of the policy: expected a causal language model, found logits that change by "
            f"{difference:.3g} with a later token (a bidirectional or diffusion model)"
        )


def _load_tokenizer(
    config: CheckpointConfig, files: CheckpointFiles, base: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first place that has one; a place that has one must be readable."""
    source: str | None
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.tokenizer_path is not None:
        source = _full_name(str(Path(config.tokenizer_path).expanduser()))
    elif files.tokenizer_dirs:
        source = str(files.tokenizer_dirs[0])
    else:
        source = base
        options["revision"] = revision or "main"
    if source is None:
        raise CheckpointError(f"no tokenizer in {files.model_dir}; name one in checkpoint.tokenizer_path")
    with rewritten(
        f"tokenizer {source}", "name a folder or hub id with a tokenizer in checkpoint.tokenizer_path"
    ):
        options["local_files_only"] = _needs_no_hub(config, source)
        if _is_folder(Path(source)):
            check_folder(Path(source))
        tokenizer = load_saved_tokenizer(source, **options)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"tokenizer {source}: expected an EOS token, with which a response ends, found none; set "
            "eos_token in its tokenizer_config.json, or name another in checkpoint.tokenizer_path"
        )
    return tokenizer


def _full_name(backbone: str | None) -> str | None:
    return BACKBONES.get(backbone, backbone) if backbone else None


def _looks_local(name: str) -> bool:
    return (
        _is_folder(Path(name))
        or Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    )


def _is_folder(path: Path) -> bool:
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


@contextlib.contextmanager
def _fork_torch_rng() -> Iterator[None]:
    """Loading draws random numbers for weights that are then overwritten; they must not move the seed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        yield
