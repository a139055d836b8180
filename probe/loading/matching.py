"""Which saved state belongs to which parameter.

By name where the file has names. Otherwise by position, and then only if a known way of grouping parameters
fits in every count and every shape; two ways that fit differently are an error. Parameters of one shape that
a file without names holds in another order cannot be told apart: a note says that the match is by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probe.errors import OptimizerStateError
from probe.loading.model import trainable_parameters
from probe.loading.moments import SavedKey

Group = Mapping[str, Any]
Shape = tuple[int, ...]

# Wrappers that put a component into every name, and PEFT's name of its only adapter.
_WRAPPER_COMPONENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "default"}
_WRAPPER_PREFIXES = ("module.", "base_model.model.")

# Names that transformers' Trainer leaves out of weight decay, and those of its versions before 4.50.
_NO_DECAY_PATTERNS = (
    (
        "decay / no-decay groups",
        [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"],
    ),
    ("decay / no-decay groups by bias only", [r"bias"]),
)
_LISTED = 10
_PROBING_TOKENS = 64


@dataclass(frozen=True)
class Matching:
    """The parameter of every saved state.

    Attributes:
        names: saved key (a position or a name) to the name of the trainable parameter.
        notes: how they were matched, where that is not by name.
    """

    names: Mapping[SavedKey, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """One way of grouping parameters; `decays`: whether each group has weight decay (None: either)."""

    label: str
    groups: tuple[tuple[str, ...], ...]
    decays: tuple[bool | None, ...]


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
            f"optimizer state: expected every state in a parameter group, found {_some(orphans)} in none"
        )
    names = _saved_names(groups)
    if names is not None:
        return Matching(_match_by_name(model, names, shapes, idle), ())
    return _match_by_position(model, groups, shapes, idle)


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
            f"parameters, found {len(faults)} faults: {_some(faults)}"
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


def _match_by_position(
    model: nn.Module, groups: Sequence[Group], shapes: Mapping[SavedKey, Shape], idle: frozenset[str]
) -> Matching:
    layouts = _layouts(model)
    fits = [layout for layout in layouts if not _faults(model, groups, shapes, layout, idle)]
    if not fits:
        raise OptimizerStateError(_no_fit_message(model, groups, shapes, layouts, idle))
    distinct = {_assignment(groups, shapes, layout): layout for layout in reversed(fits)}
    if len(distinct) > 1:
        by_decay = {names: layout for names, layout in distinct.items() if _decay_agrees(groups, layout)}
        distinct = by_decay if len(by_decay) == 1 else distinct
    if len(distinct) > 1:
        labels = sorted(layout.label for layout in distinct.values())
        raise OptimizerStateError(
            f"optimizer state: expected one way to match states without names, found {len(labels)} that fit "
            f"in every shape ({'; '.join(labels)}); save it from an optimizer that was given "
            "`model.named_parameters()`"
        )
    assignment, layout = next(iter(distinct.items()))
    return Matching(
        dict(assignment), (f"states were matched by position ({layout.label}): the file has no names",)
    )


def _layouts(model: nn.Module) -> list[_Layout]:
    """The known ways of grouping the trainable parameters, and all (frozen ones without a state)."""
    from transformers.trainer_pt_utils import get_parameter_names

    trainable = list(trainable_parameters(model))
    everything = [name for name, _ in model.named_parameters()]
    layouts = []
    for scope, names in (("", trainable), (", frozen parameters included", everything)):
        layouts.append(_Layout(f"one group{scope}", (tuple(names),), (None,)))
        for label, patterns in _NO_DECAY_PATTERNS:
            decayed = set(get_parameter_names(model, [nn.LayerNorm], patterns))
            decay = tuple(name for name in names if name in decayed)
            rest = tuple(name for name in names if name not in decayed)
            layouts.append(_Layout(f"{label}{scope}", (decay, rest), (True, False)))
            layouts.append(_Layout(f"{label}, in reverse{scope}", (rest, decay), (False, True)))
    second = tuple(name for name in trainable if "lora_B" in name)
    first = tuple(name for name in trainable if "lora_B" not in name)
    layouts.append(_Layout("LoRA+ groups", (first, second), (None, None)))
    return [_without_empty(layout) for layout in layouts]


def _without_empty(layout: _Layout) -> _Layout:
    kept = [(group, decay) for group, decay in zip(layout.groups, layout.decays, strict=True) if group]
    return _Layout(layout.label, tuple(group for group, _ in kept), tuple(decay for _, decay in kept))


def _faults(
    model: nn.Module,
    groups: Sequence[Group],
    shapes: Mapping[SavedKey, Shape],
    layout: _Layout,
    idle: frozenset[str],
) -> list[str]:
    """What speaks against a layout; nothing if it fits."""
    sizes = [len(group["params"]) for group in groups]
    expected = [len(group) for group in layout.groups]
    if sizes != expected:
        return [f"groups of {expected} parameters, found {sizes}"]
    faults = []
    parameters = dict(model.named_parameters())
    for group, names in zip(groups, layout.groups, strict=True):
        for key, name in zip(group["params"], names, strict=True):
            parameter = parameters[name]
            shape = shapes.get(key)
            if not parameter.requires_grad:
                if shape is not None:
                    faults.append(f"{name}: expected no state for a frozen parameter, found shape {shape}")
            elif shape is None and name in idle:
                continue
            elif shape is None:
                faults.append(f"{name}: expected shape {tuple(parameter.shape)}, found no state")
            elif shape != tuple(parameter.shape):
                faults.append(f"{name}: expected shape {tuple(parameter.shape)}, found {shape}")
    return faults


def _assignment(
    groups: Sequence[Group], shapes: Mapping[SavedKey, Shape], layout: _Layout
) -> tuple[tuple[SavedKey, str], ...]:
    pairs = []
    for group, names in zip(groups, layout.groups, strict=True):
        pairs += [(key, name) for key, name in zip(group["params"], names, strict=True) if key in shapes]
    return tuple(pairs)


def _decay_agrees(groups: Sequence[Group], layout: _Layout) -> bool:
    return all(
        decay is not None and bool(group["weight_decay"]) == decay
        for group, decay in zip(groups, layout.decays, strict=True)
    )


def _no_fit_message(
    model: nn.Module,
    groups: Sequence[Group],
    shapes: Mapping[SavedKey, Shape],
    layouts: Sequence[_Layout],
    idle: frozenset[str],
) -> str:
    """Describe the misfit against the nearest layout: one whose counts fit, with the fewest faults."""
    sizes = [len(group["params"]) for group in groups]
    same_sizes = [layout for layout in layouts if [len(group) for group in layout.groups] == sizes]
    if not same_sizes:
        known = dict.fromkeys(
            f"{layout.label} {[len(group) for group in layout.groups]}" for layout in layouts
        )
        return (
            "optimizer state: expected one of the known groupings of the model's "
            f"{len(trainable_parameters(model))} trainable parameters ({'; '.join(known)}), found groups of "
            f"{sizes} without names; save it from an optimizer that was given `model.named_parameters()`, or "
            "take the checkpoint's own model"
        )
    layout = min(same_sizes, key=lambda candidate: len(_faults(model, groups, shapes, candidate, idle)))
    faults = _faults(model, groups, shapes, layout, idle)
    return (
        f"optimizer state, matched by position ({layout.label}): expected a state for each of "
        f"{len(trainable_parameters(model))} trainable parameters, found {len(faults)} faults: "
        f"{_some(faults)}"
    )


def _some(items: Sequence[str]) -> str:
    more = f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more
