"""The host's training does not notice the probe: whatever a probe touches is bitwise as before when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import NumericalError
from probe.live.held_model import HeldModules, HeldTensors
from probe.live.interrupts import HeldInterrupts
from probe.shards import resharded
from probe.snapshot import float32_precision, held_rng, put_back_by

_LISTED = 5


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the policy in evaluation mode, in its own precision without autocast, and leave no trace of it.

    Random streams (Python, NumPy, torch, CUDA), train and eval flags of every module, the parameters and buffers that
    stand in each module, their `.grad` and `requires_grad`, the `forward` that accelerate has wrapped, the class of
    4-bit layers, TF32, grad mode and autocast settings are put back, also after an exception, and also where Ctrl-C
    strikes inside of the code that puts them back. Compared are the objects that stand in the model, by every path.
    Passes at other values use `probe.snapshot.standing_in`.

    Args:
        model: the policy.

    Raises:
        NumericalError: something wrote to a parameter, a gradient or a large buffer.
    """
    resharded(model)  # what a forward has brought together is no part of what is held
    held = _Held(model)
    try:
        with put_back_by(held.put_back):
            held.prepare()
            yield
    finally:
        held.complain()


class _Held:
    """What training's process and model were before a probe, and how that is put back."""

    def __init__(self, model: nn.Module) -> None:
        """Only read: an interrupt in here has nothing to undo."""
        self._interrupts = HeldInterrupts()
        self._restore_rng = held_rng()
        self._switches = _HeldSwitches(model)
        self._modules = HeldModules(model)
        self._tensors = HeldTensors(model)
        self._ended = False

    def prepare(self) -> None:
        """Switch over to what the probe needs."""
        self._switches.prepare()
        self._tensors.prepare()
        self._modules.prepare()

    def put_back(self) -> None:
        """Put everything back that is not as it was. May be called again, wherever an earlier call was cut off."""
        try:
            if not self._ended:  # else the host's handler of interrupts may have run since
                self._interrupts.hold()
                try:
                    self._restore()
                finally:
                    if not self._ended:
                        self._restore()
        finally:
            self._interrupts.let_go()

    def _restore(self) -> None:
        """Every part asks whether it is as before, so that doing it twice is doing it once."""
        self._switches.restore()
        self._modules.restore()  # the tensors' containers stand in them
        self._tensors.restore()
        self._restore_rng()
        self._ended = True

    def complain(self) -> None:
        """Say what could not be put back, unless training is being ended.

        Raises:
            NumericalError: there is something.
        """
        ending = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit, GeneratorExit))
        if self._tensors.problems and not ending:
            written = list(dict.fromkeys(self._tensors.problems))
            raise NumericalError(
                f"expected a forward to leave the model alone, found {'; '.join(written[:_LISTED])}; this model cannot "
                "be watched without disturbing its training"
            )


class _HeldSwitches:
    """Torch's switches: precision, deterministic kernels, gradients, inference mode, autocast, compilation."""

    def __init__(self, model: nn.Module) -> None:
        """Only read."""
        self._use_exact_products, self._restore_precision = float32_precision()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        self._in_inference = False
        kinds = {p.device.type for p in model.parameters()} | {"cpu"}
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in sorted(kinds) if kind != "meta"}
        self._compiled = _is_compiled(model)
        self._stance: Any = None

    def prepare(self) -> None:
        """Exact products, no autocast, nothing compiled."""
        self._use_exact_products()
        if self._inference is not None:
            self._in_inference = True
            self._inference.__enter__()
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)
        if self._deterministic:  # the sampler's cumulative sums have no deterministic kernel on CUDA
            torch.use_deterministic_algorithms(False)
        if self._compiled:
            # no compilation of what the probe runs, and no recompilation of what training runs
            self._stance = torch.compiler.set_stance("force_eager")

    def restore(self) -> None:
        """As they were."""
        if self._in_inference and self._inference is not None:
            self._in_inference = False
            self._inference.__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)
        for kind, enabled in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warn_only)
        self._restore_precision()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)


def _is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled."""
    compiled = torch._dynamo.OptimizedModule if "torch._dynamo" in sys.modules else ()
    return any(
        isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
