"""The saved optimizer: its moments put beside the right parameters, or an error that says why they cannot be.

A moment that belongs to another parameter gives a wrong step without any other sign. So a state is matched by
name where the file has names, and otherwise only by a layout that fits in every count and every shape.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import OptimizerStateError
from probe.loading.checkpoint import CheckpointFiles
from probe.loading.foreign import some
from probe.loading.learning_rates import learning_rates
from probe.loading.matching import idle_parameters, match_parameters
from probe.loading.moments import Moments, SavedKey, moment_shape, read_moments
from probe.loading.optimizer_file import (
    check_optimizer_settings,
    largest_file,
    optimizer_family,
    optimizer_files,
    plain_numbers,
    read_state_dict,
    well_formed,
)
from probe.loading.rounded import rounded_types, rounding_notes
from probe.parameters import trainable_parameters

logger = logging.getLogger(__name__)

Rule = Literal["adam", "adamw"]


@dataclass(frozen=True)
class LoadedOptimizer:
    """An optimizer at the saved state.

    Attributes:
        optimizer: torch's Adam or AdamW over the model's own parameters, in the file's groups.
        rule: `adam` (decay inside the gradient) or `adamw` (decoupled decay).
        reference_group: index of the group whose learning rate stands for the optimizer's.
        saved_learning_rate: that group's learning rate in the file.
        step: number of steps taken so far (the largest over the parameters).
        notes: what was decided or changed while loading, for the report.
        fused: whether the training's optimizer was torch's fused one, which rounds its results alone.
        rounded: the 16-bit type of each parameter whose weights and moments the training keeps in it.
        schedule_at_zero: whether the saved learning rate is 0, and that of an earlier step stands in for it.
    """

    optimizer: torch.optim.Optimizer
    rule: Rule
    reference_group: int
    saved_learning_rate: float
    step: int
    notes: tuple[str, ...]
    rounded: Mapping[str, torch.dtype] = field(default_factory=dict)
    fused: bool = False
    schedule_at_zero: bool = False

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step: the optimizer's own, in the reference group."""
        return float(self.optimizer.param_groups[self.reference_group]["lr"])


def load_optimizer(
    model: nn.Module,
    files_or_path: CheckpointFiles | str | Path,
    config: CheckpointConfig,
    learning_rate: float | None = None,
) -> LoadedOptimizer:
    """Rebuild the optimizer of a checkpoint over the parameters of `model`.

    Moments are kept in the parameters' type (float32 or better); the file is only read, and no random number
    is drawn. bitsandbytes' states are dequantised; both its Adam and its AdamW decay the weights decoupled,
    so both become torch's AdamW. (bitsandbytes' CUDA kernels shrink the weight after the Adam update instead
    of before it, which changes the update by the factor 1 - lr * weight_decay.)

    Args:
        model: the policy; every trainable parameter must have a state, unless texts do not reach it: then it is frozen,
            as a training's optimizer skips what never has a gradient.
        files_or_path: the checkpoint's parts, or the file with the optimizer's `state_dict`.
        config: the `checkpoint` section; `optimizer` tells Adam from AdamW where the file does not.
        learning_rate: learning rate of the reference group; those of other groups keep their ratio to it. By
            default the file's.

    Returns:
        The optimizer, with what was found and decided.

    Raises:
        OptimizerStateError: the file cannot be read safely, is of another optimizer, does not fit the model,
            has non-finite moments, or has a learning rate of 0, none is given and no earlier one is known.
    """
    file, trainer_state = optimizer_files(files_or_path)
    saved = _read(file, largest_file(model))
    names, match_notes = _match(model, saved)
    rule, rule_notes = _rule(file, saved.groups, saved.family, config)
    groups, members = _groups_to_step(saved, names)
    moments = read_moments(
        {names[key]: state for key, state in saved.states.items()},
        amsgrad={
            name: bool(g.get("amsgrad")) for g, own in zip(groups, members, strict=True) for name in own
        },
    )
    parameters = trainable_parameters(model)
    rates, reference, rate_notes = learning_rates(file, groups, learning_rate, trainer_state)
    optimizer = _build(rule, groups, members, parameters, rates)
    notes = saved.notes + match_notes + rule_notes + rate_notes + _place(optimizer, moments, parameters)
    rounded = rounded_types(moments, parameters)
    notes += _family_notes(saved.family) + rounding_notes(rounded, saved.family, parameters)
    for note in notes:
        logger.info("optimizer: %s", note)
    return LoadedOptimizer(
        optimizer=optimizer,
        rule=rule,
        reference_group=reference,
        saved_learning_rate=float(groups[reference]["lr"]),
        step=max(moment.step for moment in moments.values()),
        notes=notes,
        rounded=rounded,
        fused=all(group.get("fused") is True for group in groups),
        schedule_at_zero=learning_rate is None and not any(float(group["lr"]) for group in groups),
    )


@dataclass(frozen=True)
class _Saved:
    """What a file holds: groups and states of an Adam, whose library wrote them, and notes on the reading."""

    groups: list[dict[str, Any]]
    states: dict[SavedKey, dict[str, Any]]
    family: str
    notes: tuple[str, ...]


def _read(file: Path, most: int) -> _Saved:
    """The content of a file of at most `most` bytes, checked.

    Raises:
        OptimizerStateError: it cannot be read safely, or is of another optimizer.
    """
    payload, notes = read_state_dict(file, most)
    groups, states = well_formed(file, payload)
    family = optimizer_family(file, groups, states)
    groups = [{**group, **plain_numbers(file, index, group)} for index, group in enumerate(groups)]
    check_optimizer_settings(file, groups)
    return _Saved(groups, states, family, notes)


