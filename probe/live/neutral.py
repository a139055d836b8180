"""The host's training does not notice the probe: whatever a probe touches is bitwise as before when it is done."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probe.errors.exceptions import NumericalError
from probe.loading.quantization import find_4bit_layers, use_exact_4bit_layers

SMALL_BUFFER = 2**20
"""Buffers of up to this many bytes are copied and put back; of larger ones a change is an error."""
_CONTENTS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module whose entries are put back one by one."""
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
    held = _Held(model)
    # Nested, so that an interrupt on the way into one `finally` is followed by the next. What is done stays done.
    try:
        try:
            try:
                held.prepare()
                yield
            finally:
                held.put_back()
        finally:
            held.put_back()
    finally:
        held.put_back()
        held.complain()


class _Held:
    """What training's process and model were before a probe, and how that is put back."""

    def __init__(self, model: nn.Module) -> None:
        """Only read: an interrupt in here has nothing to undo."""
        self._model = model
        self._ended = False
        self._problems: list[str] = []
        self._interrupts = _HeldInterrupts()
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._precision = _Precision()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        self._in_inference = False
        kinds = {p.device.type for p in model.parameters()} | {"cpu"}
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in sorted(kinds) if kind != "meta"}
        self._stance: Any = None
        self._modules = [(module, module.__class__, dict(vars(module))) for module in model.modules()]
        self._contents = [
            (vars(module)[name], dict(vars(module)[name]))
            for module, _, _ in self._modules
            for name in _CONTENTS
        ]
        rewritten = _rewritten_in_place(model)
        self._parameters = [
            (
                name,
                p,
                _fingerprint(p) if id(p) in rewritten else _version(p),
                p.data_ptr(),
                p.requires_grad,
                p.grad,
                _version(p.grad),
            )
            for name, p in model.named_parameters()
        ]
        self._hooks = [
            (p, p._backward_hooks) for p in model.parameters() if p.requires_grad and p._backward_hooks
        ]
        self._buffers: list[tuple[str, Tensor, Tensor | int]] = []
        for name, buffer in model.named_buffers():
            small = buffer.numel() * buffer.element_size() <= SMALL_BUFFER
            self._buffers.append((name, buffer, buffer.clone() if small else _version(buffer)))

    def prepare(self) -> None:
        """Switch over to what the probe needs."""
        self._precision.use_exact()
        if self._inference is not None:
            self._in_inference = True
            self._inference.__enter__()
        for kind in self._autocast:
            torch.set_autocast_enabled(kind, False)
        if self._deterministic:  # the sampler's cumulative sums have no deterministic kernel on CUDA
            torch.use_deterministic_algorithms(False)
        if _is_compiled(self._model):
            # no compilation of what the probe runs, and no recompilation of what training runs
            self._stance = torch.compiler.set_stance("force_eager")
        for module in self._model.modules():
            own = vars(module)
            if "_original_forward" in own and "forward" in own:
                # accelerate's mixed precision: autocast would round what is to be resolved
                module.forward = own["_original_forward"]
        if find_4bit_layers(self._model):
            # bitsandbytes' own forward may repack the weights for good in evaluation mode
            use_exact_4bit_layers(self._model)
        for p, _ in self._hooks:
            p._backward_hooks = None  # training's own: the probe's gradients are none of their business
        # one by one: `model.eval()` would call every module's `train`, and some do work there that nothing undoes
        for module in self._model.modules():
            module.training = False

    def put_back(self) -> None:
        """Put everything back that is not as it was. May be called again, wherever an earlier call was cut off."""
        if self._ended:
            self._interrupts.let_go()
            return
        try:
            self._interrupts.hold()
            try:
                self._restore()
            finally:
                if not self._ended:
                    self._restore()
        finally:
            self._interrupts.let_go()

    def complain(self) -> None:
        """Say what could not be put back, unless training is being ended.

        Raises:
            NumericalError: there is something.
        """
        if self._problems and not isinstance(
            sys.exc_info()[1], (KeyboardInterrupt, SystemExit, GeneratorExit)
        ):
            found = list(dict.fromkeys(self._problems))
            raise NumericalError(
                f"expected a forward to leave the model alone, found {'; '.join(found[:_LISTED])}; this model cannot "
                "be watched without disturbing its training"
            )

    def _restore(self) -> None:
        """Every part asks whether it is as before, so that doing it twice is doing it once."""
        if self._in_inference and self._inference is not None:
            self._in_inference = False
            self._inference.__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)
        for kind, enabled in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warn_only)
        self._precision.put_back()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        self._restore_modules()
        self._restore_tensors()
        python, numpy, cpu = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._cuda_random:
            torch.cuda.set_rng_state_all(self._cuda_random)
        self._ended = True

    def _restore_modules(self) -> None:
        for module, own_class, saved in self._modules:
            if module.__class__ is not own_class:
                module.__class__ = own_class
            _put_back_entries(vars(module), saved)
        # only now: the containers of the modules are those of before again
        for found, entries in self._contents:
            _put_back_entries(found, entries)

    def _restore_tensors(self) -> None:
        for name, p, version, where, trained, grad, grad_version in self._parameters:
            if p.requires_grad != trained:
                p.requires_grad_(trained)
            if p.grad is not grad:
                p.grad = grad
            now = _version(p) if isinstance(version, int) else _fingerprint(p)
            if now != version or p.data_ptr() != where:
                self._problems.append(f"parameter {name} written to")
            if _version(grad) != grad_version:
                self._problems.append(f"the gradient of {name} written to")
        for p, hooks in self._hooks:
            if p._backward_hooks is not hooks:
                p._backward_hooks = hooks
        for name, buffer, saved in self._buffers:
            if isinstance(saved, int):
                if _version(buffer) != saved:
                    self._problems.append(f"buffer {name} changed")
            elif not _same_bits(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)


