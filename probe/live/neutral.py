"""The host's training does not notice the probe: whatever a probe touches is bitwise as before when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import NumericalError
from probe.loading.quantization import find_4bit_layers, use_exact_4bit_layers
from probe.snapshot import evaluation_mode, exact_float32, isolated_rng

SMALL_BUFFER = 2**20
"""Buffers of up to this many bytes are copied and put back; of larger ones a change is an error."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the policy in evaluation mode, in its own precision without autocast, and leave no trace of it.

    Random streams (Python, NumPy, torch, CUDA), train and eval flags of every module, buffers, the `forward` that
    accelerate has wrapped, the class of 4-bit layers, TF32 and autocast settings are put back, also after an exception.
    Parameters, their `.grad` and the optimizer are never written: passes at other values use
    `probe.snapshot.standing_in`.

    Args:
        model: the policy.

    Raises:
        NumericalError: a forward changed a large buffer.
    """
    device_types = {p.device.type for p in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        stack.enter_context(isolated_rng())
        stack.enter_context(exact_float32())
        stack.enter_context(torch.inference_mode(False))
        for kind in sorted(device_types):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_nondeterministic())
        stack.enter_context(_eager(model))
        stack.enter_context(_parameters(model))
        stack.enter_context(_attributes(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(_unwrapped_forwards(model))
        stack.enter_context(_exact_4bit(model))
        stack.enter_context(evaluation_mode(model))
        yield


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Put plain attributes of modules back (rotary embeddings note the longest input they have seen)."""
    found = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, saved in found:
            own = vars(module)
            for name in own.keys() - saved.keys():
                del own[name]
            for name, value in saved.items():
                if own.get(name, own) is not value:
                    own[name] = value


@contextmanager
def _parameters(model: nn.Module) -> Iterator[None]:
    """Make sure that no parameter was written to.

    Raises:
        NumericalError: one was: a module works on its weights in the forward.
    """
    versions = {name: (p, _version(p)) for name, p in model.named_parameters()}
    yield
    changed = [name for name, (p, version) in versions.items() if _version(p) != version]
    if changed:
        raise NumericalError(
            f"expected a forward to leave the parameters alone, found {changed[:5]} written to; this model cannot be "
            "watched without disturbing its training"
        )


def _version(p: Tensor) -> int:
    """How often a tensor was written to; 0 for those that do not count."""
    return 0 if p.is_inference() else p._version


@contextmanager
def _nondeterministic() -> Iterator[None]:
    """Allow operators without a deterministic kernel for a while (the sampler's cumulative sums, on CUDA)."""
    wanted = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back (a rotary embedding may recompute its frequencies for longer inputs)."""
    found: list[tuple[nn.Module, str, Tensor, Tensor | int]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                small = buffer.numel() * buffer.element_size() <= SMALL_BUFFER
                found.append((module, name, buffer, buffer.clone() if small else buffer._version))
    try:
        yield
    finally:
        changed = []
        for module, name, buffer, saved in found:
            module._buffers[name] = buffer
            if isinstance(saved, int):
                if buffer._version != saved:
                    changed.append(name)
            elif not _same_bits(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)
        if changed:
            raise NumericalError(
                f"expected a forward to leave the model's buffers alone, found {changed[:5]} changed; this model "
                "cannot be watched without disturbing its training"
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal, NaN equal to itself."""
    return bool(torch.equal(one, other)) or bool(
        torch.equal(torch.isnan(one), torch.isnan(other))
        and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


@contextmanager
def _unwrapped_forwards(model: nn.Module) -> Iterator[None]:
    """Take accelerate's mixed-precision wrapper off for a while: autocast would round what is to be resolved."""
    wrapped: list[tuple[Any, Any]] = []
    for module in model.modules():
        own = vars(module)
        if "_original_forward" in own and "forward" in own:
            wrapped.append((module, own["forward"]))
    try:
        for module, _ in wrapped:
            module.forward = module._original_forward
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


@contextmanager
def _exact_4bit(model: nn.Module) -> Iterator[None]:
    """Exact forwards of 4-bit layers; bitsandbytes' own may repack the weights for good in evaluation mode."""
    layers: list[Any] = list(find_4bit_layers(model).values())
    before = [(layer, layer.__class__, vars(layer).get("_old_forward")) for layer in layers]
    try:
        use_exact_4bit_layers(model)
        yield
    finally:
        for layer, own_class, own_forward in before:
            layer.__class__ = own_class
            if own_forward is not None:
                layer._old_forward = own_forward


def _eager(model: nn.Module) -> Any:
    """No compilation of what the probe runs, and no recompilation of what training runs."""
    compiled = torch._dynamo.OptimizedModule if "torch._dynamo" in sys.modules else ()
    if any(
        isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    ):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
