"""Embeddings that an adapter has made larger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors.exceptions import CheckpointError
from probe.loading.checkpoint import ADAPTER_WEIGHTS
from probe.loading.foreign import walk

_PREFIX = "base_model.model."
_WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight", "token_adapter.base_layer.weight")


def resize_embeddings(
    model: Any,
    folder: Path,
    adapter: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tokens: int,
) -> None:
    """Give the base as many tokens as the adapter was trained on, where its file tells; refuse rows that it lacks."""
    rows = model.get_input_embeddings().weight.shape[0]
    layers = _token_layers(model)
    found = {size for names in layers for name in names for size, _ in _saved_rows(name, shapes)}
    if len(found) > 1:
        raise CheckpointError(
            f"adapter {folder}: expected embeddings of one number of tokens, found {sorted(found)}; the file mixes two "
            "models"
        )
    wanted = found.pop() if found else max(rows, tokens)
    added = set(range(rows, wanted))
    trained = adapter.get("trainable_token_indices") or []
    for index, (name, *tied) in enumerate(layers):
        whole = any(is_whole for other in (name, *tied) for _, is_whole in _saved_rows(other, shapes))
        # a list is of the input's rows
        own = (
            trained.get(name.rpartition(".")[2], [])
            if isinstance(trained, dict)
            else trained
            if not index
            else []
        )
        if not whole and not added <= {row for _, row in walk(own)}:
            raise CheckpointError(
                f"adapter {folder}: expected {name} of the {len(added)} tokens that were added to the base model's "
                f"{rows}, found none in {ADAPTER_WEIGHTS}: it cannot be made again; save with "
                "`save_pretrained(..., save_embedding_layers=True)`, or name the base with the added tokens in "
                "checkpoint.backbone (or its tokenizer in checkpoint.tokenizer_path if none were added)"
            )
    if wanted != rows:
        # Every new row is overwritten by the file's.
        model.resize_token_embeddings(wanted, mean_resizing=False)
        model.requires_grad_(False)


def _token_layers(model: Any) -> list[list[str]]:
    """Names of the layers with a row for each token, that of the input first; tied ones together."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if last is None or last is first:
        return [[names[id(first)]]]
    own, other = names[id(first)], names[id(last)]
    return [[own, other]] if last.weight is first.weight else [[own], [other]]


def _saved_rows(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, bool]]:
    """For each weight that a file has of a layer: its number of tokens, and whether it is the layer's whole weight."""
    found = []
    for key, shape in shapes.items():
        inside = key.removeprefix(_PREFIX)
        if not inside.startswith(f"{name}.") or not shape:
            continue
        inside = inside.removeprefix(f"{name}.")
        if inside in _WHOLE:
            found.append((shape[0], True))
        elif inside == "lora_B.weight":
            found.append((shape[0], False))
        elif inside == "lora_embedding_A":
            found.append((shape[-1], False))
    return found
