"""DeepSpeed's ZeRO-1 and ZeRO-2 optimizers: weights are whole on every rank, and `engine.step()` updates them.

Such an optimizer is none of torch's: its groups hold flat parts of float32 copies, and one `step` of it is a step of
the optimizer inside for every group, and then an exchange of the parts. It is known by its classes' names, so that
DeepSpeed need not be there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from probe.errors.exceptions import ConfigError

ENGINES = ("DeepSpeedEngine", "DeepSpeedHybridEngine")
OPTIMIZERS = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer")
GROUPS = ("bit16_groups", "bf16_groups", "fp16_groups")
"""Attributes that hold the model's own parameters, group by group."""


def is_engine(model: Any) -> bool:
    """Whether something is DeepSpeed's wrapper of a model."""
    return _is_one_of(model, ENGINES)


def is_zero(optimizer: Any) -> bool:
    """Whether something is an optimizer of DeepSpeed's that works on copies of whole weights."""
    return _is_one_of(optimizer, OPTIMIZERS)


def _is_one_of(thing: Any, names: tuple[str, ...]) -> bool:
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == "deepspeed"
        for kind in type(thing).__mro__
    )


class Group(MutableMapping[str, Any]):
    """A group of ZeRO's with the model's own parameters in the place of its flat parts; what is set is set in it."""

    def __init__(self, own: MutableMapping[str, Any], parameters: list[nn.Parameter]) -> None:
        """Args: `own`, the group of the optimizer inside, and the `parameters` that it moves."""
        self._own, self._parameters = own, parameters

    def __getitem__(self, key: str) -> Any:
        return self._parameters if key == "params" else self._own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            raise KeyError(key)
        self._own[key] = value

    def __delitem__(self, key: str) -> None:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class ZeroOptimizer(torch.optim.Optimizer):
    """One of DeepSpeed's optimizers with torch's hooks around its step.

    From the first hook on, this step stands in the place of its own, which it calls, until no hook is left.
    """

    def __init__(self, zero: Any) -> None:
        """Nothing is changed before a hook is registered; see `zero_optimizer`."""
        groups = next((getattr(zero, name) for name in GROUPS if hasattr(zero, name)), None)
        if groups is None or len(groups) != len(zero.param_groups):
            raise ConfigError(
                f"optimizer: expected {type(zero).__name__} to hold the model's parameters by its groups, as those of "
                "DeepSpeed's ZeRO-1 and ZeRO-2 do, found none; train with ZeRO-1 or ZeRO-2, or without DeepSpeed"
            )
        self._known, self._groups = weakref.ref(zero), [list(group) for group in groups]
        self._own_step: Callable[..., Any] | None = None
        super().__init__([torch.zeros(1)], {})  # torch's constructor wants some tensor; the groups are ZeRO's

    @property
    def _zero(self) -> Any:
        """DeepSpeed's own, which this one does not keep alive."""
        zero = self._known()
        if zero is None:
            raise RuntimeError("expected the optimizer of DeepSpeed to be there, found it gone")
        return zero

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        """The groups as they are now."""
        both = zip(self._zero.param_groups, self._groups, strict=True)
        return [Group(own, parameters) for own, parameters in both]

    @param_groups.setter
    def param_groups(self, value: list[Any]) -> None:
        """What torch's constructor makes is no group of ZeRO's."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """ZeRO's own step, between the hooks."""
        assert self._own_step is not None, "it is called in the place of ZeRO's step"
        return self._own_step(*args, **kwargs)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call something before every step."""
        self._take_the_place()
        return super().register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call something after every step."""
        self._take_the_place()
        return super().register_step_post_hook(hook)

    def _take_the_place(self) -> None:
        if self._own_step is None:
            self._own_step = self._zero.step
            self._zero.step = self._step_or_leave

    def _step_or_leave(self, *args: Any, **kwargs: Any) -> Any:
        """A step; the last one that goes through here where no hook is left."""
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return self.step(*args, **kwargs)
        own, zero = self._own_step, self._zero
        assert own is not None
        # where somebody has put a step around this one it stays, and does nothing
        if vars(zero).get("step") == self._step_or_leave:
            self._own_step = None
            del zero.step
            if zero.step != own:  # somebody's before this one's
                zero.step = own
        return own(*args, **kwargs)


_KNOWN: WeakKeyDictionary[Any, ZeroOptimizer] = WeakKeyDictionary()


def zero_optimizer(zero: Any) -> ZeroOptimizer:
    """One of DeepSpeed's optimizers as one of torch's; always the same for the same.

    Args:
        zero: `engine.optimizer`, for which `is_zero`.

    Raises:
        ConfigError: its groups cannot be read.
    """
    if zero not in _KNOWN:
        _KNOWN[zero] = ZeroOptimizer(zero)
    return _KNOWN[zero]
