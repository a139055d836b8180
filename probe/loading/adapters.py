"""The adapter of a policy: its settings checked, the base prepared as the training had it, its weights put in place."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import CheckpointError
from probe.limits import ADAPTER_ENTRIES, PATTERN_SECONDS, time_limit
from probe.loading.added_tokens import resize_embeddings
from probe.loading.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REFERENCE_ADAPTER
from probe.loading.foreign import check_folder, check_sizes, read_json_object, rewritten, some, walk

logger = logging.getLogger(__name__)

_LONG = ("trainable_token_indices", "token_indices", "layer_replication")
_RANKS = ("r", "rank_pattern", "init_r", "target_r", "num_vectors", "vector_length")
_PATTERNS = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern")
_KEYED_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_BELONGS = (
    "the file must be whole (copy it again if it was cut off) and belong to this base model (name the right one in "
    "checkpoint.backbone)"
)
# Initialisations after which the base is no longer the one that is named, and why they cannot be done again.
_LOST_BASES = (
    ("pissa_niter", "by a decomposition that starts from random numbers"),
    ("corda", "by statistics of a data set"),
    ("lora_ga", "by gradients on a data set"),
    ("loftq", "by a quantisation that other hardware does otherwise"),
)
_REBUILT_BASES = ("pissa", "olora")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Args:
        folder: the adapter's.

    Raises:
        CheckpointError: it cannot be read, the adapter has no weights inside the model, or it is for another task.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig

    file = folder / ADAPTER_CONFIG
    adapter = read_json_object(file, "PEFT's JSON with a peft_type")
    kind, task = adapter.get("peft_type"), adapter.get("task_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: expected PEFT's JSON with a peft_type, found {kind!r:.60}")
    check_sizes(str(file), adapter)
    kinds: dict[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
    if issubclass(kinds.get(kind, PeftConfig), PromptLearningConfig):
        raise CheckpointError(
            f"{file}: expected an adapter of the model's weights such as LoRA, found {kind}"
        )
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{file}: expected task_type CAUSAL_LM, found {task}")
    _refuse_lost_base(file, adapter)
    return adapter


def attach_adapter(
    model: Any, folder: Path, adapter: Mapping[str, Any], device: torch.device, tokens: int
) -> nn.Module:
    """The base model with the adapter in `folder`, trainable.

    Args:
        model: the base; its embeddings are resized where the adapter was trained on another number of tokens.
        folder: the adapter's.
        adapter: content of its adapter_config.json.
        device: where the adapter's weights go.
        tokens: number of tokens of the tokenizer.

    Raises:
        CheckpointError: the adapter does not belong to the base, or would not be what was saved.
    """
    from peft import PeftModel

    with rewritten(f"adapter {folder}", _BELONGS), warnings.catch_warnings():
        shapes = _shapes(folder / ADAPTER_WEIGHTS)
        _check_settings(model, folder, adapter, shapes)
        resize_embeddings(model, folder, adapter, shapes, tokens)
        # peft only warns when the file lacks weights, which then stay random.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        placed: dict[str, Any] = {} if hasattr(model, "hf_device_map") else {"torch_device": str(device)}
        policy = PeftModel.from_pretrained(model, str(folder), is_trainable=True, **placed)
        _check_placed(policy, folder)
    if rebuilds_base(adapter):
        logger.info(
            "adapter %s: init_lora_weights %s was applied to the base again, in its type here; that of the training "
            "has to be the same",
            folder,
            adapter["init_lora_weights"],
        )
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise CheckpointError(f"adapter {folder}: expected trainable weights, found none")
    reference = folder / REFERENCE_ADAPTER
    # training that started from a trained adapter keeps a copy of it
    if (reference / ADAPTER_CONFIG).is_file():
        check_folder(reference)
        with rewritten(f"adapter {reference}", _BELONGS):
            settings = read_adapter_config(reference)
            if rebuilds_base(settings):
                raise CheckpointError(
                    f"{reference / ADAPTER_CONFIG}: expected a reference adapter of the base model as it is, found "
                    f"init_lora_weights {settings['init_lora_weights']:.40}, which changes the base under the policy; "
                    "set it to true in this file if the training did not do that either"
                )
            _check_settings(model, reference, settings, _shapes(reference / ADAPTER_WEIGHTS))
            policy.load_adapter(str(reference), REFERENCE_ADAPTER, is_trainable=False, **placed)
    return policy


def rebuilds_base(adapter: Mapping[str, Any]) -> bool:
    """Whether the adapter's initialisation takes something out of the base, which loading does again.

    Args:
        adapter: content of adapter_config.json.
    """
    return str(adapter.get("init_lora_weights")).lower().startswith(_REBUILT_BASES)


def _refuse_lost_base(file: Path, adapter: Mapping[str, Any]) -> None:
    """Refuse an adapter whose base was changed in a way that cannot be repeated: the policy would be another one."""
    initial = str(adapter.get("init_lora_weights")).lower()
    for name, why in _LOST_BASES:
        if initial.startswith(name):
            raise CheckpointError(
                f"{file}: expected an adapter of the base model as it is, found init_lora_weights {initial:.40}, which "
                f"changed the base {why}; convert the adapter (`save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...)` in the training), or name the changed base that was "
                "saved in checkpoint.backbone and set init_lora_weights: true in the file"
            )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118


def _check_settings(
    model: Any, folder: Path, adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse settings that would build more than the file has weights for, and patterns that never come to an end."""
    file = folder / ADAPTER_CONFIG
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if adapter["peft_type"] != "LOKR":  # its rank may be any number: it stands for whole matrices then
        for key in _RANKS:
            for _, rank in walk(adapter.get(key)):
                if isinstance(rank, int) and rank > largest:
                    raise CheckpointError(
                        f"{file}: expected {key} of at most {largest}, the largest size in {ADAPTER_WEIGHTS}, found "
                        f"{rank}; take both files from one checkpoint"
                    )
    places = max(sum(1 for _ in model.modules()), ADAPTER_ENTRIES)
    for key, value in adapter.items():
        if isinstance(value, (list, dict)) and key not in _LONG and len(value) > places:
            raise CheckpointError(
                f"{file}: expected at most {places} entries in {key}, as many as there are modules to name, found "
                f"{len(value)}; take the file from where the adapter was saved"
            )
    replicated = adapter.get("layer_replication") or []
    if not isinstance(replicated, list) or not all(
        isinstance(span, list) and len(span) == 2 and all(type(index) is int for index in span)
        for span in replicated
    ):
        raise CheckpointError(
            f"{file}: expected pairs of layers in layer_replication, found {replicated!r:.60}"
        )
    layers = sum(max(0, end - start) for start, end in replicated)
    if layers > max(len(shapes), 1):
        raise CheckpointError(
            f"{file}: expected at most {len(shapes)} layers in layer_replication, as many as {ADAPTER_WEIGHTS} has "
            f"weights, found {layers}; take both files from one checkpoint"
        )
    patterns = [
        text
        for key in _PATTERNS
        for text in ([adapter[key]] if isinstance(adapter.get(key), str) else adapter.get(key) or [])
        if isinstance(text, str)
    ]
    for key in _KEYED_BY_PATTERN:
        patterns += list(adapter.get(key) or {})
    _check_patterns(file, model, [text for text in patterns if not re.fullmatch(r"[\w.-]*", text)])


