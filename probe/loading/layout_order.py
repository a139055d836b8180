"""Orders of parameters in which trainers number them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from probe.errors.exceptions import OptimizerStateError
from probe.loading.moments import SavedKey
from probe.parameters import trainable_parameters

Group = Mapping[str, Any]
Shape = tuple[int, ...]


# Names that transformers' Trainer leaves out of weight decay, and those of its versions before 4.50.
_NO_DECAY_PATTERNS = (
    (
        "decay / no-decay groups",
        [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"],
    ),
    ("decay / no-decay groups by bias only", [r"bias"]),
)


@dataclass(frozen=True)
class _Layout:
    """One way of grouping parameters; `decays`: whether each group has weight decay (None: either)."""

    label: str
    groups: tuple[tuple[str, ...], ...]
    decays: tuple[bool | None, ...]


def match_by_position(
    model: nn.Module, groups: Sequence[Group], shapes: Mapping[SavedKey, Shape], idle: frozenset[str]
) -> Matching:
    """Match a state that numbers its parameters, by the one order of parameters that fits.

    Raises:
        OptimizerStateError: no order fits, or several that differ.
    """
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
        f"{some_of(faults)}"
    )


_LISTED = 10


@dataclass(frozen=True)
class Matching:
    """The parameter of every saved state.

    Attributes:
        names: saved key (a position or a name) to the name of the trainable parameter.
        notes: how they were matched, where that is not by name.
    """

    names: Mapping[SavedKey, str]
    notes: tuple[str, ...]


def some_of(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f"; and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more
