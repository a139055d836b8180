"""Which of several adapters is the policy: the one that was active when the probe was attached."""

from __future__ import annotations

from typing import Any

from torch import nn

from probe.errors.exceptions import ConfigError
from probe.live.say import say

_CHOICES = ("_active_adapter", "_disable_adapters", "active_adapter")
"""Attributes of peft's modules that say which adapters a forward uses."""


class ActiveAdapters:
    """The choice of adapters in a peft model at one time.

    A training may switch to another one in between (a critic, a reference), and take its step there.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note the choice.

        Args:
            model: with adapters of peft's or without.
        """
        self._model = model
        self._chosen: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in model.modules():
            own = vars(module)
            choice = {name: _copied(own[name]) for name in _CHOICES if name in own}
            if choice:
                self._chosen.append((module, choice))
        self._said = False

    def use(self) -> None:
        """Choose as it was then. Call it where attributes of modules are put back afterwards.

        Raises:
            ConfigError: an adapter of then is gone.
        """
        config = getattr(self._model, "peft_config", None)
        names = sorted({name for _, choice in self._chosen for name in _names(choice)})
        gone = [name for name in names if isinstance(config, dict) and name not in config]
        if gone:
            raise ConfigError(
                f"model: expected the adapter {gone[0]!r}, which was active when the probe was attached, found it "
                "deleted; attach the probe again, with the trained adapter active"
            )
        other = False
        for module, choice in self._chosen:
            own = vars(module)
            for name, value in choice.items():
                if own.get(name) != value:
                    other = True
                    own[name] = _copied(value)
        if other and not self._said:
            self._said = True
            say(
                f"another adapter is active at this step than when the probe was attached; the policy is the "
                f"one of then ({', '.join(names)})",
                warn=True,
            )


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _names(choice: dict[str, Any]) -> list[str]:
    """Names of adapters in a module's attributes."""
    names: list[str] = []
    for name in ("_active_adapter", "active_adapter"):
        value = choice.get(name, [])
        names += [value] if isinstance(value, str) else list(value or [])
    return names