def _match(model: nn.Module, saved: _Saved) -> tuple[Mapping[SavedKey, str], tuple[str, ...]]:
    """The parameter of every state, by its key in the file; freezes parameters that no text reaches. And notes.

    Raises:
        OptimizerStateError: the states do not fit the model.
    """
    trainable, states = trainable_parameters(model), saved.states
    # a pass through the model, only where there is something to explain
    explain = len(states) < len(trainable) and _is_language_model(model)
    idle = idle_parameters(model) if explain else frozenset()
    shapes = {key: moment_shape(key, state) for key, state in states.items()}
    matching = match_parameters(model, saved.groups, shapes, idle)
    notes = _freeze_idle(trainable, idle - set(matching.names.values()))
    return matching.names, notes + matching.notes


def _groups_to_step(
    saved: _Saved, names: Mapping[SavedKey, str]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The groups and their parameters; groups of those that were never trained (frozen ones) have nothing to step."""
    members = [[names[key] for key in group["params"] if key in saved.states] for group in saved.groups]
    found = [(group, own) for group, own in zip(saved.groups, members, strict=True) if own]
    return [group for group, _ in found], [own for _, own in found]


def _family_notes(family: str) -> tuple[str, ...]:
    """That another library's moments are stepped by torch."""
    if family != "bitsandbytes":
        return ()
    return ("the moments are bitsandbytes' (8-bit ones dequantised); the step is torch's AdamW from them",)


def _is_language_model(model: Any) -> bool:
    return hasattr(model, "get_input_embeddings")


def _freeze_idle(parameters: Mapping[str, nn.Parameter], idle: frozenset[str]) -> tuple[str, ...]:
    """Leave out what the training's optimizer leaves out: it takes no step where there never is a gradient."""
    for name in idle:
        parameters[name].requires_grad_(False)
    if not idle:
        return ()
    return (
        f"{len(idle)} trainable parameters never had a gradient, have no state, and stay as they are "
        f"({some(sorted(idle))})",
    )


def _rule(
    file: Path, groups: list[dict[str, Any]], family: str, config: CheckpointConfig
) -> tuple[Rule, tuple[str, ...]]:
    """Adam or AdamW: from the file where it says, from the configuration where it does not."""
    said = {bool(group["decoupled_weight_decay"]) for group in groups if "decoupled_weight_decay" in group}
    if family == "bitsandbytes":
        said = {True}
    if len(said) > 1:
        raise OptimizerStateError(f"{file}: expected one rule for all groups, found Adam and AdamW mixed")
    decays = any(group["weight_decay"] for group in groups)
    if said:
        rule: Rule = "adamw" if said.pop() else "adam"
        if config.optimizer not in ("auto", rule) and decays:
            raise OptimizerStateError(
                f"checkpoint.optimizer: expected {rule} (or auto), which is how {file} decays the weights, "
                f"found {config.optimizer}"
            )
        return rule, ()
    if config.optimizer != "auto":
        return config.optimizer, ()
    # Without weight decay the two are the same.
    guess = "the file does not say whose weight decay it is: AdamW's is assumed (checkpoint.optimizer)"
    return "adamw", (guess,) if decays else ()


def _build(
    rule: Rule,
    groups: list[dict[str, Any]],
    members: list[list[str]],
    parameters: Mapping[str, nn.Parameter],
    rates: list[float],
) -> torch.optim.Optimizer:
    """The optimizer without its state; one tensor at a time, so that steps do not depend on grouping."""
    settings = [
        {
            "params": [parameters[name] for name in names],
            "lr": rate,
            "betas": tuple(float(beta) for beta in group["betas"]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "amsgrad": bool(group.get("amsgrad", False)),
            "maximize": bool(group.get("maximize", False)),
        }
        for group, names, rate in zip(groups, members, rates, strict=True)
    ]
    kind = torch.optim.Adam if rule == "adam" else torch.optim.AdamW
    return kind(settings, foreach=False, capturable=False)


def _place(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Moments], parameters: Mapping[str, nn.Parameter]
) -> tuple[str, ...]:
    """Put the moments into the optimizer, on the parameters' devices and in their type; returns notes."""
    found = set()
    for name, moment in moments.items():
        parameter = parameters[name]
        tensors = {
            "exp_avg": moment.exp_avg,
            "exp_avg_sq": moment.exp_avg_sq,
            "max_exp_avg_sq": moment.max_exp_avg_sq,
        }
        found |= {tensor.dtype for tensor in tensors.values() if tensor is not None} - {parameter.dtype}
        state: dict[str, Tensor] = {"step": torch.tensor(float(moment.step), dtype=torch.float32)}
        for key, tensor in tensors.items():
            if tensor is not None:
                # dense: steps write into it, and a saved view may show one value many times
                state[key] = tensor.to(device=parameter.device, dtype=parameter.dtype).contiguous()
        optimizer.state[parameter] = state
    notes = [
        f"moments saved as {str(dtype).removeprefix('torch.')} are kept in the weights' type"
        for dtype in found
    ]
    steps = {moment.step for moment in moments.values()}
    if len(steps) > 1:
        notes.append(f"parameters have taken between {min(steps)} and {max(steps)} steps")
    return tuple(sorted(notes))
