"""When an update of the policy begins and ends: hooks on the steps of the optimizers that make it together."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from probe.live.optimizers import moved_parameters
from probe.live.say import say
from probe.live.updates import ProbedUpdates

Method = TypeVar("Method", bound=Callable[..., Any])


def _out_of_dynamo(method: Method) -> Method:
    """A hook that a compiled optimizer step calls as it is: compiling a probe takes minutes and breaks it."""
    disabled: Any = None

    @functools.wraps(method)
    def call(*args: Any, **kw: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:  # nothing is compiled here, and loading it takes seconds
                return method(*args, **kw)
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kw)

    return cast(Method, call)


class StepHooks:
    """Tells the probe when an update begins and ends.

    It begins with the first step of one of the optimizers, and ends when every one has taken its step, or when one
    takes a second.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], updates: ProbedUpdates) -> None:
        """Nothing is registered yet.

        Args:
            optimizers: those that make an update together.
            updates: what is told.
        """
        self._optimizers, self._updates = optimizers, updates
        self._handles: list[Any] = []
        self._waiting: set[int] = set()
        self._in_update = self._in_hook = False
        self._foreign: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    def register(self) -> None:
        """Hooks on the watched optimizers, and one that sees the steps of others."""
        own = [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._on_pre_step),
                optimizer.register_step_post_hook(self._on_post_step),
            )
        ]
        # first in the list, last in the dictionary of hooks: see `detach`
        self._handles = [*own, register_optimizer_step_post_hook(self._on_any_step)]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            # while torch goes through an optimizer's hooks, only the last one can go; the others do nothing any more
            if not self._in_hook or (hooks and next(reversed(hooks)) == handle.id):
                handle.remove()
        left, self._handles = bool(self._handles), []
        self._updates.forget()
        if left and not self._updates.company.alone:  # the others meet at the next update
            for optimizer in self._optimizers:
                if self._updates.early:
                    optimizer.register_step_post_hook(self._updates.company.leave)
                else:
                    optimizer.register_step_pre_hook(self._updates.company.leave)

    def detach_after_error(self) -> None:
        """Remove the hooks where an error has ended the probe."""
        if self._updates.error is not None:
            self.detach()

    @_out_of_dynamo
    def _on_pre_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step of an optimizer: an update begins, unless another optimizer has begun it."""
        with self._hook():
            if self._in_update and id(optimizer) not in self._waiting:
                # a second step of one optimizer: the others take no part in this update
                self._end(late=True)
            if not self._in_update and self._goes_on:
                self._in_update, self._waiting = True, {id(one) for one in self._optimizers}
                self._updates.begin()
            self._waiting.discard(id(optimizer))

    @_out_of_dynamo
    def _on_post_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step: the update is over when every optimizer has had its turn."""
        with self._hook():
            if self._in_update and not self._waiting:
                self._end(late=False)
                if self._goes_on:
                    self._updates.between()

    @_out_of_dynamo
    def _on_any_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step of any optimizer: one that is not watched may have taken a watched one's place."""
        if (
            not self.active
            or self._in_update
            or id(optimizer) in self._foreign
            or optimizer in self._optimizers
        ):
            return
        watched = {id(p) for p in self._updates.probe.parameters.values()}
        if watched.isdisjoint(moved_parameters([optimizer])):
            return
        self._foreign.add(id(optimizer))
        say(
            f"an optimizer that is not watched ({type(optimizer).__name__}) has moved watched parameters: was it "
            "replaced after the probe was attached? Its steps are not probed; attach the probe to it",
            warn=True,
        )

    def _end(self, late: bool) -> None:
        self._in_update = False
        if self._goes_on:
            self._updates.end(late)

    @property
    def _goes_on(self) -> bool:
        """Whether neither the user nor an error has ended the probe, in this very hook perhaps."""
        return self.active and self._updates.error is None

    @contextmanager
    def _hook(self) -> Iterator[None]:
        """Inside of an optimizer's hook."""
        self._in_hook = True
        try:
            yield
        finally:
            self.detach_after_error()
            self._in_hook = False


def are_watched(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether one of the optimizers has the hooks of a watch already."""
    hooks = [hook for optimizer in optimizers for hook in optimizer._optimizer_step_pre_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), StepHooks) for hook in hooks)
