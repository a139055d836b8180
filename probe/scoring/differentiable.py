"""A model's own code, run such that its derivatives are those of its forward.

What some layers compute in one way they differentiate in another, or not at all: fused attention and grouped products
of experts have no forward mode, and an embedding leaves its padding row out of every backward pass. For the length of
a pass they are switched to an implementation that computes the same and can be differentiated; attention to one whose
memory does not grow with the square of the length (`probe.scoring.attention`). What has no such
switch is found by `probe.estimators.derivative_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from probe.scoring.attention import IMPLEMENTATION, attention_by_queries
from probe.shards import is_shard, whole
from probe.snapshot import attributes_replaced

EXPERTS = "_experts_implementation_internal"
"""Attribute of a transformers configuration that says by which kernel its mixture of experts runs."""


@contextmanager
def forward_mode_kernels(model: nn.Module) -> Iterator[None]:
    """Only kernels with a forward-mode rule: attention, block by block, and the experts of a mixture one by one.

    Scores that are to be compared should all use the same kernels. Which ones these are depends on the lengths alone.

    Args:
        model: a transformers model, possibly wrapped. Its configuration is not written to: the modules that hold it
            get a copy for the length of the block.
    """
    attention = attention_by_queries(model)
    copies: dict[int, Any] = {}
    places: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        config = vars(module).get("config")
        changes: dict[str, Any] = {}
        if getattr(config, EXPERTS, None) not in (None, "eager"):
            changes[EXPERTS] = "eager"
        if (name := attention(config)) is not None:
            changes[IMPLEMENTATION] = name
        if not changes:
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            for attribute, value in changes.items():
                setattr(copies[id(config)], attribute, value)
        places.append((module, "config", copies[id(config)]))
    with sdpa_kernel(SDPBackend.MATH), attributes_replaced(places):
        yield


@contextmanager
def whole_gradients(model: nn.Module) -> Iterator[None]:
    """Backward passes give the padding rows of embeddings their gradient too.

    `nn.Embedding(padding_idx=...)` leaves that row out of every gradient, so that training does not move it for what
    its inputs do. As a derivative of the forward that is wrong wherever the token occurs among the inputs (padding
    by EOS is common, and so are turns of a chat that end with it), and the row does move: by weight decay, by momentum,
    and through an output layer that is tied to it. The loss's gradient is taken without this, as training takes it.
    """
    places = [
        (module, "padding_idx", None)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    with attributes_replaced(places):
        yield


@contextmanager
def as_trained(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Forwards of which every derivative is the one that training takes: padding rows are constants as inputs.

    The other side of `whole_gradients`: the gradient of the loss leaves the padding row of an embedding out for what
    its inputs do, so that what a token adds to the step is a derivative of a forward in which that row stays where it
    is (an output layer that is tied to it goes on moving). Values and other derivatives are the same.

    Args:
        model: a transformers model, possibly wrapped.
        values: what stands in for some of its parameters at the point of differentiation, by name.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    handles = []
    try:
        for module in model.modules():
            if (
                isinstance(module, nn.Embedding)
                and module.padding_idx is not None
                and module.weight.requires_grad
            ):
                row = _padding_row(module, (values or {}).get(names.get(id(module.weight), "")))
                handles.append(module.register_forward_hook(partial(_with_constant_row, row=row)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padding_row(module: nn.Embedding, value: Tensor | None) -> Tensor:
    """What an embedding gives for its padding index, `(D_model,)`: of its weight, or of what stands in for that."""
    index = torch.tensor([module.padding_idx], device=module.weight.device)
    with torch.no_grad():
        if value is None and not is_shard(module.weight):
            return module(index)[0].detach().clone()  # whatever it does to the row
        weight = whole(module.weight if value is None else value)
        return weight.detach()[index][0].clone() * float(getattr(module, "embed_scale", 1.0))


def _with_constant_row(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor, row: Tensor) -> Tensor:
    """An embedding's output with the padding row as it was."""
    padding = torch.eq(args[0], module.padding_idx or 0).unsqueeze(-1)
    return torch.where(padding, row.to(output.dtype), output)
