"""Whether parameters move outside of `optimizer.step`: fused into the backward pass, LOMO, layerwise optimizers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Parameters = Mapping[str, nn.Parameter]


class OutsideWrites:
    """Counts how often each parameter is written to, between the steps and in them."""

    def __init__(self, parameters: Parameters) -> None:
        """Args: `parameters` by name, none of which has moved yet."""
        self._seen = _versions(parameters)
        self._before_step: set[int] = set()

    def step_begins(self, parameters: Parameters) -> None:
        """Note what has been written to since `note`."""
        now = _versions(parameters)
        self._before_step = {i for i, version in now.items() if self._seen.get(i, version) != version}

    def note(self, parameters: Parameters) -> None:
        """What was written to until now is known."""
        self._seen = _versions(parameters)

    def step_left_alone(self, parameters: Parameters) -> bool:
        """Whether a parameter was written to before the step that ends now, and not in it."""
        now = _versions(parameters)
        return any(now.get(i) == self._seen.get(i) for i in self._before_step)


def _versions(parameters: Parameters) -> dict[int, int]:
    return {id(p): p._version for p in parameters.values() if not p.is_inference()}