def _check_patterns(file: Path, model: Any, patterns: list[str]) -> None:
    """Let every pattern go through the model's names once, as peft will, for a limited time."""
    names = [name for name, _ in model.named_modules()]
    error = CheckpointError(
        f"{file}: expected patterns that go through {len(names)} names of modules within {PATTERN_SECONDS:g} seconds, "
        f"found {', '.join(patterns)[:80]!r}; name the modules one by one"
    )
    with time_limit(PATTERN_SECONDS, error):
        for text in patterns:
            try:
                own, inner = re.compile(text), re.compile(rf"(.*\.)?({text})$")
            except (re.error, RecursionError, OverflowError) as problem:
                raise CheckpointError(
                    f"{file}: expected a regular expression, found {text!r:.60} ({problem!s:.60})"
                ) from problem
            for name in names:
                own.fullmatch(name)
                inner.match(name)


def _check_placed(policy: Any, folder: Path) -> None:
    """Every weight of the file must be in the model; peft drops those without a place in it without a word."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    loaded = get_peft_model_state_dict(policy, save_embedding_layers=True)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
        # Only counts are compared, because peft renames keys of older files.
        lora = [key for key in saved if "lora_" in key]
        places = [key for key in loaded if "lora_" in key]
        if len(lora) > len(places):
            raise CheckpointError(
                f"adapter {folder}: expected {len(places)} LoRA weights as in the base model, found {len(lora)}: "
                f"{some(sorted(set(lora) - set(places)))} have no place in it; {_BELONGS}"
            )
        state = policy.state_dict()
        others = sorted(key for key in saved if "lora_" not in key)
        if _is_lora(policy):
            lost = [key for key in others if key not in loaded and key not in state]
            if lost:
                raise CheckpointError(
                    f"adapter {folder}: expected weights of the base model and its adapter, found {some(lost)}, which "
                    f"have no place in it; {_BELONGS}"
                )
            wrong = [
                key
                for key in others
                if not _same(file.get_tensor(key), loaded[key] if key in loaded else state[key])
            ]
            if wrong:
                raise CheckpointError(
                    f"adapter {folder}: expected the saved weights in the model, found others in {some(wrong)}; "
                    f"{_BELONGS}"
                )


def _is_lora(policy: Any) -> bool:
    """Whether the adapter is LoRA, whose weights keep the names they are saved under."""
    return all(settings.peft_type == "LORA" for settings in policy.peft_config.values())


def _same(saved: torch.Tensor, placed: torch.Tensor) -> bool:
    return saved.shape == placed.shape and torch.equal(saved.to(placed), placed)
