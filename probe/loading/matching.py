"""Which saved state belongs to which parameter.

By name where the file has names. Otherwise by position, and then only if a known way of grouping parameters
fits in every count and every shape; two ways that fit differently are an error. Parameters of one shape that
a file without names holds in another order cannot be told apart: a note says that the match is by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import OptimizerStateError
from probe.loading.layout_order import Group, Matching, Shape, match_by_position, some_of
from probe.loading.moments import SavedKey
from probe.parameters import trainable_parameters

# Wrappers that put a component into every name, and PEFT's name of its only adapter.
_WRAPPER_COMPONENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "default"}
_WRAPPER_PREFIXES = ("module.", "base_model.model.")

_PROBING_TOKENS = 64


def idle_parameters(model: Any) -> frozenset[str]:
    """The trainable parameters that a text does not reach: a vision tower's, those behind a layer that is switched off.

    In a training on texts they never have a gradient, so that the optimizer skips them and keeps no state of them.

    Args:
        model: the policy, a causal language model.

    Returns:
        Their names. One forward and backward pass is made; gradients and random state stay as they are.
    """
    parameters = trainable_parameters(model)
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(embeddings.shape[0], device=embeddings.device)
    ids = ids[:: max(1, len(ids) // _PROBING_TOKENS)][:_PROBING_TOKENS].unsqueeze(0)
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        found = torch.autograd.grad(logits.float().sum(), list(parameters.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(parameters, found, strict=True) if gradient is None)


def match_parameters(
    model: nn.Module,
    groups: Sequence[Group],
    shapes: Mapping[SavedKey, Shape],
    idle: frozenset[str] = frozenset(),
) -> Matching:
    """Match saved states to the trainable parameters of `model`, all of them or none.

    Args:
        model: the policy.
        groups: the file's parameter groups.
        shapes: shape of every state in the file, by its key.
        idle: trainable parameters that may have no state, as they never have a gradient.

    Returns:
        The matching.

    Raises:
        OptimizerStateError: a parameter has no state, a state has no parameter, a shape differs, or positions
            allow more than one matching; lists which.
    """
    orphans = sorted(map(str, shapes.keys() - {key for group in groups for key in group["params"]}))
    if orphans:
        raise OptimizerStateError(
            f"optimizer state: expected every state in a parameter group, found {some_of(orphans)} in none"
        )
    names = _saved_names(groups)
    if names is not None:
        return Matching(_match_by_name(model, names, shapes, idle), ())
    return match_by_position(model, groups, shapes, idle)


def _saved_names(groups: Sequence[Group]) -> dict[SavedKey, str] | None:
    """The file's own names: `param_names` of named parameters, or states that are keyed by name."""
    names: dict[SavedKey, str] = {}
    for group in groups:
        keys = list(group["params"])
        given = group.get("param_names") or keys
        if not all(isinstance(name, str) for name in given):
            return None
        if len(given) != len(keys):
            raise OptimizerStateError(
                f"optimizer state: expected one name for each of {len(keys)} parameters of a group, found "
                f"{len(given)}"
            )
        names.update(zip(keys, given, strict=True))
    return names


def _match_by_name(
    model: nn.Module, names: Mapping[SavedKey, str], shapes: Mapping[SavedKey, Shape], idle: frozenset[str]
) -> dict[SavedKey, str]:
    parameters = trainable_parameters(model)
    wanted = {_plain_name(name): name for name in parameters}
    if len(wanted) < len(parameters):
        raise OptimizerStateError(
            "optimizer state: expected parameters with distinct names once wrappers are left out"
        )
    matched: dict[SavedKey, str] = {}
    taken: dict[str, str] = {}
    faults = []
    for key, saved_name in names.items():
        # Parameters that were in the optimizer without ever being trained have no state; they do not matter.
        if key not in shapes:
            continue
        name = wanted.get(_plain_name(saved_name))
        if name is None:
            faults.append(
                f"{saved_name}: no trainable parameter of this name, found a state of shape {shapes[key]}"
            )
        elif name in taken:
            faults.append(f"{name}: expected one state, found {taken[name]} and {saved_name}")
        else:
            matched[key], taken[name] = name, saved_name
            if shapes[key] != tuple(parameters[name].shape):
                faults.append(f"{name}: expected shape {tuple(parameters[name].shape)}, found {shapes[key]}")
    faults += [
        f"{name}: expected shape {tuple(p.shape)}, found no state"
        for name, p in parameters.items()
        if name not in taken and name not in idle
    ]
    if faults:
        raise OptimizerStateError(
            f"optimizer state, matched by name: expected a state for each of {len(parameters)} trainable "
            f"parameters, found {len(faults)} faults: {some_of(faults)}"
        )
    return matched


def _plain_name(name: str) -> str:
    """The name without what wrappers and PEFT add to it."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if plain.startswith(prefix):
                plain, stripped = plain.removeprefix(prefix), True
    return plain
