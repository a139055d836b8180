"""A base model's folder, looked at before a library reads it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.errors.exceptions import CheckpointError
from probe.limits import MODEL_EXPERTS, MODEL_LAYERS
from probe.loading.base_name import is_folder, source_remedy
from probe.loading.checkpoint import MODEL_CONFIG
from probe.loading.foreign import check_folder, check_sizes, read_json_object, rewritten, walk

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WEIGHTS_PER_BYTE = 4  # 4-bit weights are 2, and tied ones are saved once
_LAYERS = re.compile(r"(num|n)_(hidden_|decoder_|encoder_)?(layers?|blocks)")


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
        with rewritten(f"model {folder}", source_remedy(str(folder))), safe_open(single, "pt") as weights:
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


def check_promised_size(source: str, model_config: PretrainedConfig) -> None:
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