def _put_back_entries(own: MutableMapping[str, Any], saved: MutableMapping[str, Any]) -> None:
    """Give a mapping the very objects that it held, in their order."""
    if list(own) == list(saved) and all(own[name] is value for name, value in saved.items()):
        return
    for name in own.keys() - saved.keys():
        del own[name]
    for name, value in saved.items():
        if own.get(name, own) is not value:
            own[name] = value
    if list(own) != list(saved):
        for name, value in saved.items():
            own.pop(name, None)
            own[name] = value


class _Precision:
    """Float32 products without TF32. Torch has two ways to set them, see `probe.snapshot.exact_float32`."""

    def __init__(self) -> None:
        found = (getattr(torch.backends.cuda, "matmul", None), getattr(torch.backends.mkldnn, "matmul", None))
        self._backends: list[Any] = [b for b in found if hasattr(b, "fp32_precision")]
        self._own = [b.fp32_precision for b in self._backends]
        self._precision: str | None = None
        try:
            self._precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # it was set in the new way
            self._precision = None

    def use_exact(self) -> None:
        """Switch reduced precision off."""
        if self._precision is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in self._backends:
            backend.fp32_precision = "ieee"

    def put_back(self) -> None:
        """The settings of before; setting the old way overwrites the new ones, so these follow."""
        if self._precision is not None:
            torch.set_float32_matmul_precision(self._precision)
        for backend, value in zip(self._backends, self._own, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = value


class _HeldInterrupts:
    """Lets Ctrl-C wait while things are put back; the host's own handler gets it afterwards."""

    def __init__(self) -> None:
        self._own: Any = None
        self._waiting: list[Any] = []

    def hold(self) -> None:
        """Keep signals from here on. Python delivers them to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        own = signal.getsignal(signal.SIGINT)
        if callable(own) and own != self._keep:  # a default or ignored signal runs no code of Python's
            self._own = own
            signal.signal(signal.SIGINT, self._keep)

    def let_go(self) -> None:
        """Give the handler back, and let it have what came."""
        try:
            self._give_back()
        finally:
            self._give_back()
        waiting, self._waiting = self._waiting, []
        if waiting:
            handler: Callable[[int, Any], Any] = self._own
            handler(*waiting[0])

    def _give_back(self) -> None:
        if self._own is not None and signal.getsignal(signal.SIGINT) == self._keep:
            signal.signal(signal.SIGINT, self._own)

    def _keep(self, number: int, frame: Any) -> None:
        self._waiting.append((number, frame))


def _version(p: Tensor | None) -> int:
    """How often a tensor was written to; 0 for those that do not count."""
    return 0 if p is None or p.is_inference() else p._version


def _rewritten_in_place(model: nn.Module) -> set[int]:
    """Parameters that peft's adapters of parameters (`target_parameters`) register anew, as they are, in each forward.

    That counts as writing, so that their values are compared.
    """
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    return {id(p) for wrapper in wrappers for p in wrapper.get_base_layer().parameters(recurse=False)}  # type: ignore[operator]


def _fingerprint(p: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, modulo `2 ** 64`: the same before and after for the same values."""
    data = p.detach().contiguous().view(-1)
    size = data.element_size()
    bits = data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return int(bits.sum()), int((bits * place).sum())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal, NaN equal to itself."""
    return bool(torch.equal(one, other)) or bool(
        torch.equal(torch.isnan(one), torch.isnan(other))
        and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def _is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled."""
    compiled = torch._dynamo.OptimizedModule if "torch._dynamo" in sys.modules else ()
    return any(
        isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
