"""Contributions added up: by class of token, prompt, response, layer and matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions, whole_change
from probe.attribution.objectives import Change

LAYER = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.")
MATRIX = re.compile(r"\.([A-Za-z0-9_]+)\.(lora_[A-Za-z_]+)(?:\.[^.]+)?(?:\.weight)?$")


@dataclass(frozen=True)
class Sum:
    """What some tokens of U, or some parameters, add to deltaH1.

    Attributes:
        name: of the class.
        tokens: how many there are; None for parameters.
        change: what they add, with errors over E.
    """

    name: str
    tokens: int | None
    change: Change


def sums_by_label(
    found: Contributions, labels: Mapping[str, tuple[Tensor, tuple[str, ...]]]
) -> dict[str, list[Sum]]:
    """The policy-gradient terms of U's tokens by each way to sort them; labels without a token are left out."""
    table: dict[str, list[Sum]] = {}
    for way, (label, names) in labels.items():
        table[way] = [one for one in _sums(found, label, names) if one.tokens]
    return table


def sums_by_response(found: Contributions, mask: Tensor) -> list[Sum]:
    """The same of every response of U, in its order."""
    B = len(mask)
    return _sums(found, torch.where(mask, torch.arange(B).unsqueeze(1), -1), [str(i) for i in range(B)])


def sums_by_prompt(found: Contributions, mask: Tensor, group: Tensor) -> list[Sum]:
    """The same of every prompt of U, by the number of its group."""
    numbers, member = group.unique(return_inverse=True)
    return _sums(found, torch.where(mask, member.unsqueeze(1), -1), [str(n) for n in numbers.tolist()])


def _sums(found: Contributions, label: Tensor, names: Sequence[str]) -> list[Sum]:
    """The policy-gradient terms of the tokens of each label, `(B, T)` int64 in the order of the names; -1 for none."""
    counts = torch.bincount(label[label >= 0].flatten(), minlength=len(names)).tolist()
    made = found.sensitivities.changes(found.weights.policy, label, len(names))
    return [Sum(name, count, one) for name, count, one in zip(names, counts, made, strict=True)]


def sums_by_parameter(found: Contributions) -> dict[str, list[Sum]]:
    """What the step does through each layer and each kind of matrix: momentum, decay and the loss's gradient together.

    A layer is what stands in a numbered block of the model; a matrix is the name of its module and, of an adapter, of
    its factor (`q_proj lora_A`).
    """
    held = found.sensitivities
    whole = held.vectors["momentum"] + held.vectors["decay"] + held.vectors["gradient"]
    table = {}
    for way, of in (("layer", layer_of), ("matrix", matrix_of)):
        names = [of(name) for name in held.names]
        order = sorted(set(names), key=_natural)
        index = torch.tensor([order.index(name) for name in names])
        summed = torch.zeros(*whole.shape[:2], len(order), dtype=torch.float64).index_add_(2, index, whole)
        table[way] = [
            Sum(name, None, one) for name, one in zip(order, whole_change(summed, held.blocks), strict=True)
        ]
    return table


def layer_of(parameter: str) -> str:
    """The layer of a parameter: `layer 3`, or `outside of layers`.

    >>> layer_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight"), layer_of("lm_head.weight")
    ('layer 3', 'outside of layers')
    """
    found = LAYER.search(f".{parameter}.")
    return f"layer {found[1]}" if found else "outside of layers"


def matrix_of(parameter: str) -> str:
    """The kind of matrix of a parameter.

    >>> matrix_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
    'up_proj lora_A'
    >>> matrix_of("model.layers.3.self_attn.q_proj.weight"), matrix_of("model.layers.0.self_attn.q_proj.bias")
    ('q_proj', 'q_proj bias')
    """
    found = MATRIX.search(f".{parameter}")
    if found:
        return f"{found[1]} {found[2]}"
    *_, module, kind = ("", *parameter.split("."))
    return module if kind == "weight" else f"{module} {kind}".strip()


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name in the order of their size."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]
