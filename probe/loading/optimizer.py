"""The saved optimizer: its moments put beside the right parameters, or an error that says why they cannot be.

A moment that belongs to another parameter gives a wrong step without any other sign. So a state is matched by
name where the file has names, and otherwise only by a layout that fits in every count and every shape.
"""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probe.config import CheckpointConfig
from probe.errors import OptimizerStateError
from probe.limits import OPTIMIZER_BYTES, OPTIMIZER_BYTES_PER_PARAMETER
from probe.loading.checkpoint import TRAINER_STATE, CheckpointFiles, read_trainer_state
from probe.loading.foreign import check_torch_file, some
from probe.loading.matching import idle_parameters, match_parameters
from probe.loading.model import trainable_parameters
from probe.loading.moments import Moments, SavedKey, moment_shape, read_moments
from probe.text import shown

logger = logging.getLogger(__name__)

Rule = Literal["adam", "adamw"]

_SUPPORTED = "torch's Adam and AdamW, and bitsandbytes' 8-bit and 32-bit Adam and AdamW"
_ADAM_BETAS = 2
_HALF = (torch.bfloat16, torch.float16)
_ADAM_STATE = {"exp_avg", "exp_avg_sq", "step"}
_WRAPPERS = ("optimizer", "optimizer_state_dict", "optim_state_dict")


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
    file, trainer_state = _files(files_or_path)
    payload, notes = _read_state_dict(file, _largest_file(model))
    groups, states = _well_formed(file, payload)
    family = _family(file, groups, states)
    groups = [{**group, **_plain_numbers(file, index, group)} for index, group in enumerate(groups)]
    _check_settings(file, groups)
    trainable = trainable_parameters(model)
    # a pass through the model, only where there is something to explain
    idle = (
        idle_parameters(model) if len(states) < len(trainable) and _is_language_model(model) else frozenset()
    )
    matching = match_parameters(
        model, groups, {key: moment_shape(key, state) for key, state in states.items()}, idle
    )
    notes += _freeze_idle(trainable, idle - set(matching.names.values()))
    rule, rule_notes = _rule(file, groups, family, config)
    # Groups of parameters that were never trained (frozen ones) have nothing to step.
    members = [[matching.names[key] for key in group["params"] if key in states] for group in groups]
    groups = [group for group, names in zip(groups, members, strict=True) if names]
    members = [names for names in members if names]
    moments = read_moments(
        {matching.names[key]: state for key, state in states.items()},
        amsgrad={
            name: bool(group.get("amsgrad"))
            for group, names in zip(groups, members, strict=True)
            for name in names
        },
    )
    parameters = trainable_parameters(model)
    rates, reference, rate_notes = _learning_rates(file, groups, learning_rate, trainer_state)
    optimizer = _build(rule, groups, members, parameters, rates)
    notes += matching.notes + rule_notes + rate_notes + _place(optimizer, moments, parameters)
    if family == "bitsandbytes":
        notes += (
            "the moments are bitsandbytes' (8-bit ones dequantised); the step is torch's AdamW from them",
        )
    rounded = _rounded_types(moments, parameters)
    notes += _rounding_notes(rounded, family, parameters)
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


def _rounded_types(
    moments: Mapping[str, Moments], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.dtype]:
    """The parameters that the training has in 16 bits: moments of such a type, and no weight with more digits."""
    return {
        name: moment.exp_avg.dtype
        for name, moment in moments.items()
        if moment.exp_avg.dtype in _HALF and _fits(parameters[name], moment.exp_avg.dtype)
    }


def _fits(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether every value is a number of `dtype`."""
    values = parameter.detach()
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _rounding_notes(
    rounded: Mapping[str, torch.dtype], family: str, parameters: Mapping[str, nn.Parameter]
) -> tuple[str, ...]:
    if rounded:
        types = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in rounded.values()}))
        return (
            f"the training keeps weights and moments of {len(rounded)} parameters in {types}, which rounds most of a "
            "small step away: the change is measured after the rounded step, and predicted for the exact one",
        )
    if family == "bitsandbytes" and all(
        _fits(parameter, torch.bfloat16) for parameter in parameters.values()
    ):
        return (
            "the weights are saved in bfloat16; whether the training rounds its steps to it is not in the moments of "
            "bitsandbytes, and the step is taken without rounding",
        )
    return ()


def _files(files_or_path: CheckpointFiles | str | Path) -> tuple[Path, Path | None]:
    """The optimizer's file, and trainer_state.json where there is one."""
    if isinstance(files_or_path, CheckpointFiles):
        return files_or_path.optimizer_file, files_or_path.trainer_state_file
    file = Path(files_or_path)
    beside = file.parent / TRAINER_STATE
    return file, beside if beside.is_file() else None


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


def _largest_file(model: nn.Module) -> int:
    """Most bytes that a file with the optimizer of `model` can rightly have; the model's weights may be in it too."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return OPTIMIZER_BYTES + OPTIMIZER_BYTES_PER_PARAMETER * count


def _read_state_dict(file: Path, most: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The `state_dict` in `file`, read without running any code in it."""
    if file.exists():
        check_torch_file(file, most)
    try:
        with warnings.catch_warnings():
            # torch warns of unusual pickle protocols; what matters is whether the content can be read.
            warnings.simplefilter("ignore")
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OptimizerStateError(f"{file}: expected the optimizer's state, found no such file") from error
    except pickle.UnpicklingError as error:
        # torch's message is a page of advice; what it stumbled over stands after these words.
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        raise OptimizerStateError(
            f"{file}: expected only tensors and plain values, found a pickle that needs more, which could "
            f"run code ({reason[:120]}); load it where you trust it and save `optimizer.state_dict()` again "
            "with torch.save"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise OptimizerStateError(
            f"{file}: expected a file that torch.save wrote, found {reason or 'nothing'}"
        ) from error
    notes: tuple[str, ...] = ()
    for key in _WRAPPERS:
        if isinstance(payload, dict) and "param_groups" not in payload and isinstance(payload.get(key), dict):
            payload, notes = payload[key], (f"the state was read from the entry {key!r} of {file.name}",)
    if not isinstance(payload, dict) or not {"state", "param_groups"} <= payload.keys():
        kind = type(payload).__name__
        found = f"the keys {sorted(map(str, payload))[:10]}" if isinstance(payload, dict) else kind
        raise OptimizerStateError(
            f"{file}: expected an optimizer's state_dict (state, param_groups), found {found}"
        )
    return payload, notes


def _well_formed(
    file: Path, payload: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[SavedKey, dict[str, Any]]]:
    """The groups with parameters and the states with content, in the containers that an optimizer writes."""
    saved, states = payload["param_groups"], payload["state"]
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        raise _malformed(file, "a list of mappings in param_groups", saved)
    if not isinstance(states, dict) or not all(isinstance(state, Mapping) for state in states.values()):
        raise _malformed(file, "a mapping of mappings in state", states)
    groups = []
    for index, group in enumerate(saved):
        keys = group.get("params")
        if not isinstance(keys, list) or not all(type(key) in (int, str) for key in keys):
            raise _malformed(file, f"a list of positions or names in params of group {index}", keys)
        names = group.get("param_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise _malformed(file, f"a list of names in param_names of group {index}", names)
        if keys:
            groups.append(group)
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise _malformed(
            file, "every parameter in one group", f"{len(keys) - len(set(keys))} in more than one"
        )
    filled = {key: dict(state) for key, state in states.items() if state}
    if not filled:
        raise OptimizerStateError(
            f"{file}: expected the moments of an optimizer that has taken steps, found an empty state; take "
            "a later checkpoint"
        )
    return groups, filled


def _plain_numbers(file: Path, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a group that are numbers, as such: a learning rate may be saved as a tensor."""
    plain: dict[str, Any] = {}
    for name in ("lr", "eps", "weight_decay", "initial_lr"):
        if name in group:
            plain[name] = _number(file, f"{name} of group {index}", group[name])
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (list, tuple)):
            raise _malformed(file, f"numbers in betas of group {index}", betas)
        plain["betas"] = tuple(_number(file, f"betas of group {index}", beta) for beta in betas)
    for name in ("amsgrad", "maximize", "decoupled_weight_decay"):
        if name in group and not isinstance(group[name], (bool, type(None))):
            raise _malformed(file, f"true or false in {name} of group {index}", group[name])
    return plain


def _number(file: Path, what: str, value: Any) -> float:
    """A number, which may be saved as a tensor of one value."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _malformed(file, f"a number in {what}", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _malformed(file: Path, expected: str, found: Any) -> OptimizerStateError:
    what = f"{type(found).__name__} {shown(found, 40)}" if not isinstance(found, Tensor) else "a tensor"
    return OptimizerStateError(
        f"{file}: expected {expected}, found {' '.join(what.split())}; save `optimizer.state_dict()` again"
    )


def _family(
    file: Path, groups: list[dict[str, Any]], states: Mapping[SavedKey, dict[str, Any]]
) -> Literal["torch", "bitsandbytes"]:
    """Which library's Adam wrote the state; anything that is no Adam is refused."""
    keys = set().union(*(_flat_keys(state) for state in states.values()))
    options = {key for group in groups for key in group}
    found = f"state keys {_listed(keys)}, group keys {_listed(options - {'params', 'param_names'})}"
    refusal = f"{file}: expected the state of {_SUPPORTED}, found {{}} ({found})"
    if {"lr", "betas", "eps", "weight_decay"} - options:
        raise OptimizerStateError(refusal.format("another optimizer"))
    if "state1" in keys:
        _refuse_foreign_bitsandbytes(refusal, keys, groups)
        return "bitsandbytes"
    if not keys >= _ADAM_STATE or keys - _ADAM_STATE - {"max_exp_avg_sq"}:
        raise OptimizerStateError(refusal.format("another optimizer"))
    # RAdam, and other relatives, have the same moments but not Adam's `amsgrad` option.
    if "amsgrad" not in options or "momentum_decay" in options:
        raise OptimizerStateError(refusal.format("a relative of Adam with another step"))
    return "torch"


def _refuse_foreign_bitsandbytes(refusal: str, keys: set[str], groups: list[dict[str, Any]]) -> None:
    if "state2" not in keys:
        raise OptimizerStateError(refusal.format("a one-moment bitsandbytes optimizer such as Lion or SGD"))
    if "unorm_vec" in keys:
        raise OptimizerStateError(refusal.format("bitsandbytes' LAMB or an update-norm limit"))
    if "gnorm_vec" in keys:
        raise OptimizerStateError(refusal.format("bitsandbytes' percentile clipping"))
    if keys & {"max1", "max2", "new_max1", "new_max2"}:
        raise OptimizerStateError(refusal.format("bitsandbytes' older 8-bit states, which are not blockwise"))
    if any(
        (isinstance(group["betas"], (list, tuple)) and len(group["betas"]) > _ADAM_BETAS)
        or group.get("alpha")
        for group in groups
    ):
        raise OptimizerStateError(refusal.format("bitsandbytes' AdEMAMix"))


def _listed(keys: set[Any]) -> str:
    names = sorted(shown(key, 40) for key in keys)
    return f"[{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}]"


def _flat_keys(state: Mapping[str, Any]) -> set[str]:
    """The keys of one parameter's state, those in a nested mapping (bitsandbytes) included."""
    nested = [_flat_keys(value) if isinstance(value, Mapping) else {key} for key, value in state.items()]
    return set().union(*nested)


def _check_settings(file: Path, groups: list[dict[str, Any]]) -> None:
    """Refuse impossible hyper-parameters; torch checks only an optimizer's defaults, not its groups."""
    for index, group in enumerate(groups):
        betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
        fine = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        if not (fine and 0 <= eps < math.inf and 0 <= decay < math.inf):
            raise OptimizerStateError(
                f"{file}: expected two betas in [0, 1), and eps and weight_decay of at least 0, found "
                f"{betas}, {eps} and {decay} in group {index}"
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


def _learning_rates(
    file: Path, groups: list[dict[str, Any]], override: float | None, trainer_state: Path | None
) -> tuple[list[float], int, tuple[str, ...]]:
    """The learning rate of every group, the reference group, and notes."""
    saved = [float(group["lr"]) for group in groups]
    if not all(math.isfinite(rate) and rate >= 0 for rate in saved):
        raise OptimizerStateError(f"{file}: expected finite learning rates of at least 0, found {saved}")
    reference = next((index for index, rate in enumerate(saved) if rate > 0), None)
    if reference is None:
        if override is not None:
            note = f"the saved learning rate is 0; {override:g} is used for all groups"
            return [override] * len(saved), 0, (note,)
        return _earlier_rates(file, groups, trainer_state)
    if override is None:
        return saved, reference, ()
    ratio = override / saved[reference]
    rates = [rate * ratio for rate in saved]
    rates[reference] = override
    note = f"learning rate {override:g} instead of the saved {saved[reference]:g}"
    return rates, reference, (note,) if override != saved[reference] else ()


def _earlier_rates(
    file: Path, groups: list[dict[str, Any]], trainer_state: Path | None
) -> tuple[list[float], int, tuple[str, ...]]:
    """What to step with where the schedule is at 0: the last rate above 0 in the trainer's log, else the initial one.

    Raises:
        OptimizerStateError: neither is known.
    """
    initial = [_positive(group.get("initial_lr")) for group in groups]
    reference = next((index for index, rate in enumerate(initial) if rate is not None), 0)
    first, logged = initial[reference], _last_logged_rate(trainer_state)
    rate, name = (logged, "the last one logged above 0") if logged is not None else (first, "initial_lr")
    if rate is None:
        raise OptimizerStateError(
            f"{file}: expected a learning rate above 0, found 0 in every group (the schedule had ended) and no earlier "
            "one; set probe_rework.learning_rate"
        )
    rates = [rate if own is None or first is None else rate * own / first for own in initial]
    note = f"the saved learning rate is 0 (the schedule had ended): the step is taken at {rate:g}, {name}"
    return rates, reference, (note,)


def _last_logged_rate(trainer_state: Path | None) -> float | None:
    """The last learning rate above 0 in the trainer's log."""
    if trainer_state is None:
        return None
    entries = read_trainer_state(trainer_state).get("log_history") or []
    rates = [
        _positive(entry.get("learning_rate"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]
    return next((rate for rate in reversed(rates) if rate is not None), None)


def _positive(value: Any) -> float | None:
    """A finite number above 0, or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) and value > 0 else None


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
